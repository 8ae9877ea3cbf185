"""Closures are fetched once, whoever asks, and a fetch outlives who asked."""

import asyncio

import pytest

from cknix_csi.api.errors import CacheUnavailable, CknixError, Code, InProgress
from cknix_csi.csi.closures import ClosureService
from tests.node.fakes import HELLO, OTHER, FakeFetcher


async def test_a_path_that_is_there_is_not_fetched() -> None:
    fetcher = FakeFetcher(HELLO)
    await ClosureService(fetcher).ensure(HELLO, budget=10)
    assert fetcher.fetched == []


async def test_a_hundred_waiters_share_one_fetch() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    waiters = [asyncio.create_task(closures.ensure(HELLO, budget=10)) for _ in range(100)]
    await fetcher.started.wait()
    fetcher.open.set()
    await asyncio.gather(*waiters)
    assert fetcher.fetched == [HELLO]


async def test_different_paths_are_fetched_side_by_side() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(closures.ensure(HELLO, budget=10))
        tasks.create_task(closures.ensure(OTHER, budget=10))
        async with asyncio.timeout(10):
            while set(fetcher.fetched) != {HELLO, OTHER}:
                await asyncio.sleep(0)
        fetcher.open.set()


async def test_the_path_is_rooted_while_it_is_fetched_and_no_longer() -> None:
    fetcher = FakeFetcher()
    await ClosureService(fetcher).ensure(HELLO, budget=10)
    assert fetcher.held_while_fetching == [True]
    assert fetcher.held == set()


async def test_when_the_budget_ends_the_fetch_goes_on_and_the_retry_joins_it() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    with pytest.raises(InProgress) as raised:
        await closures.ensure(HELLO, budget=0.05)
    assert raised.value.message == f"still fetching {HELLO}: 3 of 17 (python3-3.12), 0s; kubelet will retry"
    retry = asyncio.create_task(closures.ensure(HELLO, budget=10))
    fetcher.open.set()
    await retry
    assert fetcher.fetched == [HELLO]


async def test_a_waiter_that_is_cancelled_does_not_end_the_fetch() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    waiter = asyncio.create_task(closures.ensure(HELLO, budget=10))
    await fetcher.started.wait()
    waiter.cancel()
    await asyncio.wait({waiter})
    fetcher.open.set()
    await closures.ensure(HELLO, budget=10)
    assert fetcher.fetched == [HELLO]
    assert not fetcher.cancelled.is_set()


async def test_a_failure_reaches_all_waiters_and_is_not_remembered() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    fetcher.failure = CacheUnavailable("no cache answers")
    closures = ClosureService(fetcher)
    waiters = [asyncio.create_task(closures.ensure(HELLO, budget=10)) for _ in range(3)]
    await fetcher.started.wait()
    fetcher.open.set()
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["no cache answers"] * 3
    assert fetcher.held == set()

    fetcher.failure = None
    await closures.ensure(HELLO, budget=10)
    assert fetcher.fetched == [HELLO, HELLO]


async def test_closing_ends_fetches_and_tells_their_waiters() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    waiter = asyncio.create_task(closures.ensure(HELLO, budget=10))
    await fetcher.started.wait()
    await closures.close()
    assert fetcher.cancelled.is_set()
    assert fetcher.held == set()
    for late in (waiter, closures.ensure(HELLO, budget=10)):
        with pytest.raises(CknixError, match="shutting down") as raised:
            await late
        assert raised.value.code is Code.UNAVAILABLE


async def test_what_a_dead_process_held_is_let_go_at_start() -> None:
    fetcher = FakeFetcher()
    fetcher.held = {HELLO}
    await ClosureService(fetcher).start()
    assert fetcher.held == set()
