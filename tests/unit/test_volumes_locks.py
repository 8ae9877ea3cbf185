"""Steps that belong together end together."""

from __future__ import annotations

import asyncio

import pytest

from cknix_csi.volumes.locks import together


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
