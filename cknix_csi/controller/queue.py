"""The build queue: so many at once, and nobody's hundred Expressions stand before everybody else's one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class _Waiter:
    group: str
    moved: Callable[[int], None]
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    told: int | None = None


class BuildQueue:
    """At most *limit* holders of a slot.

    The next one comes from the group (a namespace) with the fewest slots, the longest waiting first.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a build queue needs at least one slot, not {limit}")
        self._limit = limit
        self._holding: Counter[str] = Counter()
        self._waiters: list[_Waiter] = []

    @asynccontextmanager
    async def slot(self, group: str, moved: Callable[[int], None]) -> AsyncIterator[None]:
        """Hold a slot during the block.

        While it waits, *moved* is told about how many are ahead: exactly below ten, then rounded down to one digit, so
        that a long queue does not make everybody in it write their status at every step.
        """
        waiter = _Waiter(group, moved)
        self._waiters.append(waiter)
        try:
            self._advance()
            await waiter.turn
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                # The turn came, and the cancellation with it.
                self._release(group)
            self._advance()
            raise
        try:
            yield
        finally:
            self._release(group)
            self._advance()

    def _release(self, group: str) -> None:
        self._holding[group] -= 1
        if not self._holding[group]:
            del self._holding[group]

    def _advance(self) -> None:
        while self._waiters and self._holding.total() < self._limit:
            waiter = in_order(self._waiters, self._holding)[0]
            self._waiters.remove(waiter)
            self._holding[waiter.group] += 1
            if not waiter.turn.done():
                waiter.turn.set_result(None)
        for ahead, waiter in enumerate(in_order(self._waiters, self._holding)):
            if waiter.told != (about := rounded(ahead)):
                waiter.told = about
                waiter.moved(about)


def in_order(waiters: list[_Waiter], holding: Counter[str]) -> list[_Waiter]:
    """*waiters* (oldest first) in the order in which they would get slots if no slot came back."""
    before = Counter(holding)
    ranks: dict[_Waiter, int] = {}
    for waiter in waiters:
        ranks[waiter] = before[waiter.group]
        before[waiter.group] += 1
    return sorted(waiters, key=ranks.__getitem__)


def rounded(ahead: int) -> int:
    """*ahead* with one significant digit."""
    unit = int(10 ** (len(str(ahead)) - 1))
    return ahead // unit * unit
