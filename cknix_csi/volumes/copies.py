"""The presentation `copy`: a tree of files that are the volume's own, in the directory of that volume.

    volumes/<volume>/<target>/copy/<closure id>/nix         what the pod sees, as a plain clone
    volumes/<volume>/<target>/space/copy/<closure id>/nix   the same in a place of limited size, which it fills first

Nothing of it is shared, and when it is made it needs nothing of the store any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cknix_csi.api.attributes import PRESENTATION, named
from cknix_csi.api.closure import Closure
from cknix_csi.api.errors import Invalid, OutOfSpace, Problem
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.progress import humanise
from cknix_csi.api.quantity import format_quantity, readable_size
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.finishing import in_thread
from cknix_csi.volumes import syscalls
from cknix_csi.volumes.copytree import CopySize
from cknix_csi.volumes.failures import LimitReached, VolumeFailed, explained
from cknix_csi.volumes.farm import FarmEngine, FarmReport, VarLayout, furnish, settle
from cknix_csi.volumes.mountinfo import Mount, MountTable
from cknix_csi.volumes.place import Place
from cknix_csi.volumes.sized import SPACE
from cknix_csi.volumes.trees import WriteState

log = logging.getLogger(__name__)

AT_ONCE = 2
"""Copies that are made side by side; more wait in the order they came.  Each keeps the disk busy by itself."""
_UNWRITABLE = "the private copy of {} cannot be written to the node's disk"
_UNKNOWN = CopySize(0, 0)
_NOTHING = 1 << 20
"""Bytes: less than so much free is a full disk."""

COPY = "copy"
"""Name of the directory, in what a volume has of its own, that its private copy is in."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What a mount shows of a private copy."""

    closure_id: str
    private: str
    """The directory of the volume at one target."""


@dataclass(frozen=True, slots=True)
class CopyCost:
    """What a private copy has cost."""

    report: FarmReport
    seconds: float

    def __str__(self) -> str:
        return f"{self.report}; in {self.seconds:.3f}s"


class Engine(FarmEngine, Protocol):
    """Makes one copy; satisfied by ``copytree.CopyEngine``."""

    @property
    def bytes_done(self) -> int:
        """How much data it has made so far."""

    async def measure(self, store_dir: Path, names: list[str]) -> CopySize:
        """What the copy will take.  Raises OSError, StoreDamaged."""


@dataclass(slots=True)
class _UnderWay:
    """A copy that is being made."""

    closure: Closure
    engine: Engine
    began: float | None = None
    """Of the monotonic clock; None while it waits for its turn."""
    size: CopySize = _UNKNOWN

    def __str__(self) -> str:
        if self.began is None:
            return f"still copying {self.closure.id}: waiting for one of {AT_ONCE} other copies to be made"
        far = f"{readable_size(self.engine.bytes_done)} of {readable_size(self.size.data)}"
        return f"still copying {self.closure.id}: {far}, {humanise(time.monotonic() - self.began)}"


class Copies:
    """The private copies in *directory*, that of all volumes, of closures whose objects are in *store_dir*.

    *place* is that of the data root, which *directory* is in.
    """

    def __init__(
        self,
        directory: str,
        place: Place,
        store_dir: Path,
        engine: Callable[[], Engine],
        var: VarLayout,
        *,
        emptied: Callable[[], Awaitable[None]],
    ) -> None:
        """*emptied* waits until the space of what was thrown away is free."""
        self._directory = directory
        self._place = place
        self._store_dir = store_dir
        self._engine = engine
        self._var = var
        self._emptied = emptied
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._under_way: dict[str, _UnderWay] = {}

    def words(self, private: str) -> str | None:
        """How far the copy of the volume in the directory *private* has come; None when none is being made."""
        under_way = self._under_way.get(private)
        return None if under_way is None else str(under_way)

    @contextlib.asynccontextmanager
    async def begin(self, private: str, closure: Closure) -> AsyncIterator[_UnderWay]:
        """The copy of *closure* for the volume in *private* is made in this block, which is entered when it is its turn
        and its size is known.  Raises StoreDamaged, VolumeFailed.
        """
        under_way = self._under_way[private] = _UnderWay(closure, self._engine())
        try:
            async with self._turns:
                under_way.began = time.monotonic()
                with explained(f"see how large {closure.id} is"):
                    names = [info.path.basename for info in closure.paths]
                    under_way.size = await under_way.engine.measure(self._store_dir, names)
                yield under_way
        finally:
            del self._under_way[private]

    async def require_room(
        self, under_way: _UnderWay, limit: Limit | None, maximum: int | None, *, reflinks: bool
    ) -> None:
        """Refuse what cannot fit, before anything is written; what may fit is not refused.

        *maximum*: bytes that this node gives a volume, if there is such a rule.  *reflinks*: files on the node's disk
        can share their blocks.  Raises Invalid for more than the maximum, LimitReached, OutOfSpace, VolumeFailed.
        """
        closure, size = under_way.closure, under_way.size
        if maximum is not None and size.in_blocks > maximum:
            most = f"{format_quantity(maximum)} that this node gives a volume (CKNIX_SIZE_LIMIT_MAX)"
            rule = f"a copy of {closure.id} takes {readable_size(size.in_blocks)}, more than the {most}; leave it out"
            raise Invalid([Problem(named(PRESENTATION), rule)])
        if limit is not None and size.in_blocks > limit.bytes:
            raise self._too_small(under_way, limit)
        if reflinks if limit is None else limit.medium is Medium.MEMORY:
            return
        free = await in_thread(self._free)
        if size.data > free:
            await self._emptied()
            free = await in_thread(self._free)
        if size.data > free:
            full = OutOfSpace(
                f"the private copy of {closure.id} takes {readable_size(size.data)}, and on the node's disk "
                f"{readable_size(free)} are free; free space there, or leave out `presentation: copy`"
            )
            full.needed = size.data
            raise full

    def origin(self, base: str, closure_id: str) -> str:
        """The directory that the pod sees of the copy in *base*."""
        return f"{base}/{COPY}/{closure_id}/nix"

    def of(self, mount: Mount, table: MountTable) -> Copy | None:
        """What *mount* shows of a copy of ours, None for any other.  *table*: the one that it is from."""
        if mount.fstype == "overlay" or not mount.root.endswith("/nix"):
            return None
        *above, copy, name, _ = ("", "", *mount.root.split("/"))
        if copy != COPY:
            return None
        try:
            closure_id = StorePath.from_basename(name).basename
        except InvalidStorePath:
            return None
        private = self._private_of(mount, table, in_place_of_its_own=not any(above))
        return None if private is None else Copy(closure_id, private)

    async def build(self, under_way: _UnderWay, base: str, write_state: WriteState, limit: Limit | None) -> CopyCost:
        """Make the copy in the directory *base*, where none is; *limit* is that of what *base* is in.

        A cancellation ends the work soon; what was made is for the caller to throw away.  Raises StoreDamaged,
        LimitReached, OutOfSpace, VolumeFailed, and what *write_state* raises.
        """
        closure = under_way.closure
        tree = f"{base}/{COPY}/{closure.id}"
        try:
            with explained(f"copy {closure.id}"):
                await in_thread(os.makedirs, os.path.dirname(tree), 0o755)
            report = await self._fill(tree, under_way, write_state)
        except (OutOfSpace, VolumeFailed) as error:
            if limit is None:
                raise
            if limit.medium is Medium.DISK and await in_thread(self._nothing_free):
                raise OutOfSpace(f"{_UNWRITABLE.format(closure.id)}, which is full; free space there") from error
            if isinstance(error, OutOfSpace):
                raise self._too_small(under_way, limit) from error
            raise
        if limit is not None and limit.medium is Medium.DISK:
            # Its image has no blocks of the node's disk yet, which may have none left: what cannot be written is lost.
            try:
                await in_thread(syscalls.sync_file_system, tree)
            except OSError as error:
                raise OutOfSpace(f"{_UNWRITABLE.format(closure.id)}: {error.strerror}") from error
        cost = CopyCost(report, time.monotonic() - (under_way.began or 0.0))
        log.info("copied %s for one volume: %s", closure.id, cost)
        return cost

    def _too_small(self, under_way: _UnderWay, limit: Limit) -> LimitReached:
        return LimitReached(
            f"the private copy of {under_way.closure.id} must fit into its size limit of {limit}, and its files alone "
            f"take {readable_size(under_way.size.in_blocks)}; raise sizeLimit"
        )

    def _free(self) -> int:
        """Bytes of the node's disk, with those that are kept for root."""
        with explained("see how much of the node's disk is free"):
            found = os.statvfs(self._directory)
        return found.f_bfree * found.f_frsize

    def _nothing_free(self) -> bool:
        found = os.statvfs(self._directory)
        return found.f_bfree * found.f_frsize < _NOTHING or (found.f_files > 0 and not found.f_ffree)

    async def _fill(self, tree: str, under_way: _UnderWay, write_state: WriteState) -> FarmReport:
        closure = under_way.closure
        report = await furnish(tree, closure, self._store_dir, under_way.engine, self._var)
        with explained(f"write the database of {closure.id}"):
            await write_state(closure, Path(tree))
            await in_thread(settle, tree, self._var)
        return report

    def _private_of(self, mount: Mount, table: MountTable, *, in_place_of_its_own: bool) -> str | None:
        """The directory of the volume whose copy *mount* shows."""
        if in_place_of_its_own:
            spaces = (other.target for other in table.on_device(mount.device) if other.root == "/")
            own = (at for at in spaces if at.startswith(f"{self._directory}/") and at.endswith(f"/{SPACE}"))
            return next((at.removesuffix(f"/{SPACE}") for at in own), None)
        inside = self._place.inside(mount)
        if inside is None:
            return None
        volumes, *rest = inside.split("/")
        if volumes != os.path.basename(self._directory) or len(rest) != 5:
            return None
        return f"{self._directory}/{rest[0]}/{rest[1]}"
