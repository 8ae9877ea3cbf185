"""The build queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.controller.queue import BuildQueue, rounded


def ignore(ahead: int) -> None:
    pass


class Customer:
    """Somebody who takes a slot and gives it back when told."""

    def __init__(self, queue: BuildQueue, group: str) -> None:
        self.told: list[int] = []
        self.has_it = False
        self._done = asyncio.Event()
        self.task = asyncio.create_task(self._come(queue, group))

    async def _come(self, queue: BuildQueue, group: str) -> None:
        async with queue.slot(group, self.told.append):
            self.has_it = True
            await self._done.wait()
        self.has_it = False

    async def leave(self) -> None:
        self._done.set()
        await self.task


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def customers(queue: BuildQueue, groups: str) -> list[Customer]:
    found = []
    for group in groups:
        found.append(Customer(queue, group))
        await settle()
    return found


async def finish(*found: Customer) -> None:
    for customer in found:
        customer.task.cancel()
    await asyncio.wait({customer.task for customer in found})


async def test_no_more_than_the_limit_hold_a_slot_and_the_others_know_their_place() -> None:
    a, b, c, d = found = await customers(BuildQueue(2), "nnnn")
    assert [customer.has_it for customer in found] == [True, True, False, False]
    assert (c.told, d.told) == ([0], [1])
    await a.leave()
    await settle()
    assert c.has_it
    assert d.told == [1, 0]
    await finish(b, c, d)


async def test_a_namespace_with_many_does_not_stand_before_one_with_few() -> None:
    found = await customers(BuildQueue(1), "mmmmf")
    assert [customer.told[-1] for customer in found[1:]] == [1, 2, 3, 0]
    await found[0].leave()
    await settle()
    assert [customer.has_it for customer in found] == [False, False, False, False, True]
    await finish(*found[1:])


async def test_two_namespaces_take_turns() -> None:
    found = await customers(BuildQueue(1), "mmmff")
    order = []
    for _ in found:
        (holder,) = [customer for customer in found if customer.has_it]
        order.append(found.index(holder))
        await holder.leave()
        await settle()
    assert order == [0, 3, 1, 4, 2]


async def test_who_gives_up_waiting_leaves_no_gap() -> None:
    a, b, c = await customers(BuildQueue(1), "nnn")
    await finish(b)
    assert c.told[-1] == 0
    await a.leave()
    await settle()
    assert c.has_it
    await finish(c)


async def test_a_turn_that_comes_together_with_a_cancellation_is_passed_on() -> None:
    a, b, c = await customers(BuildQueue(1), "nnn")
    b.task.cancel()
    await a.leave()
    await settle()
    assert not b.has_it
    assert c.has_it
    await finish(b, c)


async def test_a_slot_comes_back_when_its_holder_fails() -> None:
    queue = BuildQueue(1)
    with pytest.raises(RuntimeError, match="broken"):
        async with queue.slot("n", ignore):
            raise RuntimeError("broken")
    async with asyncio.timeout(5), queue.slot("n", ignore):
        pass


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=20), st.integers(1, 4))
def test_the_limit_holds_whatever_happens(steps: list[tuple[str, int]], limit: int) -> None:
    async def run() -> None:
        queue = BuildQueue(limit)
        found: list[Customer] = []
        for group, action in steps:
            if action < 3 or not found:
                found.append(Customer(queue, group))
            elif action == 3:
                await finish(found.pop(0))
            elif found[0].has_it:
                await found.pop(0).leave()
            await settle()
            alive = [customer for customer in found if not customer.task.done()]
            holding = sum(customer.has_it for customer in alive)
            assert holding == min(limit, len(alive))
        if found:
            await finish(*found)
        async with AsyncExitStack() as stack, asyncio.timeout(5):
            for _ in range(limit):
                await stack.enter_async_context(queue.slot("x", ignore))

    asyncio.run(run())


@pytest.mark.parametrize(("ahead", "shown"), [(0, 0), (9, 9), (10, 10), (19, 10), (99, 90), (1234, 1000)])
def test_places_in_a_long_queue_are_rounded(ahead: int, shown: int) -> None:
    assert rounded(ahead) == shown


def test_a_queue_needs_a_slot() -> None:
    make: Callable[[int], BuildQueue] = BuildQueue
    with pytest.raises(ValueError, match="at least one"):
        make(0)
