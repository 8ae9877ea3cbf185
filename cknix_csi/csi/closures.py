"""A closure that a volume needs is on this node, or is being fetched, once, whoever asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cknix_csi.api.errors import InProgress
from cknix_csi.api.progress import Progress, humanise
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.flights import Flights
from cknix_csi.csi.lifecycle import shutting_down
from cknix_csi.volumes.locks import finish

log = logging.getLogger(__name__)


class Fetcher(Protocol):
    """The node's store, as far as it is filled from here."""

    async def is_valid(self, path: StorePath) -> bool:
        """True when *path* and its closure are in the store.  Spawns no process."""

    async def fetch(self, path: StorePath, progress: Callable[[Progress], None]) -> None:
        """Bring *path* with its closure into the store.  Raises ``CknixError``."""

    async def hold(self, path: StorePath) -> None:
        """Keep garbage collection from *path* while it is fetched; it need not be there yet."""

    async def release(self, path: StorePath) -> None:
        """Undo :meth:`hold`."""

    async def release_all(self) -> None:
        """Undo every :meth:`hold` of a process that ended without."""


@dataclass(slots=True)
class _Fetch:
    started: float
    """Of the event loop's clock, in seconds."""
    progress: Progress = field(default_factory=Progress)


class ClosureService:
    """Fetches closures; a fetch outlives the RPC that asked for it, and all that ask for the same path share it."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._flights: Flights[StorePath] = Flights()
        self._fetches: dict[StorePath, _Fetch] = {}
        self._closing = False

    async def start(self) -> None:
        """Drop what an earlier process held.  To be called before the first :meth:`ensure`."""
        await self._fetcher.release_all()

    async def ensure(self, path: StorePath, *, budget: float) -> None:
        """Return when *path* is in the store, at once if it is already.

        Raises :class:`InProgress` after *budget* seconds, while the fetch goes on; and whatever the fetch raises, to
        all that wait for it.  A failure is not remembered: the next call tries again.
        """
        if self._closing:
            raise shutting_down(f"fetching {path}")
        flight = self._flights.join(path, lambda: self._bring(path))
        done, _ = await asyncio.wait({flight}, timeout=max(budget, 0))
        if not done:
            raise InProgress(f"still fetching {path}: {self._words(path)}; kubelet will retry")
        if flight.cancelled():
            raise shutting_down(f"fetching {path}")
        flight.result()

    async def close(self) -> None:
        """Stop all fetches and wait until they have ended."""
        self._closing = True
        await self._flights.close()

    async def _bring(self, path: StorePath) -> None:
        if await self._fetcher.is_valid(path):
            return
        clock = asyncio.get_running_loop().time
        fetch = self._fetches[path] = _Fetch(clock())

        def report(progress: Progress) -> None:
            fetch.progress = progress

        log.info("fetching %s", path)
        try:
            await finish(self._fetcher.hold(path))
            await self._fetcher.fetch(path, report)
        except Exception as error:
            # Said here because nobody may be waiting any more.
            log.warning("fetching %s failed after %s: %s", path, humanise(clock() - fetch.started), error)
            raise
        finally:
            del self._fetches[path]
            await finish(self._fetcher.release(path))
        log.info("fetched %s in %.1fs", path, clock() - fetch.started)

    def _words(self, path: StorePath) -> str:
        fetch = self._fetches.get(path)
        if fetch is None:
            return "starting"
        return f"{fetch.progress}, {humanise(asyncio.get_running_loop().time() - fetch.started)}"
