"""Steps end whatever happens to who waits for them."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cknix_csi.finishing import finish, in_thread, together


class Step:
    """Waits until it is let go, then fails if it is to."""

    def __init__(self, *, fails: bool = False) -> None:
        self._fails = fails
        self.go = asyncio.Event()
        self.ended = False

    async def __call__(self) -> None:
        await self.go.wait()
        self.ended = True
        if self._fails:
            raise ValueError("it fails")


async def rest() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_both_run_at_once_and_both_have_ended_when_it_returns() -> None:
    one, two = Step(), Step()
    both = asyncio.create_task(together(one(), two()))
    two.go.set()
    await rest()
    assert two.ended
    assert not both.done()
    one.go.set()
    await both
    assert one.ended


async def test_a_failure_waits_for_the_other() -> None:
    one, two = Step(fails=True), Step()
    both = asyncio.create_task(together(one(), two()))
    one.go.set()
    await rest()
    assert not both.done()
    two.go.set()
    with pytest.raises(ValueError, match="it fails"):
        await both
    assert two.ended


async def test_a_cancellation_waits_for_both() -> None:
    one, two = Step(), Step()
    both = asyncio.create_task(together(one(), two()))
    await rest()
    both.cancel()
    await rest()
    assert not both.done()
    one.go.set()
    two.go.set()
    with pytest.raises(asyncio.CancelledError):
        await both
    assert (one.ended, two.ended) == (True, True)


async def test_work_in_a_thread_has_ended_when_its_cancellation_is_told() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(10)
        ended.set()

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_step_that_can_end_early_is_told_of_each_cancellation() -> None:
    step = Step()
    told: list[str] = []
    task = asyncio.create_task(finish(step(), on_cancel=lambda: told.append("end")))
    for count in (1, 2):
        await rest()
        task.cancel()
        await rest()
        assert len(told) == count
    assert not task.done()
    step.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert step.ended
