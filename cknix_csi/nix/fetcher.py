"""Fills a node's store from binary caches; satisfies ``csi.closures.Fetcher``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.nix import Nix, OnProgress
from cknix_csi.nix.substituters import CacheEndpoint


class StoreFetcher:
    """Fetches by signature only, from the caches that *endpoints* names at that moment."""

    def __init__(
        self, nix: Nix, endpoints: Callable[[], Awaitable[Sequence[CacheEndpoint]]], owner: str = "fetches"
    ) -> None:
        """*owner* is the directory of GC roots that this object alone adds to and removes from."""
        self._nix = nix
        self._endpoints = endpoints
        self._roots = GcRoots(nix.store, owner)

    async def is_valid(self, path: StorePath) -> bool:
        return await asyncio.to_thread(database.is_valid, self._nix.store, path)

    async def fetch(self, path: StorePath, progress: OnProgress) -> None:
        await self._nix.substitute(path, await self._endpoints(), progress=progress)

    async def hold(self, path: StorePath) -> None:
        await asyncio.to_thread(self._roots.add, path.basename, path)

    async def release(self, path: StorePath) -> None:
        await asyncio.to_thread(self._roots.remove, path.basename)

    async def release_all(self) -> None:
        def release() -> None:
            for name in self._roots.list():
                self._roots.remove(name)

        await asyncio.to_thread(release)
