"""What volumes need of a store: roots, closures and databases, without a process being spawned."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from cknix_csi.api.closure import Closure
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database
from cknix_csi.nix.collector import outlast_collector
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.recovery import is_whole
from cknix_csi.nix.store import Store
from cknix_csi.nix.unsynced import Unsynced

_OWNER = "closures"


def has_root(store: Store, closure_id: str) -> bool:
    """True when a volume of this store holds the closure, so that it has a view or is about to get one."""
    return os.path.lexists(store.gcroots / _OWNER / closure_id)


class StoreClosures:
    """The closures of one store; satisfies ``volumes.Closures``."""

    def __init__(self, store: Store, owner: str = _OWNER, *, unsynced: Unsynced | None = None) -> None:
        """*owner* is the directory of GC roots that this object alone adds to and removes from.

        *unsynced*: what is asked before a path counts as valid; None where somebody else has done so.
        """
        self._store = store
        self._unsynced = unsynced
        # No mount outlives a power cut, and who needs a closure then takes its root again.
        self._roots = GcRoots(store, owner, durable=False)

    @property
    def store_dir(self) -> Path:
        return self._store.physical

    async def is_valid(self, path: StorePath) -> bool:
        """True when *path* is registered with its closure, and all of that is on disk."""
        if self._unsynced is not None:
            await self._unsynced.survived()
        return await asyncio.to_thread(is_whole, self._store, path)

    async def hold(self, closure_id: str, root: StorePath) -> None:
        """Let *root* be no garbage from now on, if it is there still.

        Raises OSError, and :class:`CollectionRuns` when that cannot be had while somebody's collection goes on.
        """
        known = await asyncio.to_thread(self._roots.has, closure_id, root)
        await self._roots.added(closure_id, root)
        if not known:
            await outlast_collector(self._store, root)

    @property
    def released(self) -> int:
        """How many closures have been let go of so far."""
        return self._roots.removed

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
            database.write_database(self._store, closure, target)

        await asyncio.to_thread(write)
