"""Farms: per closure, a tree of hard links to the store's files, for pods that no overlay can serve.

The kernel refuses to id-map an overlay (``hostUsers: false``), and where the probe finds no redirects there is no view.
A farm is made once per closure and shared by all its volumes:

    farms/<closure id>/tree/nix/store/<name>   the store object: directories made again, all else linked
    farms/<closure id>/tree/nix/var            real files, as in a view
    farms/<closure id>/empty                   the second lower layer that a read-only overlay must have
    farms/<closure id>/m                       where the overlay shared by read-only volumes is mounted
    farms/<closure id>/sealed                  the boot of which it is

The inodes are the store's own: nothing below ``tree/nix/store`` is ever given another mode, owner, time or label, and a
farm is never mounted writable but as the lower layer of an overlay.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from cknix_csi.api.closure import Closure
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.storepath import STORE_DIR, StorePath
from cknix_csi.boot import boot_id
from cknix_csi.finishing import finish
from cknix_csi.volumes import soundness
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.mountinfo import Mount, MountTable
from cknix_csi.volumes.soundness import LINKS, STAMP
from cknix_csi.volumes.trash import Trash
from cknix_csi.volumes.treedir import TreeDirectory, closure_named
from cknix_csi.volumes.trees import WriteState
from cknix_csi.volumes.view import SOURCE as PREFIX

log = logging.getLogger(__name__)

SOURCE = f"{PREFIX}farm:"
"""What overlays over a farm show as their source in the mount table, followed by the closure's id."""


@dataclass(slots=True)
class FarmReport:
    """How the entries of a tree were made; the three kinds of file exclude each other."""

    linked: int = 0
    """Files that share an inode: with the store, or in a private copy with another file of the copy."""
    reflinked: int = 0
    """Files with an inode of their own that share the store's blocks."""
    bytes_reflinked: int = 0
    """The sizes of those."""
    copied: int = 0
    """Files with an inode and blocks of their own."""
    bytes_copied: int = 0
    """Bytes of data written for those; holes are not counted."""
    directories: int = 0
    symlinks: int = 0

    def add(self, other: FarmReport) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def __str__(self) -> str:
        parts = [f"{count} {verb}" for verb in ("linked", "reflinked", "copied") if (count := getattr(self, verb))]
        files = " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "none"
        amounts = [f"{self.bytes_copied} bytes"] if self.copied else []
        amounts += [f"{self.bytes_reflinked} bytes shared with the store"] if self.reflinked else []
        sizes = f" ({', '.join(amounts)})" if amounts else ""
        return f"files: {files}{sizes}; {self.directories} directories, {self.symlinks} symbolic links"


class FarmEngine(Protocol):
    """One way to make store objects again in another directory."""

    async def fill(self, store_dir: Path, names: Sequence[str], destination: str) -> FarmReport:
        """Make the objects *names* of *store_dir* in the existing, empty directory *destination*.

        Content, modes, owners and times equal the original's.  Cancelled or failed, it has stopped working when it
        raises, and what it made is for the caller to throw away.  Raises OSError, or a CknixError.
        """


class VarLayout(Protocol):
    """What a volume has at ``/nix/var`` besides its database; the same for views and farms."""

    def write(self, var: str, root: StorePath) -> None:
        """Make all but the database in *var*, which is missing.  Raises OSError."""

    def settle(self, var: str) -> None:
        """Give all below *var* its fixed mode and time.  Raises OSError."""


async def furnish(tree: str, closure: Closure, store_dir: Path, engine: FarmEngine, var: VarLayout) -> FarmReport:
    """Make *tree*, which is missing: ``nix/store`` by *engine* and ``nix/var`` but for the database, which comes next.

    Raises StoreDamaged, OutOfSpace, VolumeFailed, and on cancellation at once when the engine has stopped.
    """
    names = [info.path.basename for info in closure.paths]
    doing = f"make the files of {closure.id}"
    with explained(doing):
        await finish(asyncio.to_thread(_prepare, tree, store_dir, names))
        report = await engine.fill(store_dir, names, f"{tree}/nix/store")
        await finish(asyncio.to_thread(_furnish_rest, tree, closure.root, var))
    return report


def settle(tree: str, var: VarLayout) -> None:
    """Finish *tree* once its database is written: fixed modes and times.

    Nothing is synced: a tree is not used again after a reboot.  Raises OSError.
    """
    var.settle(f"{tree}/nix/var")
    for directory in (f"nix/store/{LINKS}", "nix/store", "nix", ""):
        path = os.path.join(tree, directory)
        os.chmod(path, 0o755)  # noqa: S103 (as in any Nix installation: what is in a store is for everyone)
        os.utime(path, ns=(STAMP, STAMP))


class Farms(TreeDirectory):
    """The farms below *directory* (which exists), of closures whose objects are in *store_dir*.

    *directory* should be on the same mount as *store_dir*: link(2) refuses everything else, and files are copied then.
    *ours*: whether a clone shows something of this data root, which its root in the mount table does not tell.
    """

    presentation = Presentation.HARDLINK
    noun = "farm"
    source_prefix = SOURCE

    def __init__(
        self,
        directory: str,
        store_dir: Path,
        trash: Trash,
        engine: FarmEngine,
        var: VarLayout,
        *,
        ours: Callable[[Mount], bool] = lambda _: True,
    ) -> None:
        super().__init__(directory, trash)
        self._store_dir = store_dir
        self._engine = engine
        self._var = var
        self._ours = ours

    def origin(self, closure_id: str) -> str:
        """The directory that a volume without an overlay shows: for read-only clones, which can be id-mapped."""
        return f"{self._directory}/{closure_id}/tree/nix"

    def layers(self, closure_id: str) -> tuple[str, str]:
        """The lower layers of every overlay of this closure; overlayfs refuses a single one without an upper layer."""
        return f"{self._directory}/{closure_id}/tree", f"{self._directory}/{closure_id}/empty"

    def closure_of(self, mount: Mount) -> str | None:
        """The closure whose farm *mount* shows, by an overlay of ours or by a plain clone; None for a foreign mount."""
        if mount.fstype == "overlay":
            return self._overlaid(mount)
        *_, farms, name, tree, nix = ("", "", "", "", *mount.root.split("/"))
        if (farms, tree, nix) != (os.path.basename(self._directory), "tree", "nix") or not self._ours(mount):
            return None
        return closure_named(name)

    def shown(self, table: MountTable) -> set[str]:
        """The closures whose farms any mount shows."""
        mounts = (*table.sourced_like(SOURCE), *table.rooted("/tree/nix"))
        return {closure_id for mount in mounts if (closure_id := self.closure_of(mount))}

    def in_use(self, closure_id: str, table: MountTable) -> bool:
        """True when a mount other than the shared overlay shows the farm, in a pod or on its way there."""
        shared = self.mountpoint(closure_id)
        mounts = (*table.sourced(self.source(closure_id)), *table.rooted(f"/{closure_id}/tree/nix"))
        return any(mount.target != shared and self.closure_of(mount) == closure_id for mount in mounts)

    def is_shown(self, closure_id: str) -> bool:
        """True when the overlay at the mount point is over this farm."""
        return _root_of(f"{self.mountpoint(closure_id)}/nix") == closure_id

    def look(self, closure_id: str) -> str | None:
        """What is wrong with a farm that exists, None when it is whole; see :mod:`.soundness`.

        Raises StoreDamaged, VolumeFailed.
        """
        if not self.sound(closure_id):
            return "it is of an earlier boot, or its directory of store paths was changed"
        return soundness.flaw_of_farm(self.path(closure_id), closure_id, str(self._store_dir))

    def sound(self, closure_id: str) -> bool:
        """True when the farm is there, complete, of this boot, and with all its store paths.

        The boot, since a power cut may have taken what was never synced; and the time of the directory of store paths,
        which changes with its entries.  What is below those is not looked at: that would cost as much as building it.
        """
        path = self.path(closure_id)
        try:
            with open(f"{path}/sealed", encoding="ascii") as file:
                complete = file.read() == boot_id()
            unchanged = os.lstat(f"{path}/tree/nix/store").st_mtime_ns == STAMP
        except OSError:
            return False
        return complete and unchanged and _root_of(f"{path}/tree/nix") == closure_id

    async def begin(self, building: str, closure: Closure) -> FarmReport:
        """Make all of a farm but the database, which goes to ``<building>/tree``.

        A cancellation ends the work soon, also in its threads.  Raises StoreDamaged, OutOfSpace, VolumeFailed.
        """
        with explained(f"make the farm of {closure.id}"):
            await finish(asyncio.to_thread(_make_directories, building))
        return await furnish(f"{building}/tree", closure, self._store_dir, self._engine, self._var)

    def complete(self, building: str, closure_id: str) -> None:
        """Settle what was built in *building* and rename it into place, unless a whole one has come there meanwhile.

        Raises OutOfSpace, VolumeFailed.
        """
        with explained(f"complete the farm of {closure_id}"):
            settle(f"{building}/tree", self._var)
            with open(f"{building}/sealed", "x", encoding="ascii") as file:
                file.write(boot_id())
        if self.sound(closure_id):
            self.abandon(building)
            return
        self.discard(closure_id)
        self._place(building, closure_id)

    async def build(self, closure: Closure, write_state: WriteState) -> None:
        """See :class:`~cknix_csi.volumes.trees.Trees`."""
        started = time.monotonic()
        building = self.reserve()
        try:
            report = await self.begin(building, closure)
            with explained(f"write the database of {closure.id}"):
                await write_state(closure, Path(building, "tree"))
            await finish(asyncio.to_thread(self.complete, building, closure.id))
        except BaseException:
            await finish(asyncio.to_thread(self.abandon, building))
            raise
        seconds = time.monotonic() - started
        log.info("made a farm of hard links for %s in %.3fs: %s", closure.id, seconds, report)


def _make_directories(building: str) -> None:
    os.mkdir(building, 0o700)
    os.mkdir(f"{building}/m", 0o755)
    os.mkdir(f"{building}/empty", 0o755)


def _prepare(tree: str, store_dir: Path, names: Sequence[str]) -> None:
    for name in names:
        if not os.path.lexists(store_dir / name):
            raise soundness.missing(name)
    os.makedirs(f"{tree}/nix/store", 0o755)


def _furnish_rest(tree: str, root: StorePath, var: VarLayout) -> None:
    os.mkdir(f"{tree}/nix/store/{LINKS}")  # a Nix client on a read-only store wants it
    var.write(f"{tree}/nix/var", root)


def _root_of(shown: str) -> str | None:
    """The closure whose root the result link in *shown* names."""
    try:
        return os.readlink(f"{shown}/var/result").removeprefix(f"{STORE_DIR}/")
    except OSError:
        return None
