"""What volumes need of a store: roots, closures and databases, without a process being spawned."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cknix_csi.api.closure import Closure
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.store import Store


class StoreClosures:
    """The closures of one store; satisfies ``volumes.Closures``."""

    def __init__(self, store: Store, owner: str = "closures") -> None:
        """*owner* is the directory of GC roots that this object alone adds to and removes from."""
        self._store = store
        self._roots = GcRoots(store, owner)

    @property
    def store_dir(self) -> Path:
        return self._store.physical

    async def is_valid(self, path: StorePath) -> bool:
        return await asyncio.to_thread(database.is_valid, self._store, path)

    async def hold(self, closure_id: str, root: StorePath) -> None:
        await asyncio.to_thread(self._roots.add, closure_id, root)

    async def release(self, closure_id: str) -> None:
        await asyncio.to_thread(self._roots.remove, closure_id)

    async def held(self) -> dict[str, StorePath]:
        return await asyncio.to_thread(self._roots.list)

    async def query(self, root: StorePath) -> Closure:
        return await asyncio.to_thread(database.query_closure, self._store, root)

    async def write_state(self, closure: Closure, directory: Path) -> None:
        """Write the database of *closure* below *directory* as ``nix/var/nix/db``."""

        def write() -> None:
            target = directory / "nix/var/nix/db"
            target.mkdir(parents=True, exist_ok=True)
            database.write_database(closure, target)

        await asyncio.to_thread(write)
