"""Keeping room on a disk: when little is free, garbage is collected until enough is.

A closure whose last volume has gone is garbage at once, and stays for the next pod until its space is needed; so does
what a controller has built and no Expression holds any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from cknix_csi.api.errors import CknixError
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.api.watermarks import LOW, Watermarks
from cknix_csi.nix.collection import Collected, Space
from cknix_csi.volumes.ledger import ClosureUse

log = logging.getLogger(__name__)

_CHECK_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 1800.0


class CollectableStore(Protocol):
    """A store and the disk that it is on; satisfied by ``nix.collection.Collector``."""

    async def space(self) -> Space:
        """How much of the disk is free.  Raises OSError."""

    async def collect(self, want: int, order: Sequence[StorePath]) -> Collected:
        """Delete garbage until *want* bytes are free, in the order of *order*.  Raises CknixError, OSError."""


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


class Housekeeping:
    """Watches one disk; :meth:`run` is a task beside the daemon, and all else is immediate."""

    def __init__(
        self,
        *,
        store: CollectableStore,
        watermarks: Watermarks,
        uses: Uses | None = None,
        volumes: Volumes | None = None,
        check_seconds: float = _CHECK_SECONDS,
        longest_pause: float = _LONGEST_PAUSE_SECONDS,
    ) -> None:
        """*uses* and *volumes*: None for a store of which there are no volumes.

        It looks every *check_seconds*; between collections that free nothing it waits longer and longer, up to
        *longest_pause* seconds.
        """
        self._store = store
        self._uses = uses
        self._volumes = volumes
        self._watermarks = watermarks
        self._check_seconds = check_seconds
        self._longest_pause = longest_pause
        self._full = asyncio.Event()
        self._fruitless = 0
        self._not_before = 0.0
        self._rest_until = 0.0

    def out_of_space(self) -> None:
        """Something has failed for want of space: look at once, and make more room than there is then."""
        self._full.set()

    async def run(self) -> None:
        """Keep room until cancelled; failures are logged."""
        while True:
            try:
                await self._look()
            except (CknixError, OSError) as error:
                self._pause(f"collecting garbage failed: {error}")
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
        failed = self._full.is_set()
        self._full.clear()
        space = await self._store.space()
        low, high = self._watermarks.low.of(space.total), self._watermarks.high.of(space.total)
        want = max(low, high)
        if low == 0:
            return
        why = f"{_readable(space.free)} of {_readable(space.total)} are free ({LOW} is {self._watermarks.low})"
        if failed:
            # What is free now has not been enough, whatever the marks say; it may be inodes that are wanted, too.
            want = max(want, 2 * space.free)
            why += " and were not enough"
        elif space.free >= low:
            self._fruitless, self._not_before = 0, 0.0
            return
        if failed or _now() >= self._not_before:
            try:
                await self._collect(why, want)
            finally:
                self._rest_until = _now() + self._check_seconds

    async def _collect(self, found: str, want: int) -> None:
        log.info("%s: collecting garbage until %s are free", found, _readable(want))
        if self._volumes is not None:
            await self._volumes.hold_mounted()
        collected = await self._store.collect(want, self._order())
        paths, closures = collected.paths, len(collected.closures)
        space = await self._store.space()
        if space.free < want and self._volumes is not None and await self._volumes.forget_unused():
            collected = await self._store.collect(want, self._order())
            paths, closures = paths + collected.paths, closures + len(collected.closures)
            space = await self._store.space()
        if not paths:
            self._pause(
                f"{found} and there is no garbage to collect: all store paths are in use, or others fill the disk; "
                "free space there"
            )
            return
        self._fruitless, self._not_before = 0, 0.0
        self._full.clear()  # what has failed meanwhile has not seen this room
        log.info("collected %d paths of %d closures; %s are free now", paths, closures, _readable(space.free))

    def _order(self) -> list[StorePath]:
        order = []
        for use in self._uses.closures_by_last_use() if self._uses is not None else ():
            try:
                order.append(StorePath.from_basename(use.closure_id))
            except InvalidStorePath:
                continue
        return order

    def _pause(self, why: str) -> None:
        """Try again later, each time twice as much later; say so the first time."""
        self._fruitless += 1
        pause = min(self._check_seconds * 2 ** min(self._fruitless, 32), self._longest_pause)
        self._not_before = _now() + pause
        if self._fruitless == 1:
            log.warning("%s; trying again, at first in %.0f s", why, pause)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _readable(size: int) -> str:
    """``3.4 GiB``."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
