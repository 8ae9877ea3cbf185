"""Keeping room on a disk: when little is free, garbage is collected until enough is.

A closure whose last volume has gone is garbage at once, and stays for the next pod until its space is needed; so does
what a controller has built and no Expression holds any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from cknix_csi.api.errors import CknixError
from cknix_csi.api.quantity import readable_size
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.api.watermarks import LOW, Watermarks
from cknix_csi.nix.collection import Collected, Space
from cknix_csi.nix.wants import WantedClosures, Wants
from cknix_csi.volumes.ledger import ClosureUse

log = logging.getLogger(__name__)

_CHECK_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 1800.0
_MOST_NAMED = 3


class CollectableStore(Protocol):
    """A store and the disk that it is on; satisfied by ``nix.collection.Collector``."""

    async def space(self) -> Space:
        """How much of the disk is free.  Raises OSError."""

    async def collect(self, want: int, order: Sequence[StorePath], wants: Callable[[], Wants]) -> Collected:
        """Delete garbage until *want* bytes are free, in the order of *order*, but for what *wants* tells.

        Raises CknixError, OSError.
        """


class Uses(Protocol):
    """Which closure was used when; satisfied by ``volumes.ledger.Ledger``."""

    def closures_by_last_use(self) -> Sequence[ClosureUse]:
        """The least recently used first."""


class Volumes(Protocol):
    """What is mounted, and what is kept ready for pods to come; satisfied by ``volumes.volumes.Volumes``."""

    async def hold_mounted(self) -> None:
        """Let nothing that is mounted count as garbage.  Raises CknixError, OSError."""

    async def forget_unused(self) -> Sequence[str]:
        """Let go of closures that no pod uses, so that they become garbage; returns their ids.  Raises CknixError."""

    async def emptied(self) -> None:
        """Return when what was thrown away is deleted, or after a while."""


class Housekeeping:
    """Watches one disk; :meth:`run` is a task beside the daemon, and all else is immediate."""

    def __init__(
        self,
        *,
        store: CollectableStore,
        watermarks: Watermarks,
        uses: Uses | None = None,
        volumes: Volumes | None = None,
        released: Callable[[], int] = lambda: 0,
        check_seconds: float = _CHECK_SECONDS,
        longest_pause: float = _LONGEST_PAUSE_SECONDS,
    ) -> None:
        """*uses* and *volumes*: None for a store of which there are no volumes.

        It looks every *check_seconds*; between collections that free nothing it waits longer and longer, up to
        *longest_pause* seconds, but no longer than until something becomes garbage: *released* says how many GC roots
        have been removed so far.
        """
        self._store = store
        self._uses = uses
        self._volumes = volumes
        self._watermarks = watermarks
        self._check_seconds = check_seconds
        self._released = released
        self._longest_pause = longest_pause
        self._full = asyncio.Event()
        self._needed: int | None = 0
        """Bytes that what has failed since the last look needs; None when nobody can tell."""
        self._wanted = WantedClosures(_now)
        self._released_before = 0
        self._spared: frozenset[StorePath] = frozenset()
        self._said = ""
        """Why the last collection was fruitless, until that is over."""
        self._short_of = 0
        """Bytes that it was to make free."""
        self._fruitless = 0
        self._not_before = 0.0
        self._rest_until = 0.0

    def out_of_space(
        self, closure: StorePath | None = None, *, needed: int | None = None, began: float | None = None
    ) -> None:
        """Something has failed for want of space: look at once, and make more room than there is then.

        *closure* is what there was no room for, which the next try is to find still there, and *began* the time at
        which its fetch began (see :class:`WantedClosures`); *needed*: bytes that must be free, None if nobody can tell.
        """
        if not self._full.is_set():
            self._needed = needed
        elif self._needed is not None:
            self._needed = None if needed is None else max(self._needed, needed)
        self._full.set()
        if closure is not None:
            self._wanted.missed(closure, began)

    def had(self, closure: StorePath) -> None:
        """There is no want of space for *closure* any more."""
        self._wanted.had(closure)

    async def run(self) -> None:
        """Keep room until cancelled; failures are logged."""
        while True:
            try:
                await self._look()
            except (CknixError, OSError) as error:
                self._pause("", f"collecting garbage failed: {error}")
            await self._wait()

    async def _wait(self) -> None:
        rest = self._rest_until - _now()
        if rest > 0:  # however often something fails for want of space
            await asyncio.sleep(rest)
            return
        try:
            async with asyncio.timeout(self._check_seconds):
                await self._full.wait()
        except TimeoutError:
            pass

    async def _look(self) -> None:
        failed, needed = self._full.is_set(), self._needed
        self._full.clear()
        if self._volumes is not None:
            await self._volumes.emptied()  # a failure's own undoing gives space back
        space = await self._store.space()
        low, high = self._watermarks.low.of(space.total), self._watermarks.high.of(space.total)
        want = max(low, high)
        if low == 0:
            return
        why = f"{readable_size(space.free)} of {readable_size(space.total)} are free ({LOW} is {self._watermarks.low})"
        if failed and needed is not None:
            failed = space.free < needed < space.total  # for more than there is nothing need go
            want = max(want, needed) if failed else want
        elif failed:
            # What is free now has not been enough, whatever the marks say; it may be inodes that are wanted, too.
            want = max(want, 2 * space.free)
        if failed:
            why += " and were not enough"
        elif space.free >= low:
            self._fruitless, self._not_before = 0, 0.0
            if space.free >= self._short_of:
                self._said = ""
            return
        if failed or _now() >= self._not_before or self._more_is_garbage():
            try:
                await self._collect(why, want)
            finally:
                self._rest_until = _now() + self._check_seconds

    def _more_is_garbage(self) -> bool:
        """True when there may be garbage that the last collection did not find."""
        return self._released() != self._released_before or bool(self._spared - self._wanted.now().closures)

    async def _collect(self, found: str, want: int) -> None:
        log.info("%s: collecting garbage until %s are free", found, readable_size(want))
        if self._volumes is not None:
            await self._volumes.hold_mounted()
        self._released_before = self._released()
        collected = await self._store.collect(want, self._order(), self._wanted.now)
        paths, closures = collected.paths, len(collected.closures)
        space = await self._store.space()
        if space.free < want and self._volumes is not None and await self._volumes.forget_unused():
            self._released_before = self._released()
            collected = await self._store.collect(want, self._order(), self._wanted.now)
            paths, closures = paths + collected.paths, closures + len(collected.closures)
            await self._volumes.emptied()
            space = await self._store.space()
        self._spared = frozenset(collected.spared)
        if not paths and space.free < want:
            self._short_of = want
            self._pause(found, _why_nothing(collected.spared))
            return
        self._fruitless, self._not_before, self._said = 0, 0.0, ""
        self._full.clear()  # what has failed meanwhile has not seen this room
        log.info("collected %d paths of %d closures; %s are free now", paths, closures, readable_size(space.free))

    def _order(self) -> list[StorePath]:
        order = []
        for use in self._uses.closures_by_last_use() if self._uses is not None else ():
            try:
                order.append(StorePath.from_basename(use.closure_id))
            except InvalidStorePath:
                continue
        return order

    def _pause(self, found: str, why: str) -> None:
        """Try again later, each time twice as much later; say so the first time, and when the reason is another."""
        self._fruitless += 1
        pause = min(self._check_seconds * 2 ** min(self._fruitless, 32), self._longest_pause)
        self._not_before = _now() + pause
        level = logging.WARNING if why != self._said else logging.DEBUG
        self._said = why
        log.log(level, "%s%s; trying again, at first in %.0f s", found, why, pause)


def _why_nothing(spared: Sequence[StorePath]) -> str:
    if not spared:
        return (
            " and there is no garbage to collect: all store paths are in use, or others fill the disk; free space there"
        )
    more = f" and {len(spared) - _MOST_NAMED} more" if len(spared) > _MOST_NAMED else ""
    names = ", ".join(closure.basename for closure in spared[:_MOST_NAMED])
    return (
        f" and there is no garbage to collect but what volumes wait for that there is no room for ({names}{more}): "
        "the disk is too small for them beside what is in use; free space there, or take such a pod to another node"
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
