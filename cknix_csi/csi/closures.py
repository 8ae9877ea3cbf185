"""A closure that a volume needs is on this node, or is being fetched, once, whoever asks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

from cknix_csi import logs
from cknix_csi.api.errors import InProgress, OutOfSpace
from cknix_csi.api.progress import Progress, humanise
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.flights import Flights
from cknix_csi.csi.lifecycle import shutting_down
from cknix_csi.csi.room import NO_MATTER, Room
from cknix_csi.csi.turns import Turns
from cknix_csi.csi.waiting import OnWait, untold
from cknix_csi.finishing import finish
from cknix_csi.repeats import Repeats
from cknix_csi.volumes.failures import explained

log = logging.getLogger(__name__)

AT_ONCE = 8
"""Fetches that take turns; more wait in the order they came.  Each is a Nix process of tens of megabytes."""
BESIDE = 4
"""Long ones that go on beside them, so that as many huge closures as there are turns hold up no small one for long."""
PATIENCE_SECONDS = 5.0
"""A fetch that runs for longer is a long one."""


class Fetcher(Protocol):
    """The node's store, as far as it is filled from here."""

    async def is_valid(self, path: StorePath) -> bool:
        """True when *path* and its closure are in the store.  Spawns no process."""

    async def fetch(self, path: StorePath, progress: Callable[[Progress], None]) -> None:
        """Bring *path* with its closure into the store, and what the store has lost of it.  Raises ``CknixError``."""

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
    waiting: bool = True
    """For its turn."""


class ClosureService:
    """Fetches closures; a fetch outlives the RPC that asked for it, and all that ask for the same path share it.

    One that nobody wants any more goes on, since its closure may be wanted again, until somebody waits for its turn.
    """

    def __init__(self, fetcher: Fetcher, room: Room = NO_MATTER, *, patience: float = PATIENCE_SECONDS) -> None:
        """*room* is told when a fetch finds the disk full, whoever waits for it.

        *patience*: seconds after which a fetch counts as long and gives its turn to the next one.
        """
        self._fetcher = fetcher
        self._room = room
        self._flights: Flights[StorePath] = Flights()
        self._fetches: dict[StorePath, _Fetch] = {}
        self._damaged: set[StorePath] = set()
        """Found damaged, and not being fetched since."""
        self._missing: WeakSet[asyncio.Task[None]] = WeakSet()
        """Flights that have found their path missing."""
        self._wanted: dict[StorePath, set[Hashable]] = {}
        """By whom what is not here yet is wanted, also between two calls."""
        self._failures = Repeats()
        self._turns = Turns(AT_ONCE, beside=BESIDE, patience=patience)
        self._closing = False

    async def start(self) -> None:
        """Drop what an earlier process held.  To be called before the first :meth:`ensure`."""
        await self._fetcher.release_all()

    def count(self) -> tuple[int, int]:
        """How many fetches run, and how many wait for their turn."""
        waiting = sum(fetch.waiting for fetch in self._fetches.values())
        return len(self._fetches) - waiting, waiting

    async def ensure(
        self,
        path: StorePath,
        *,
        budget: float,
        waiting: OnWait = untold,
        missing: Callable[[], None] = lambda: None,
        who: Hashable | None = None,
    ) -> None:
        """Return when *path* is in the store, at once if it is already; *waiting* hears of the fetch.

        *missing* is called before this ends in any way, when the path was not there and had to be fetched.  *who* goes
        on wanting the path when the time is up, until :meth:`unwanted`; without it, it is wanted in this call only.
        Raises :class:`InProgress` after *budget* seconds, while the fetch goes on; and whatever the fetch raises, to
        all that wait for it.  A failure is not remembered: the next call tries again.
        """
        wanted_by = object() if who is None else who
        clock = asyncio.get_running_loop().time
        deadline = clock() + budget
        while True:
            if self._closing:
                raise shutting_down(f"fetching {path}")
            self._wanted.setdefault(path, set()).add(wanted_by)
            flight = self._flights.join(path, lambda: self._bring(path))
            waiting(Situation.FETCHING, lambda: self._words(path))
            try:
                done, _ = await asyncio.wait({flight}, timeout=max(deadline - clock(), 0))
            finally:
                if flight in self._missing:
                    missing()
                if who is None or flight.done():
                    self._want_no_more(path, wanted_by)
            if not done:
                raise InProgress(f"{self._words(path)}; kubelet will retry", Situation.FETCHING)
            if not flight.cancelled():
                flight.result()
                return
            # It was making way, as nobody had wanted it: begin anew.

    def unwanted(self, who: Hashable) -> None:
        """*who* wants nothing any more."""
        for path in [path for path, wanted_by in self._wanted.items() if who in wanted_by]:
            self._want_no_more(path, who)
        self._make_way()

    async def restore(self, path: StorePath, *, budget: float, waiting: OnWait = untold) -> None:
        """As :meth:`ensure`, for a *path* that counts as valid but has been found damaged: it is fetched in any case.

        One fetch, begun after the damage was found, serves all that have found it.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + budget
        self._damaged.add(path)
        while path in self._damaged:  # else the one that is joined may have begun before
            await self.ensure(path, budget=deadline - clock(), waiting=waiting)

    async def close(self) -> None:
        """Stop all fetches and wait until they have ended."""
        self._closing = True
        await self._flights.close()

    def _want_no_more(self, path: StorePath, who: Hashable) -> None:
        wanted_by = self._wanted.get(path, set())
        wanted_by.discard(who)
        if not wanted_by:
            self._wanted.pop(path, None)

    def _make_way(self) -> None:
        """End fetches that nobody wants, as many as wait for their turn, and those that wait themselves."""
        idle = [path for path in self._fetches if path not in self._wanted]
        queue = [path for path, fetch in self._fetches.items() if fetch.waiting]
        needed = sum(path in self._wanted for path in queue)
        running = [path for path in idle if path not in queue]
        for path in [*(path for path in idle if path in queue), *running[:needed]]:
            log.info("fetching %s is given up, since nobody wants it any more and others wait", path)
            self._flights.end(path)

    async def _bring(self, path: StorePath) -> None:
        # It is for whoever needs the path, not for the volume that asked first.
        with logs.about({"closure": path.basename}):
            if path in self._damaged:
                self._damaged.discard(path)
            elif await self._fetcher.is_valid(path):
                return
            await self._fetch(path)

    async def _fetch(self, path: StorePath) -> None:
        clock = asyncio.get_running_loop().time
        fetch = self._fetches[path] = _Fetch(clock())
        if (flight := asyncio.current_task()) is not None:
            self._missing.add(flight)
        began = time.time()
        if self._turns.are_taken:
            self._make_way()

        def report(progress: Progress) -> None:
            fetch.progress = progress

        try:
            async with self._turns.taken():
                fetch.waiting = False
                log.log(logging.DEBUG if self._failures.fails(path) else logging.INFO, "fetching %s", path)
                with explained(f"take the GC root of {path}"):
                    await finish(self._fetcher.hold(path))
                await self._fetcher.fetch(path, report)
        except Exception as error:
            if isinstance(error, OutOfSpace):
                self._room.out_of_space(path, began=began)
            # Said here because nobody may be waiting any more.
            self._failures.idle()
            level = logging.WARNING if self._failures.failed(path, str(error)).aloud else logging.DEBUG
            log.log(level, "fetching %s failed after %s: %s", path, humanise(clock() - fetch.started), error)
            raise
        finally:
            del self._fetches[path]
            await self._release(path)
        self._failures.over(path)
        log.info("fetched %s in %.1fs", path, clock() - fetch.started)

    async def _release(self, path: StorePath) -> None:
        try:
            await finish(self._fetcher.release(path))
        except OSError as error:
            # The path is there all the same; the next start of the daemon releases it.
            log.warning("the GC root of the fetch of %s could not be removed: %s", path, error)

    def _words(self, path: StorePath) -> str:
        fetch = self._fetches.get(path)
        if fetch is None:
            far = "starting"
        elif fetch.waiting:
            far = f"waiting for one of {self._turns.running} other fetches to end"
        else:
            far = f"{fetch.progress}, {humanise(asyncio.get_running_loop().time() - fetch.started)}"
        return f"still fetching {path}: {far}"
