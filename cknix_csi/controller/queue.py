"""The build queue: so many at once, and nobody's hundred Expressions stand before everybody else's one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Waiter:
    """Somebody in the queue; *told* is the place it was told last."""

    group: str
    moved: Callable[[int], None]
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    told: int | None = None


class BuildQueue:
    """At most *limit* holders of a slot.

    Groups (namespaces) take turns, and within a group it is first come, first served.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a build queue needs at least one slot, not {limit}")
        self._limit = limit
        self._held = 0
        self._waiters: list[Waiter] = []
        self._turns = 0
        self._last_turn: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._waiters)

    @property
    def served(self) -> int:
        """How many hold one."""
        return self._held

    @asynccontextmanager
    async def slot(self, group: str, moved: Callable[[int], None]) -> AsyncIterator[None]:
        """Hold a slot during the block.

        While it waits, *moved* is told about how many are ahead: exactly below ten, then rounded down to one digit, so
        that a long queue does not make everybody in it write their status at every step.
        """
        waiter = Waiter(group, moved)
        self._waiters.append(waiter)
        self._advance()
        try:
            await waiter.turn
            yield
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                # It has held a slot, or its turn came together with a cancellation.
                self._held -= 1
            self._advance()

    def _advance(self) -> None:
        while self._waiters and self._held < self._limit:
            waiter = in_order(self._waiters, self._last_turn)[0]
            self._waiters.remove(waiter)
            self._held += 1
            self._turns += 1
            self._last_turn[waiter.group] = self._turns
            if not waiter.turn.done():
                waiter.turn.set_result(None)
        if not self._waiters and not self._held:
            self._last_turn.clear()
        for ahead, waiter in enumerate(in_order(self._waiters, self._last_turn)):
            if waiter.told != (about := rounded(ahead)):
                waiter.told = about
                waiter.moved(about)


def in_order(waiters: Sequence[Waiter], last_turn: Mapping[str, int]) -> list[Waiter]:
    """*waiters* (oldest first) in the order of their turns: each group's first, then each group's second, …

    Within such a round the group comes first whose last turn is the longest ago.
    """
    before: Counter[str] = Counter()
    rounds = {}
    for waiter in waiters:
        rounds[waiter] = before[waiter.group]
        before[waiter.group] += 1
    return sorted(waiters, key=lambda waiter: (rounds[waiter], last_turn.get(waiter.group, 0)))


def rounded(ahead: int) -> int:
    """*ahead* with one significant digit."""
    unit = int(10 ** (len(str(ahead)) - 1))
    return ahead // unit * unit
