"""The presentation `copy`: a tree of files that are the volume's own, in the directory of that volume.

    volumes/<volume>/<target>/copy/<closure id>/nix         what the pod sees, as a plain clone
    volumes/<volume>/<target>/space/copy/<closure id>/nix   the same in a place of limited size, which it fills first

Nothing of it is shared, and when it is made it needs nothing of the store any more.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.api.closure import Closure
from cknix_csi.api.errors import OutOfSpace
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.volumes import syscalls
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.farm import FarmEngine, FarmReport, VarLayout, furnish, settle
from cknix_csi.volumes.locks import in_thread
from cknix_csi.volumes.mountinfo import Mount, MountTable
from cknix_csi.volumes.place import Place
from cknix_csi.volumes.sized import SPACE
from cknix_csi.volumes.trees import WriteState

log = logging.getLogger(__name__)

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


class Copies:
    """The private copies in *directory*, that of all volumes, of closures whose objects are in *store_dir*.

    *place* is that of the data root, which *directory* is in.
    """

    def __init__(self, directory: str, place: Place, store_dir: Path, engine: FarmEngine, var: VarLayout) -> None:
        self._directory = directory
        self._place = place
        self._store_dir = store_dir
        self._engine = engine
        self._var = var

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

    async def build(self, base: str, closure: Closure, write_state: WriteState, limit: Limit | None) -> CopyCost:
        """Make the copy of *closure* in the directory *base*, where none is; *limit* is that of what *base* is in.

        A cancellation ends the work soon; what was made is for the caller to throw away.  Raises StoreDamaged,
        OutOfSpace, VolumeFailed, and what *write_state* raises.
        """
        started = time.monotonic()
        tree = f"{base}/{COPY}/{closure.id}"
        try:
            with explained(f"copy {closure.id}"):
                await in_thread(os.makedirs, os.path.dirname(tree), 0o755)
            report = await self._fill(tree, closure, write_state)
        except OutOfSpace as error:
            if limit is None:
                raise
            raise OutOfSpace(
                f"the private copy of {closure.id} must fit into its size limit of {limit}; raise sizeLimit"
            ) from error
        if limit is not None and limit.medium is Medium.DISK:
            # Its image has no blocks of the node's disk yet, which may have none left: what cannot be written is lost.
            try:
                await in_thread(syscalls.sync_file_system, tree)
            except OSError as error:
                raise OutOfSpace(
                    f"the private copy of {closure.id} cannot be written to the node's disk: {error.strerror}"
                ) from error
        cost = CopyCost(report, time.monotonic() - started)
        log.info("copied %s for one volume: %s", closure.id, cost)
        return cost

    async def _fill(self, tree: str, closure: Closure, write_state: WriteState) -> FarmReport:
        report = await furnish(tree, closure, self._store_dir, self._engine, self._var)
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
