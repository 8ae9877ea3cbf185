"""Who works at once, and who waits: in the order they came, and so that long work does not hold up all others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """*at_once* take turns; one that takes longer than *patience* seconds gives its turn away and goes on beside.

    That is how long and short work are told apart: what a fetch will cost is known to nobody before it runs.  At most
    *beside* go on so at any time, the oldest first, so no more than the sum of both numbers ever run.
    """

    def __init__(self, at_once: int, *, beside: int, patience: float) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._room = beside
        self._patience = patience
        self._long: deque[_Turn] = deque()
        """Those that take longer and still hold a turn, since there is no room beside."""
        self.running = 0

    @property
    def are_taken(self) -> bool:
        """True when who comes now has to wait."""
        return self._turns.locked()

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Wait for a turn, and hold it inside the block."""
        await self._turns.acquire()
        turn = _Turn()
        self.running += 1
        timer = asyncio.get_running_loop().call_later(self._patience, self._is_long, turn)
        try:
            yield
        finally:
            timer.cancel()
            self.running -= 1
            self._end(turn)

    def _is_long(self, turn: _Turn) -> None:
        self._long.append(turn)
        self._step_aside()

    def _end(self, turn: _Turn) -> None:
        if turn.beside:
            self._room += 1
            self._step_aside()
            return
        if turn in self._long:
            self._long.remove(turn)
        self._turns.release()

    def _step_aside(self) -> None:
        while self._room and self._long:
            self._long.popleft().beside = True
            self._room -= 1
            self._turns.release()


class _Turn:
    """Equal to itself only."""

    beside = False
