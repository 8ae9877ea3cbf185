"""Work takes turns: in its order, never more than allowed, and long work gives way to what waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cknix_csi.csi.turns import Turns

SHORT = 0.02
"""Seconds after which work counts as long."""


class Work:
    """Pieces of work that begin in their order and end when they are told to."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._ends: dict[int, asyncio.Event] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.begun: list[int] = []
        self.most = 0

    def begin(self, *numbers: int) -> None:
        for number in numbers:
            self._ends[number] = asyncio.Event()
            self._tasks[number] = asyncio.create_task(self._run(number))

    async def end(self, *numbers: int) -> None:
        for number in numbers:
            self._ends[number].set()
            await self._tasks.pop(number)

    async def cancel(self, number: int) -> None:
        self._tasks[number].cancel()
        await asyncio.wait({self._tasks.pop(number)})

    async def have_begun(self, *numbers: int) -> None:
        """Wait until exactly these have begun."""
        async with asyncio.timeout(5):
            while self.begun != list(numbers):
                assert len(self.begun) <= len(numbers), self.begun
                await asyncio.sleep(0.001)

    async def _run(self, number: int) -> None:
        async with self._turns.taken():
            self.begun.append(number)
            self.most = max(self.most, self._turns.running)
            await self._ends[number].wait()


@asynccontextmanager
async def working(at_once: int, beside: int, patience: float = SHORT) -> AsyncIterator[Work]:
    work = Work(Turns(at_once, beside=beside, patience=patience))
    yield work
    await work.end(*list(work._tasks))
    assert work._turns.running == 0
    assert work.most <= at_once + beside


async def test_short_work_takes_its_turns_in_order() -> None:
    async with working(2, beside=1, patience=60) as work:
        work.begin(1, 2, 3, 4)
        await work.have_begun(1, 2)
        await work.end(2)
        await work.have_begun(1, 2, 3)
        await work.end(1)
        await work.have_begun(1, 2, 3, 4)


async def test_what_takes_long_gives_its_turn_to_the_next() -> None:
    async with working(2, beside=2) as work:
        work.begin(1, 2, 3, 4, 5)
        await work.have_begun(1, 2, 3, 4)  # 1 and 2 go on beside; 3 and 4 are long as well by the time 5 would want one
        await asyncio.sleep(3 * SHORT)
        await work.have_begun(1, 2, 3, 4)
        await work.end(1)  # makes room beside for 3, whose turn 5 gets
        await work.have_begun(1, 2, 3, 4, 5)


async def test_a_turn_that_was_given_away_is_given_once() -> None:
    async with working(1, beside=1) as work:
        work.begin(1, 2, 3)
        await work.have_begun(1, 2)
        await asyncio.sleep(3 * SHORT)
        await work.end(2)  # long, and with a turn still: there was no room beside
        await work.have_begun(1, 2, 3)
        work.begin(4)
        await asyncio.sleep(3 * SHORT)
        await work.have_begun(1, 2, 3)
        await work.end(1)
        await work.have_begun(1, 2, 3, 4)


@pytest.mark.parametrize("long", [False, True])
async def test_work_that_is_cancelled_gives_back_what_it_had(long: bool) -> None:
    async with working(1, beside=1, patience=SHORT if long else 60) as work:
        work.begin(1, 2)
        await work.have_begun(1, *([2] if long else []))
        await work.cancel(1)
        await work.have_begun(1, 2)
        await work.end(2)
        work.begin(3)
        await work.have_begun(1, 2, 3)


async def test_who_gives_up_waiting_takes_no_turn() -> None:
    async with working(1, beside=0) as work:
        work.begin(1, 2, 3)
        await work.have_begun(1)
        await work.cancel(2)
        await work.end(1)
        await work.have_begun(1, 3)
