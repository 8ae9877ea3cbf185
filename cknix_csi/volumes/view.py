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

import asyncio
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cknix_csi.api.closure import Closure, ClosurePath
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.storepath import STORE_DIR, StorePath
from cknix_csi.finishing import finish, in_thread, together
from cknix_csi.volumes import soundness, syscalls
from cknix_csi.volumes.failures import StoreDamaged, explained
from cknix_csi.volumes.mountinfo import Mount, MountTable
from cknix_csi.volumes.soundness import LINKS, METACOPY, REDIRECT, STAMP
from cknix_csi.volumes.trash import Trash
from cknix_csi.volumes.treedir import TreeDirectory
from cknix_csi.volumes.trees import WriteState

SOURCE = "cknix:"
"""How the source of every overlay of this driver begins in the mount table; for a view the closure's id follows."""
_MANY = 100
"""Store paths; as many are worth a second thread, 3 ms."""


class Var:
    """What a volume has at ``/nix/var`` besides its database, whatever it is made of."""

    def write(self, var: str, root: StorePath) -> None:
        """Make all but the database in *var*, which is missing: ready for a collection inside to keep *root*.

        Raises OSError.
        """
        _write_var(var, root)

    def settle(self, var: str) -> None:
        """Give all below *var* its fixed mode and time.  Raises OSError."""
        _settle(var)


class Views(TreeDirectory):
    """The views below *directory* (which exists), of closures whose objects are in *store_dir*."""

    presentation = Presentation.REDIRECT
    noun = "view"
    source_prefix = SOURCE

    def __init__(self, directory: str, store_dir: Path, trash: Trash) -> None:
        super().__init__(directory, trash)
        self._store_dir = str(store_dir)

    def closure_of(self, mount: Mount) -> str | None:
        """The closure that *mount* shows, None for a foreign mount; another data root's are foreign too."""
        return self._overlaid(mount) if mount.fstype == "overlay" else None

    def shown(self, table: MountTable) -> set[str]:
        """The closures that any mount shows."""
        return {closure_id for mount in table.sourced_like(SOURCE) if (closure_id := self.closure_of(mount))}

    def in_use(self, closure_id: str, table: MountTable) -> bool:
        """True when a mount shows the closure, in a pod or on its way there."""
        shared = self.mountpoint(closure_id)
        mounts = table.sourced(SOURCE + closure_id)
        return any(mount.target != shared and self.closure_of(mount) for mount in mounts)

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
        """True when the view is there, and then it was whole once."""
        return os.path.isdir(self.path(closure_id))

    def look(self, closure_id: str) -> str | None:
        """What is wrong with a view that exists, None when it is whole; see :mod:`soundness`.

        Raises StoreDamaged, VolumeFailed.
        """
        return soundness.flaw(self.path(closure_id), closure_id, self._store_dir)

    def begin(self, building: str, closure: Closure) -> None:
        """Make all of a view but the database, which goes to ``<building>/meta``.

        Raises StoreDamaged, OutOfSpace, VolumeFailed.
        """
        self._begin(building, closure)
        self._fill(building, closure)

    def complete(self, building: str, closure_id: str) -> None:
        """Settle what was built in *building* and rename it into place.  Raises OutOfSpace, VolumeFailed.

        Nothing is synced, which would take longer than all the rest.  A power cut, which alone could lose something,
        ends all mounts; and a view that no mount shows is never used by another process than the one that built it.
        """
        with explained(f"complete the view of {closure_id}"):
            _settle(f"{building}/meta/nix/var")
            for directory in ("meta/nix/store", "meta/nix", "meta"):
                _stamp(f"{building}/{directory}")
        self._place(building, closure_id)

    async def build(self, closure: Closure, write_state: WriteState) -> None:
        """See :class:`~cknix_csi.volumes.trees.Trees`."""
        building = self.reserve()
        try:
            await in_thread(self._begin, building, closure)
            # Side by side: neither SQLite nor the kernel needs the interpreter while it works.
            hands = 1 + (len(closure.paths) >= _MANY)
            await together(
                *(asyncio.to_thread(self._fill, building, closure, hand, hands) for hand in range(hands)),
                self._write_state(building, closure, write_state),
            )
            await in_thread(self.complete, building, closure.id)
        except BaseException:
            await finish(asyncio.to_thread(self.abandon, building))
            raise

    def _begin(self, building: str, closure: Closure) -> None:
        with explained(f"build the view of {closure.id}"):
            os.mkdir(building, 0o700)
            os.mkdir(f"{building}/m", 0o755)
            os.makedirs(f"{building}/meta/nix/store/{LINKS}")  # a Nix client on a read-only store wants it
            _stamp(f"{building}/meta/nix/store/{LINKS}")
            _write_var(f"{building}/meta/nix/var", closure.root)

    def _fill(self, building: str, closure: Closure, hand: int = 0, hands: int = 1) -> None:
        """The share of *hand* (from 0) of the entries, of which *hands* threads have one each."""
        with explained(f"build the view of {closure.id}"):
            _write_store(f"{building}/meta/nix/store", closure.paths[hand::hands], self._store_dir)

    async def _write_state(self, building: str, closure: Closure, write_state: WriteState) -> None:
        with explained(f"write the database of {closure.id}"):
            await write_state(closure, Path(building, "meta"))


def closure_key(closure_id: str) -> str:
    """The name of the lock of a closure's view and GC root."""
    return f"closure {closure_id}"


def _write_store(store: str, paths: Sequence[ClosurePath], physical: str) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY
    with syscalls.owned(os.open(store, flags)) as layer, syscalls.owned(os.open(physical, flags)) as originals:
        entries = _Entries(store, layer, originals)
        for info in paths:
            entries.write(info.path.basename)


class _Entries:
    """Makes the entries of the directory *store*, also known by its descriptor *layer*.

    What overlayfs shows by them is in the directory of descriptor *originals*.
    """

    def __init__(self, store: str, layer: int, originals: int) -> None:
        self._store = store
        self._layer = layer
        self._originals = originals
        self._kept: dict[int, bool] = {}
        """Which modes things get that are made with them: the umask and a default ACL have their say."""

    def write(self, name: str) -> None:
        """The entry that is shown as the original: overlayfs takes owner, mode, size and time from here."""
        try:
            original = os.stat(name, dir_fd=self._originals, follow_symlinks=False)
        except FileNotFoundError:
            raise soundness.missing(name) from None
        mode = original.st_mode
        if stat.S_ISDIR(mode):
            os.mkdir(name, stat.S_IMODE(mode), dir_fd=self._layer)
            # No call of this sort takes a directory's descriptor and a name.
            os.setxattr(f"{self._store}/{name}", REDIRECT, b"/" + name.encode())
        elif stat.S_ISREG(mode):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with syscalls.owned(os.open(name, flags, stat.S_IMODE(mode), dir_fd=self._layer)) as file:
                os.ftruncate(file, original.st_size)
                os.setxattr(file, METACOPY, b"")
                os.setxattr(file, REDIRECT, b"/" + name.encode())
        elif stat.S_ISLNK(mode):
            os.symlink(os.readlink(name, dir_fd=self._originals), name, dir_fd=self._layer)
        else:
            raise StoreDamaged(f"/nix/store/{name} is neither a directory, a file nor a symbolic link")
        if original.st_uid or original.st_gid:
            os.chown(name, original.st_uid, original.st_gid, dir_fd=self._layer, follow_symlinks=False)
        if not stat.S_ISLNK(mode):
            self._require_mode(name, mode)
        time = original.st_mtime_ns
        os.utime(name, ns=(time, time), dir_fd=self._layer, follow_symlinks=False)

    def _require_mode(self, name: str, mode: int) -> None:
        """Give what was made with *mode*, which tells its type too, exactly that mode."""
        if mode not in self._kept:
            self._kept[mode] = os.stat(name, dir_fd=self._layer, follow_symlinks=False).st_mode == mode
        if not self._kept[mode]:
            os.chmod(name, stat.S_IMODE(mode), dir_fd=self._layer)


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


def _settle(var: str) -> None:
    """Fixed modes and times for all below *var*, whoever wrote it under whatever umask."""
    with os.scandir(var) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _settle(entry.path)
                continue
            if not entry.is_symlink():
                os.chmod(entry.path, 0o644)
            os.utime(entry.path, ns=(STAMP, STAMP), follow_symlinks=False)
    _stamp(var)


def _stamp(directory: str) -> None:
    os.chmod(directory, 0o755)  # noqa: S103 (as in any Nix installation: what is in a store is for everyone)
    os.utime(directory, ns=(STAMP, STAMP))
