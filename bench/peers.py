"""What others do to publish a closure, step by step as they do it, but for what only makes them slower.

* nix-csi, per pod: ``nix path-info``, ``rsync --archive --hard-links`` (which links nothing: it copies),
  ``nix-store --dump-db | nix-store --load-db``, a bind mount.  Left out in its favour: evaluation and the ``nix build``
  of each publish, and mount(8), which is a system call here.
* ``rsync --link-dest``: the same with hard links into the store.
* bind per path: one bind mount for each store path.  composefs: one image per closure.  Both get cknix's own query and
  database, so that their rows show what the presentation costs.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from bench.bench import Case
from bench.generate import nix_environment
from bench.room import remove
from cknix_csi.api.storepath import STORE_DIR
from cknix_csi.nix import database
from cknix_csi.nix.store import Store
from cknix_csi.volumes import syscalls
from cknix_csi.volumes.mounts import KernelMounts

PATIENCE = 150.0
"""Seconds that one publish may copy: it would take the time of all other benchmarks."""

_mounts = KernelMounts()


class TooSlow(Exception):
    """A publish was given up; the message says after how long."""


class Peer(ABC):
    """One way to publish *case*, with its files in *directory*."""

    name: str
    same_again = False
    """A further pod takes all that the first one took."""

    def __init__(self, case: Case, directory: Path) -> None:
        self._case = case
        self._directory = directory
        directory.mkdir(parents=True)

    @classmethod
    def absent(cls) -> str:
        """Why it cannot be measured here; empty when it can."""
        return ""

    @abstractmethod
    def first(self, target: Path) -> None:
        """Publish at *target*, which is made.  Raises :class:`TooSlow`."""

    def further(self, target: Path) -> None:
        """Publish once more."""
        self.first(target)

    def unpublish(self, target: Path) -> None:
        subprocess.run(["umount", "--lazy", target], check=True)
        target.rmdir()

    def close(self) -> None:
        """Remove all there is; everything is unpublished."""
        remove(self._directory)


class NixCsi(Peer):
    name = "nix-csi's sequence"
    same_again = True

    @classmethod
    def absent(cls) -> str:
        return "" if shutil.which("rsync") else "rsync is not on the PATH"

    def first(self, target: Path) -> None:
        volume = self._volume(target)
        paths = self._path_info()
        inside = volume / "nix/store"
        inside.mkdir(parents=True)
        physical = self._case.store.physical
        sources = [f"{physical}{path.removeprefix(STORE_DIR)}" for path in paths]
        command = ["rsync", "--one-file-system", *self._options(), *sources, f"{inside}/"]
        try:
            subprocess.run(command, check=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise TooSlow(f"stopped after {PATIENCE:.0f} s") from None
        self._register(paths, volume)
        target.mkdir()
        _mounts.clone(str(volume / "nix"), str(target), writable=False)

    def unpublish(self, target: Path) -> None:
        super().unpublish(target)
        remove(self._volume(target))

    def _options(self) -> list[str]:
        return ["--archive", "--hard-links"]

    def _volume(self, target: Path) -> Path:
        return self._directory / target.parent.name

    def _path_info(self) -> list[str]:
        command = ["nix", "path-info", "--recursive", str(self._case.root)]
        environment = nix_environment(self._case.store)
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()

    def _register(self, paths: list[str], volume: Path) -> None:
        ours, its = nix_environment(self._case.store), nix_environment(Store.chroot(volume))
        with subprocess.Popen(["nix-store", "--dump-db", *paths], env=ours, stdout=subprocess.PIPE) as dump:
            subprocess.run(["nix-store", "--load-db"], env=its, stdin=dump.stdout, check=True)
        if dump.returncode != 0:
            raise subprocess.CalledProcessError(dump.returncode, dump.args)


class LinkDest(NixCsi):
    name = "nix-csi's sequence, --link-dest"

    def _options(self) -> list[str]:
        return ["--archive", "--hard-links", f"--link-dest={self._case.store.physical}"]


class BindPerPath(Peer):
    name = "bind mount per store path"

    def first(self, target: Path) -> None:
        self._closure = database.query_closure(self._case.store, self._case.root)
        var = self._directory / "var/nix/db"
        var.mkdir(parents=True)
        database.write_database(self._case.store, self._closure, var)
        self.further(target)

    def further(self, target: Path) -> None:
        target.mkdir()
        _mount_tmpfs(str(target))
        physical = self._case.store.physical
        store, var = f"{target}/store", f"{target}/var"
        os.mkdir(store)
        os.mkdir(var)
        for info in self._closure.paths:
            source, shown = f"{physical}/{info.path.basename}", f"{store}/{info.path.basename}"
            mode = os.lstat(source).st_mode
            if stat.S_ISLNK(mode):
                os.symlink(os.readlink(source), shown)
                continue
            if stat.S_ISDIR(mode):
                os.mkdir(shown)
            else:
                os.close(os.open(shown, os.O_CREAT | os.O_EXCL))
            _mounts.clone(source, shown, writable=False)
        _mounts.clone(str(self._directory / "var"), var, writable=False)


class Composefs(Peer):
    name = "composefs image"

    @classmethod
    def absent(cls) -> str:
        missing = [name for name in ("mkcomposefs", "mount.composefs") if not shutil.which(name)]
        return f"{' and '.join(missing)} not on the PATH" if missing else ""

    @property
    def _shared(self) -> Path:
        return self._directory / "m"

    def first(self, target: Path) -> None:
        closure = database.query_closure(self._case.store, self._case.root)
        var = self._directory / "var/nix/db"
        var.mkdir(parents=True)
        database.write_database(self._case.store, closure, var)
        image = self._directory / "image"
        physical = self._case.store.physical
        listing = "".join(_dump(str(physical), [info.path.basename for info in closure.paths]))
        command = ["mkcomposefs", "--from-file", "-", str(image)]
        subprocess.run(command, input=os.fsencode(listing), check=True)
        self._shared.mkdir()
        subprocess.run(["mount.composefs", "-o", f"basedir={physical}", image, self._shared], check=True)
        self.further(target)

    def further(self, target: Path) -> None:
        target.mkdir()
        _mount_tmpfs(str(target))
        for name, source in (("store", self._shared), ("var", self._directory / "var")):
            os.mkdir(target / name)
            _mounts.clone(str(source), str(target / name), writable=False)

    def close(self) -> None:
        _mounts.unmount(str(self._shared))
        super().close()


PEERS: tuple[type[Peer], ...] = (BindPerPath, Composefs, LinkDest, NixCsi)


def _mount_tmpfs(target: str) -> None:
    with syscalls.owned(syscalls.fsopen("tmpfs")) as context:
        syscalls.fsconfig_create(context)
        with syscalls.owned(syscalls.fsmount(context, syscalls.MOUNT_ATTR_NOSUID)) as mount:
            syscalls.move_mount(mount, target)


def _dump(physical: str, names: list[str]) -> Iterator[str]:
    """The closure in the form composefs-dump(5) describes: one line for each inode, parents first."""
    yield _line("/", os.stat(physical), "-", size=4096)
    for name in names:
        yield from _dump_one(physical, name)


def _dump_one(physical: str, name: str) -> Iterator[str]:
    path = f"{physical}/{name}"
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        yield _line(f"/{name}", found, _escaped(os.readlink(path)))
    elif stat.S_ISDIR(found.st_mode):
        yield _line(f"/{name}", found, "-", size=4096)
        with os.scandir(path) as entries:
            for entry in entries:
                yield from _dump_one(physical, f"{name}/{entry.name}")
    else:
        yield _line(f"/{name}", found, _escaped(name) if found.st_size else "-")


def _line(name: str, found: os.stat_result, payload: str, *, size: int | None = None) -> str:
    size = found.st_size if size is None else size
    owner = f"{found.st_uid} {found.st_gid}"
    return (
        f"{_escaped(name)} {size} {found.st_mode:o} {found.st_nlink} {owner} 0 {int(found.st_mtime)}.0 {payload} - -\n"
    )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace(" ", "\\x20").replace("\n", "\\n")
