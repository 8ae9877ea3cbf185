"""Views: per closure, the small layer of directories that lets one overlay show exactly that closure.

overlayfs follows an absolute ``trusted.overlay.redirect`` on a directory of a layer into the layers below it
(Documentation/filesystems/overlayfs.rst, "Redirects").  So ``meta/nix/store`` holds one empty directory per store path
that points at the real one, and building it costs a few calls per store *path*, however many files are in there.

    views/<closure id>/meta/nix/store/<name>   a directory with a redirect; for a path that is a file, a sparse file of
                                               its size with a redirect and an empty trusted.overlay.metacopy; for a
                                               symbolic link, the link
    views/<closure id>/meta/nix/var            real files: database, profiles, GC roots, the link to the result
    views/<closure id>/m                       where the overlay shared by all read-only volumes is mounted

The layer's own root would show the whole store: only ``m/nix`` ever reaches a pod, and ``views`` is closed to others.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from cknix_csi.api.closure import Closure
from cknix_csi.api.storepath import STORE_DIR, InvalidStorePath, StorePath
from cknix_csi.volumes import syscalls
from cknix_csi.volumes.failures import StoreDamaged, explained
from cknix_csi.volumes.mountinfo import Mount
from cknix_csi.volumes.mounts import BY_DESCRIPTOR
from cknix_csi.volumes.trash import Trash

_BUILDING = ".building-"
_TIME = 1_000_000_000
"""Nanoseconds since the epoch: Nix's own time of everything in a store, and ours of what is around it."""
_REDIRECT = "trusted.overlay.redirect"
_METACOPY = "trusted.overlay.metacopy"


class Views:
    """The views below *directory* (which exists), of closures whose objects are in *store_dir*."""

    def __init__(self, directory: str, store_dir: Path, trash: Trash) -> None:
        self._directory = directory
        self._trash = trash
        self._store_dir = str(store_dir)
        self._building: set[str] = set()

    def path(self, closure_id: str) -> str:
        return f"{self._directory}/{closure_id}"

    def mountpoint(self, closure_id: str) -> str:
        return f"{self._directory}/{closure_id}/m"

    def may_own(self, mount: Mount) -> bool:
        """False when *mount*, an overlay, shows a view of another data root."""
        layer = mount.super_option("lowerdir+")
        return layer is None or layer.startswith((f"{self._directory}/", BY_DESCRIPTOR))

    def is_shown(self, closure_id: str) -> bool:
        """True when what is mounted at the mount point is this view."""
        try:
            return os.readlink(f"{self.mountpoint(closure_id)}/nix/var/result") == f"{STORE_DIR}/{closure_id}"
        except OSError:
            return False

    def layers(self, closure_id: str) -> tuple[str, str]:
        """The lower layers of every overlay of this closure, topmost first."""
        return f"{self._directory}/{closure_id}/meta", self._store_dir

    def exists(self, closure_id: str) -> bool:
        """True when the view is there, and then it is whole."""
        return os.path.isdir(self.path(closure_id))

    def ids(self) -> Iterator[str]:
        """The closures that have a view; anything else in the directory is not ours and not named."""
        for name in os.listdir(self._directory):
            try:
                yield StorePath.from_basename(name).basename
            except InvalidStorePath:
                continue

    def abandoned(self) -> Iterator[str]:
        """Paths of views whose building ended half-way, in an earlier process."""
        for name in os.listdir(self._directory):
            if name.startswith(_BUILDING) and name not in self._building:
                yield f"{self._directory}/{name}"

    def reserve(self) -> str:
        """A path to build a view at, beside the finished ones; end with :meth:`complete` or :meth:`abandon`."""
        name = f"{_BUILDING}{uuid.uuid4().hex}"
        self._building.add(name)
        return f"{self._directory}/{name}"

    def begin(self, building: str, closure: Closure) -> None:
        """Make all of a view but the database, which goes to ``<building>/meta``.

        Raises StoreDamaged, OutOfSpace, VolumeFailed.
        """
        with explained(f"build the view of {closure.id}"):
            os.mkdir(building, 0o700)
            os.mkdir(f"{building}/m", 0o755)
            _write_store(f"{building}/meta/nix/store", closure, self._store_dir)
            _write_var(f"{building}/meta/nix/var", closure.root)

    def complete(self, building: str, closure_id: str) -> None:
        """Settle what was built in *building* and rename it into place.  Raises OutOfSpace, VolumeFailed."""
        with explained(f"complete the view of {closure_id}"):
            files = _settle(f"{building}/meta/nix/var")
            for directory in ("meta/nix/store", "meta/nix", "meta"):
                _stamp(f"{building}/{directory}")
            for file in files:  # after all changes: the first commits them all, the others have little left to do
                _sync(file)
            # Commits what was made before it on a journalling file system, and spares a sync per store path (30 ms for
            # 300).  Where that is not enough: a power cut ends all mounts, and a view without one is thrown away before
            # anything is published.  The same is why no view's coming and going is synced by itself.
            _sync(f"{building}/meta/nix/store")
            os.rename(building, self.path(closure_id))
        self._building.discard(os.path.basename(building))

    def abandon(self, building: str) -> None:
        """Throw away what was made of *building*.  Raises VolumeFailed."""
        if os.path.lexists(building):
            self._trash.take(building)
        self._building.discard(os.path.basename(building))

    def discard(self, closure_id: str) -> None:
        """Throw away the view; the caller knows that no mount uses it.  Raises VolumeFailed."""
        if self.exists(closure_id):
            self._trash.take(self.path(closure_id))


def _write_store(store: str, closure: Closure, physical: str) -> None:
    os.makedirs(store, 0o755)
    os.mkdir(f"{store}/.links", 0o755)  # a Nix client on a read-only store wants it
    _stamp(f"{store}/.links")
    for info in closure.paths:
        name = info.path.basename
        try:
            original = os.lstat(f"{physical}/{name}")
        except FileNotFoundError:
            raise StoreDamaged(
                f"{info.path} is in the store's database but not in the store; "
                f"repair it on the node with `nix-store --verify --check-contents --repair`"
            ) from None
        _write_entry(f"{store}/{name}", name, original, physical)


def _write_entry(path: str, name: str, original: os.stat_result, physical: str) -> None:
    """The entry at *path* that overlayfs shows as *physical*/*name*: it takes owner, mode, size and time from here."""
    redirect = f"/{name}".encode()
    if stat.S_ISDIR(original.st_mode):
        os.mkdir(path)
        os.setxattr(path, _REDIRECT, redirect)
    elif stat.S_ISREG(original.st_mode):
        with syscalls.owned(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)) as file:
            os.ftruncate(file, original.st_size)
            os.setxattr(file, _METACOPY, b"")
            os.setxattr(file, _REDIRECT, redirect)
    elif stat.S_ISLNK(original.st_mode):
        os.symlink(os.readlink(f"{physical}/{name}"), path)
    else:
        raise StoreDamaged(f"/nix/store/{name} is neither a directory, a file nor a symbolic link")
    if original.st_uid or original.st_gid:
        os.chown(path, original.st_uid, original.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(original.st_mode):
        os.chmod(path, stat.S_IMODE(original.st_mode))  # not by mkdir: the process's umask would have its say
    os.utime(path, ns=(original.st_mtime_ns, original.st_mtime_ns), follow_symlinks=False)


def _write_var(var: str, root: StorePath) -> None:
    """What a Nix client expects at /nix/var, ready for a collection inside the volume to keep *root*."""
    os.makedirs(f"{var}/nix/db")
    # A client on a read-only store gives up when it would have to make one of these.
    os.makedirs(f"{var}/nix/profiles/per-user/root")
    os.mkdir(f"{var}/nix/temproots")
    os.makedirs(f"{var}/nix/gcroots/auto")
    os.makedirs(f"{var}/nix/gcroots/per-user/root")
    os.symlink("/nix/var/nix/profiles", f"{var}/nix/gcroots/profiles")
    os.symlink(str(root), f"{var}/nix/gcroots/result")
    os.symlink(str(root), f"{var}/result")


def _settle(var: str) -> list[str]:
    """Fixed modes and times for all below *var*, whoever wrote it under whatever umask; returns the regular files."""
    files: list[str] = []
    with os.scandir(var) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                files += _settle(entry.path)
                continue
            if not entry.is_symlink():
                os.chmod(entry.path, 0o644)
                files.append(entry.path)
            os.utime(entry.path, ns=(_TIME, _TIME), follow_symlinks=False)
    _stamp(var)
    return files


def _stamp(directory: str) -> None:
    os.chmod(directory, 0o755)  # noqa: S103 (as in any Nix installation: what is in a store is for everyone)
    os.utime(directory, ns=(_TIME, _TIME))


def _sync(path: str) -> None:
    with syscalls.owned(os.open(path, os.O_RDONLY)) as opened:
        os.fsync(opened)
