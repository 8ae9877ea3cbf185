"""Bringing directories, mounts and GC roots to agree after a crash, a reboot, or somebody else's hands.

The mount table says what is used, and is read before anything is touched.  Whatever an operation is at work on is left
to that operation.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cknix_csi.api.errors import CknixError
from cknix_csi.api.storepath import StorePath
from cknix_csi.finishing import finish
from cknix_csi.volumes.closures import Closures
from cknix_csi.volumes.locks import KeyedLocks
from cknix_csi.volumes.mountinfo import MountTable
from cknix_csi.volumes.mounts import Mounts
from cknix_csi.volumes.private import PrivateLayers
from cknix_csi.volumes.published import Published
from cknix_csi.volumes.report import ReconcileReport
from cknix_csi.volumes.trees import Trees
from cknix_csi.volumes.view import closure_key
from cknix_csi.volumes.warm import UnusedTrees

log = logging.getLogger(__name__)


class Reconciliation:
    """Of one data root, whose directories exist and are locked against other processes."""

    def __init__(
        self,
        *,
        trees: Sequence[Trees],
        private: PrivateLayers,
        published: Published,
        closures: Closures,
        mounts: Mounts,
        locks: KeyedLocks,
        unused: UnusedTrees,
    ) -> None:
        self._trees = trees
        self._private = private
        self._published = published
        self._closures = closures
        self._mounts = mounts
        self._locks = locks
        self._unused = unused

    async def run(self) -> ReconcileReport:
        """Adopt what is mounted, remove what is provably nobody's; the report is logged too.

        What fails is in the report.  Raises MountTableUnreadable before anything is touched.
        """
        report = ReconcileReport()
        await asyncio.to_thread(self._mounts.table)  # unreadable: raise before anything is touched
        for trees in self._trees:
            async with self._reported(report, f"half-built {trees.noun}s"):
                for building in await asyncio.to_thread(list, trees.abandoned()):
                    await finish(asyncio.to_thread(trees.abandon, building))
                    report.half_built += 1
        async with self._reported(report, "the data of volumes"):
            await self._volumes(report)
        async with self._reported(report, "the list of GC roots"):
            await self._all_closures(report)
        for line in report.words():
            log.info("reconcile: %s", line)
        for problem in report.problems:
            log.warning("reconcile: %s", problem)
        return report

    async def hold_mounted(self) -> list[str]:
        """Take the GC roots that are missing of closures that are mounted or being copied; returns their ids.

        Raises MountTableUnreadable, and what taking a root raises.
        """
        held = await self._held()
        taken = []
        for closure_id in sorted(await self._needed() - held):
            async with self._locks.hold(closure_key(closure_id)):
                if closure_id in await self._needed():
                    await finish(self._closures.hold(closure_id, StorePath.from_basename(closure_id)))
                    taken.append(closure_id)
        return taken

    async def _held(self) -> set[str]:
        return {name for name, root in (await self._closures.held()).items() if name == root.basename}

    async def _needed(self) -> set[str]:
        return self._mounted(await asyncio.to_thread(self._mounts.table)) | self._unused.pinned()

    def _mounted(self, table: MountTable) -> set[str]:
        return {closure_id for trees in self._trees for closure_id in trees.shown(table)}

    @asynccontextmanager
    async def _reported(self, report: ReconcileReport, what: str) -> AsyncIterator[None]:
        """A failure of the block goes into the report: one bad thing must not keep the rest from being put right."""
        try:
            yield
        except (CknixError, OSError) as error:
            report.problems.append(f"{what}: {error}")

    async def _volumes(self, report: ReconcileReport) -> None:
        for volume in await asyncio.to_thread(self._private.volumes):
            key = f"volume {os.path.basename(volume)}"
            if self._locks.taken(key):
                continue
            async with self._locks.hold(key):
                await finish(asyncio.to_thread(self._volume, volume, report))

    def _volume(self, volume: str, report: ReconcileReport) -> None:
        for private in self._private.targets(volume):
            try:
                self._mounts.unmount(self._private.mountpoint(private))  # hidden: no pod sees it
                used = self._published.uses(private, self._mounts.table())
                if not used and self._private.discard(private):
                    report.volumes_removed.append(private)
            except (CknixError, OSError) as error:
                report.problems.append(f"{private}: {error}")
        self._private.prune(volume)

    async def _all_closures(self, report: ReconcileReport) -> None:
        held = await self._held()
        mounted = self._mounted(await asyncio.to_thread(self._mounts.table))
        views = await asyncio.to_thread(lambda: {closure_id for trees in self._trees for closure_id in trees.ids()})
        for closure_id in sorted(views | mounted | held):
            if self._locks.taken(closure_key(closure_id)):
                continue
            async with self._locks.hold(closure_key(closure_id)), self._reported(report, closure_id):
                if self._unused.is_warm(closure_id) and closure_id in held:
                    report.warm.append(closure_id)
                    continue
                if await finish(self._unused.retire(closure_id)):
                    (report.views_removed if closure_id in views else report.roots_released).append(closure_id)
                    continue
                report.adopted.append(closure_id)
                if closure_id not in held:  # somebody removed it: whoever uses the volume must not lose its files
                    await finish(self._closures.hold(closure_id, StorePath.from_basename(closure_id)))
                    report.roots_taken.append(closure_id)
