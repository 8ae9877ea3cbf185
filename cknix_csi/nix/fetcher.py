"""Fills a node's store from binary caches; satisfies ``csi.closures.Fetcher``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from cknix_csi.api.errors import CknixError
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database, leftovers
from cknix_csi.nix.closures import has_root
from cknix_csi.nix.database import DatabaseDamaged, PathNotValid
from cknix_csi.nix.fetcherrors import PathCollected
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.nix import Nix, OnProgress
from cknix_csi.nix.recovery import is_whole, missing
from cknix_csi.nix.substituters import CacheEndpoint

_MAX_NAMED = 5
TRIES = 8
"""How often a fetch is begun that garbage collections disturb: of 50 fetches one to three, when they never pause."""

_log = logging.getLogger(__name__)


class StoreFetcher:
    """Fetches by signature only, from the caches that *endpoints* names at that moment."""

    def __init__(
        self,
        nix: Nix,
        endpoints: Callable[[], Awaitable[Sequence[CacheEndpoint]]],
        owner: str = "fetches",
        *,
        fetched: Callable[[int], None] = lambda size: None,
    ) -> None:
        """*owner* is the directory of GC roots that this object alone adds to and removes from.

        *fetched* is told after each fetch how many bytes, as NARs, it has brought.
        """
        self._fetched = fetched
        self._nix = nix
        self._endpoints = endpoints
        self._roots = GcRoots(nix.store, owner)
        self._repairing = asyncio.Lock()

    async def is_valid(self, path: StorePath) -> bool:
        """True when *path* is registered with its closure, and all of it is on disk.

        The disk is looked at only while no volume on this node has the closure.
        """
        await self._nix.unsynced.survived()
        return await asyncio.to_thread(self._is_valid, path)

    async def fetch(self, path: StorePath, progress: OnProgress) -> None:
        """Fetch what is missing of *path* and its closure, also where the store's database knows no better.

        Raises what :meth:`Nix.substitute` raises, and DatabaseUnreadable.
        """
        await self._nix.unsynced.recovered()
        newest = await asyncio.to_thread(self._newest)
        try:
            await self._fetch_undisturbed(path, progress)
        except CknixError:
            await asyncio.to_thread(self._tidy, recovered=True)
            raise
        self._fetched(await asyncio.to_thread(self._size_since, path, newest))

    async def hold(self, path: StorePath) -> None:
        await self._roots.added(path.basename, path)

    async def release(self, path: StorePath) -> None:
        await asyncio.to_thread(self._roots.remove, path.basename)

    async def release_all(self) -> None:
        """Undo what a process held that ended without, and delete what its fetches left half-way.

        What a power cut has damaged is looked for from then on.
        """

        def release() -> None:
            for name in self._roots.list():
                self._roots.remove(name)

        await asyncio.to_thread(release)
        await asyncio.to_thread(self._tidy, recovered=False)
        # Nobody need wait for it before there is something to be fetched or mounted.
        self._nix.unsynced.begin()

    async def _fetch_undisturbed(self, path: StorePath, progress: OnProgress) -> None:
        """Begin again when a garbage collection took a part of it."""
        for _ in range(TRIES):
            try:
                return await self._fetch(path, await self._endpoints(), progress)
            except (PathCollected, PathNotValid) as error:
                _log.info("a garbage collection disturbed the fetch of %s: %s", path, error)
        raise PathCollected(path)

    async def _fetch(self, path: StorePath, caches: Sequence[CacheEndpoint], progress: OnProgress) -> None:
        await self._nix.substitute(path, caches, progress=progress)
        # One at a time: what another has brought back meanwhile may be in use and must not be repaired once more.
        async with self._repairing:
            if gone := await asyncio.to_thread(missing, self._nix.store, path):
                _log.warning("%d registered paths of %s are not on disk: %s", len(gone), path, _some(gone))
                await self._nix.repair(gone, caches, progress=progress)

    def _newest(self) -> int | None:
        """None when that cannot be told now, which is no reason not to fetch."""
        with suppress(CknixError):
            return database.newest(self._nix.store)
        return None

    def _size_since(self, path: StorePath, newest: int | None) -> int:
        with suppress(CknixError):
            return 0 if newest is None else database.size_since(self._nix.store, path, newest)
        return 0

    def _tidy(self, *, recovered: bool) -> None:
        """Give back the space of fetches that were interrupted; what cannot be now can be after the next one."""
        try:
            if not recovered:
                self._nix.unsynced.recover()
            leftovers.clear(self._nix.store)
        except (CknixError, OSError) as error:
            _log.warning("what interrupted fetches left in %s was not deleted: %s", self._nix.store.physical, error)

    def _is_valid(self, path: StorePath) -> bool:
        store = self._nix.store
        if not has_root(store, path.basename):
            return is_whole(store, path)
        try:
            return database.is_valid(store, path)
        except DatabaseDamaged:
            return False


def _some(paths: Sequence[StorePath]) -> str:
    more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
    return ", ".join(map(str, paths[:_MAX_NAMED])) + more
