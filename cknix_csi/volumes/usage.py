"""What a mounted volume uses, and whether it is well: for who asks every minute, about any volume.

Mount table and directories tell all of it, so it is told too of volumes that another process made.

A read-only volume is as large as its closure, the bytes of the NARs of all its paths, and full: pods share files with
the store, so that no volume of them has a disk use of its own; nor does anything tell how many files there are but a
walk through all of them.  A writable volume uses what it has of its own: what was written to it, of the room that its
size limit or the disk of the data root gives.  All of a private copy is its own; one that is read-only is full, too.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.api.errors import CknixError, NotFound
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes import target as targets
from cknix_csi.volumes.closures import Closures
from cknix_csi.volumes.condition import Conditions
from cknix_csi.volumes.copies import COPY
from cknix_csi.volumes.failures import TargetUnusable, explained
from cknix_csi.volumes.locks import KeyedLocks
from cknix_csi.volumes.mountinfo import Mount
from cknix_csi.volumes.mounts import Mounts
from cknix_csi.volumes.private import PrivateLayers, volume_key
from cknix_csi.volumes.published import Published, Shown
from cknix_csi.volumes.sized import SizedStorage, Usage
from cknix_csi.volumes.trees import Trees
from cknix_csi.volumes.treesize import TreeSizes

FRESH_SECONDS = 55.0
"""For how long an answer that costs something is given again; kubelet asks once a minute."""
WELL = "mounted, with all of its store paths"
_CLOSURES_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class Amount:
    """So much of one thing; what is neither used nor available is used by others."""

    total: int
    used: int
    available: int


NOTHING = Amount(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one volume uses."""

    bytes: Amount
    inodes: Amount | None
    """None where nobody knows."""
    problem: str | None = None
    """What is wrong with the volume, for people; None when nothing is."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What is at a volume's path."""

    path: str
    mount: Mount | None
    """The topmost of ours."""
    shown: Shown | None
    """What that shows."""
    private: str | None
    """The directory of what the volume has of its own, if that is there."""
    problem: str | None
    """What is wrong with the mount."""


class VolumeUsage:
    """Measures the volumes of the data root *root*; its parts are those of :class:`~.volumes.Volumes`."""

    def __init__(
        self,
        root: str,
        *,
        trees: Sequence[Trees],
        private: PrivateLayers,
        published: Published,
        closures: Closures,
        mounts: Mounts,
        sized: SizedStorage,
        locks: KeyedLocks,
        fresh: float = FRESH_SECONDS,
    ) -> None:
        self._root = root
        self._private = private
        self._published = published
        self._closures = closures
        self._mounts = mounts
        self._sized = sized
        self._locks = locks
        self._conditions = Conditions(trees, closures, fresh=fresh)
        self._sizes = TreeSizes(fresh=fresh)
        self._closure_sizes: OrderedDict[str, int] = OrderedDict()
        """A closure's id always means the same paths, so this is true for ever."""

    async def measure(self, volume_id: str, target: Path) -> Measured:
        """What the volume at *target* uses, and what is wrong with it.

        A read-only volume has nothing that would tell its id: whatever of ours is mounted there is taken for it.
        What cannot be measured is a problem of the volume, and told as nothing.  Raises NotFound when no volume is
        there, or another; MountTableUnreadable, VolumeFailed.
        """
        measured = await self._measure(volume_id, target)
        if measured.problem is None:
            return measured
        # Once more: it may have been unpublished and published anew meanwhile, by a mount of the same number.
        return await self._measure(volume_id, target)

    async def close(self) -> None:
        """End what goes on in the background."""
        await self._sizes.close()

    async def _measure(self, volume_id: str, target: Path) -> Measured:
        found = await asyncio.to_thread(self._find, volume_id, target)
        problem = found.problem
        if problem is None and found.shown is not None:
            problem = await self._conditions.problem(found.shown.presentation, found.shown.closure_id)
        try:
            amounts = await self._amounts(found)
        except CknixError as error:
            amounts, problem = (NOTHING, None), problem or error.message
        if problem is not None and found.mount is not None:
            await asyncio.to_thread(self._require_still, found.path, found.mount)
        return Measured(*amounts, problem)

    def _find(self, volume_id: str, target: Path) -> _Found:
        try:
            path = targets.resolve(target)
        except TargetUnusable as error:
            raise NotFound(f"no volume is published at {str(target)!r}: {error}") from error
        table = self._mounts.table()
        stack = table.at(path)
        own = self._private.path(volume_id, target)
        for mount in reversed(stack):
            shown = self._published.shown(mount, table)
            if shown is None:
                continue
            private = self._published.private(mount, table)
            if private is not None and os.path.dirname(private) != os.path.dirname(own):
                raise NotFound(f"what is mounted at {path} is another volume, not {volume_id}")
            top = stack[-1]
            covered = f"covered by a foreign mount of {top.source!r} ({top.fstype}): unmount that on the node"
            return _Found(path, mount, shown, private, None if mount is top else covered)
        if stack:
            raise NotFound(f"what is mounted at {path} is no volume of this driver")
        return self._find_unmounted(volume_id, target, path, own)

    def _find_unmounted(self, volume_id: str, target: Path, path: str, own: str) -> _Found:
        """What has been a volume: the directory that nobody but its publish makes, and what was written to it."""
        private = own if os.path.isdir(own) else None
        if self._locks.taken(volume_key(volume_id)) or (private is None and not _is_empty_directory(path)):
            raise NotFound(f"volume {volume_id} is not published at {path}: nothing is mounted there")
        if self._mounts.table().at(path):  # a publish has just ended
            return self._find(volume_id, target)
        gone = "nothing is mounted at the volume's path any more: delete the pod, and make it anew"
        return _Found(path, None, None, private, gone)

    def _require_still(self, path: str, mount: Mount) -> None:
        """Raise NotFound when the volume has been unpublished meanwhile: then nothing is wrong with it."""
        if mount.id not in {each.id for each in self._mounts.table().at(path)}:
            raise NotFound(f"the volume at {path} has just been unpublished")

    async def _amounts(self, found: _Found) -> tuple[Amount, Amount | None]:
        """Bytes and inodes."""
        if found.private is None:
            size = 0 if found.shown is None else await self._closure_size(found.shown.closure_id)
            return _full(size), None
        if found.shown is not None and _is_fixed(found.shown):
            copy = await self._sizes.of(f"{found.private}/{COPY}")  # the store need not know its closure any more
            return _full(copy.bytes), _full(copy.inodes)
        usage = await asyncio.to_thread(self._sized.usage, found.private)
        if usage is not None:
            return _of_place(usage)
        return await self._of_disk(found.private)

    async def _of_disk(self, private: str) -> tuple[Amount, Amount | None]:
        """Of a volume without a limit."""
        copy = f"{private}/{COPY}"
        size = await self._sizes.of(copy if await asyncio.to_thread(os.path.isdir, copy) else f"{private}/upper")
        with explained(f"see how full the disk of {self._root} is"):
            disk = await asyncio.to_thread(os.statvfs, self._root)
        amount = Amount(disk.f_blocks * disk.f_frsize, size.bytes, disk.f_bavail * disk.f_frsize)
        # A file system without a fixed number of inodes, such as btrfs, says 0.
        return amount, Amount(disk.f_files, size.inodes, disk.f_favail) if disk.f_files else None

    async def _closure_size(self, closure_id: str) -> int:
        size = self._closure_sizes.get(closure_id)
        if size is None:
            size = (await self._closures.query(StorePath.from_basename(closure_id))).nar_size
            self._closure_sizes[closure_id] = size
            while len(self._closure_sizes) > _CLOSURES_REMEMBERED:
                self._closure_sizes.popitem(last=False)
        return size


def _is_fixed(shown: Shown) -> bool:
    """True for a copy that nobody writes to."""
    return shown.presentation is Presentation.COPY and not shown.writable


def _full(size: int) -> Amount:
    return Amount(total=size, used=size, available=0)


def _of_place(usage: Usage) -> tuple[Amount, Amount]:
    return (
        Amount(usage.bytes, usage.bytes_used, usage.bytes_available),
        Amount(usage.inodes, usage.inodes_used, usage.inodes_available),
    )


def _is_empty_directory(path: str) -> bool:
    try:
        return not os.path.islink(path) and not os.listdir(path)
    except OSError:
        return False
