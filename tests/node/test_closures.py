"""Closures are fetched once, whoever asks, and a fetch outlives who asked."""

import asyncio
import errno
import logging
from collections.abc import Callable

import pytest

from cknix_csi.api.errors import CacheUnavailable, CknixError, InProgress, OutOfSpace
from cknix_csi.api.progress import Progress
from cknix_csi.api.situations import Code
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.closures import AT_ONCE, ClosureService
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


async def test_more_than_a_few_fetches_take_turns_in_their_order() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    paths = [StorePath.parse(f"/nix/store/{'1' * 32}-p{number}") for number in range(3 * AT_ONCE)]
    waiters = [asyncio.create_task(closures.ensure(path, budget=10)) for path in paths]
    async with asyncio.timeout(10):
        while len(fetcher.fetched) < AT_ONCE:
            await asyncio.sleep(0)
    with pytest.raises(InProgress, match=f"waiting for one of {AT_ONCE} other fetches to end"):
        await closures.ensure(paths[-1], budget=0.05)
    assert fetcher.fetched == paths[:AT_ONCE]
    fetcher.open.set()
    await asyncio.gather(*waiters)
    assert fetcher.fetched == paths


async def test_as_many_long_fetches_as_there_are_turns_hold_up_no_short_one_for_long() -> None:
    class Slow(FakeFetcher):
        """Fetches of what is called huge end when the gate opens, all others at once."""

        async def fetch(self, path: StorePath, progress: Callable[[Progress], None]) -> None:
            self.fetched.append(path)
            if "huge" in path.basename:
                await self.open.wait()

    fetcher = Slow()
    fetcher.open.clear()
    closures = ClosureService(fetcher, patience=0.05)
    huge = [StorePath.parse(f"/nix/store/{'1' * 32}-huge{number}") for number in range(AT_ONCE)]
    small = [StorePath.parse(f"/nix/store/{'1' * 32}-small{number}") for number in range(3 * AT_ONCE)]
    held_up = [asyncio.create_task(closures.ensure(path, budget=10)) for path in huge]
    async with asyncio.timeout(5):
        await asyncio.gather(*(closures.ensure(path, budget=10) for path in small))
    assert fetcher.fetched == [*huge, *small]
    assert not any(task.done() for task in held_up)
    fetcher.open.set()
    await asyncio.gather(*held_up)


async def test_what_is_there_needs_no_turn() -> None:
    fetcher = FakeFetcher(HELLO)
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    paths = [StorePath.parse(f"/nix/store/{'1' * 32}-p{number}") for number in range(2 * AT_ONCE)]
    waiters = [asyncio.create_task(closures.ensure(path, budget=10)) for path in paths]
    await fetcher.started.wait()
    await closures.ensure(HELLO, budget=1)
    fetcher.open.set()
    await asyncio.gather(*waiters)


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


async def test_a_valid_path_that_is_damaged_is_fetched_all_the_same_and_once_for_all() -> None:
    fetcher = FakeFetcher(HELLO)
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    waiters = [asyncio.create_task(closures.restore(HELLO, budget=10)) for _ in range(10)]
    await fetcher.started.wait()
    fetcher.open.set()
    await asyncio.gather(*waiters)
    assert fetcher.fetched == [HELLO]
    await closures.ensure(HELLO, budget=10)
    assert fetcher.fetched == [HELLO]


async def test_damage_found_while_a_fetch_is_under_way_needs_another_one() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    first = asyncio.create_task(closures.ensure(HELLO, budget=10))
    await fetcher.started.wait()
    restoring = asyncio.create_task(closures.restore(HELLO, budget=10))
    await asyncio.sleep(0)
    fetcher.open.set()
    await asyncio.gather(first, restoring)
    assert fetcher.fetched == [HELLO, HELLO]


async def test_a_restore_that_fails_is_not_tried_again_by_who_does_not_ask_for_it() -> None:
    fetcher = FakeFetcher(HELLO)
    fetcher.failure = CacheUnavailable("no cache answers")
    closures = ClosureService(fetcher)
    with pytest.raises(CacheUnavailable):
        await closures.restore(HELLO, budget=10)
    await closures.ensure(HELLO, budget=10)
    assert fetcher.fetched == [HELLO]


async def test_a_root_that_cannot_be_made_is_told_with_the_remedy() -> None:
    class Full(FakeFetcher):
        async def hold(self, path: StorePath) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutOfSpace, match="free space or inodes") as raised:
        await ClosureService(Full()).ensure(HELLO, budget=10)
    assert str(HELLO) in raised.value.message


async def test_a_root_that_cannot_be_removed_does_not_undo_the_fetch(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(FakeFetcher):
        async def release(self, path: StorePath) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

    await ClosureService(Stuck()).ensure(HELLO, budget=10)
    assert "Read-only file system" in caplog.text


async def test_a_fetch_that_fails_again_and_again_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    fetcher = FakeFetcher()
    closures = ClosureService(fetcher)
    fetcher.failure = CacheUnavailable("no cache answers")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with pytest.raises(CacheUnavailable):
                await closures.ensure(HELLO, budget=10)
        fetcher.failure = None
        await closures.ensure(HELLO, budget=10)
    begun, failed, fetched = [record.getMessage().split(" after ")[0] for record in caplog.records]
    assert begun == f"fetching {HELLO}"
    assert failed == f"fetching {HELLO} failed"
    assert fetched.startswith(f"fetched {HELLO} in ")


async def test_fetches_that_nobody_wants_any_more_make_way_for_others_and_only_then() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    paths = [StorePath.parse(f"/nix/store/{'1' * 32}-p{number}") for number in range(AT_ONCE + 1)]
    for number, path in enumerate(paths[:-1]):
        with pytest.raises(InProgress):
            await closures.ensure(path, budget=0.01, who=f"pod {number}")
    closures.unwanted("pod 0")
    closures.unwanted("pod 1")
    assert closures.count() == (AT_ONCE, 0)  # they do no harm
    late = asyncio.create_task(closures.ensure(paths[-1], budget=10, who="late"))
    async with asyncio.timeout(10):
        while paths[-1] not in fetcher.fetched:
            await asyncio.sleep(0.001)
    assert closures.count() == (AT_ONCE, 0)  # one has ended
    again = asyncio.create_task(closures.ensure(paths[0], budget=10, who="again"))
    fetcher.open.set()
    await asyncio.gather(late, again)
    await closures.close()


async def test_a_fetch_that_is_wanted_again_while_it_makes_way_is_begun_anew() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    paths = [StorePath.parse(f"/nix/store/{'1' * 32}-p{number}") for number in range(AT_ONCE + 1)]
    for path in paths[:-1]:
        with pytest.raises(InProgress):
            await closures.ensure(path, budget=0.01, who=path)
    late = asyncio.create_task(closures.ensure(paths[-1], budget=10, who="late"))
    await asyncio.sleep(0.01)
    assert closures.count() == (AT_ONCE, 1)
    closures.unwanted(paths[0])
    again = asyncio.create_task(closures.ensure(paths[0], budget=10, who="again"))
    await asyncio.sleep(0.01)
    fetcher.open.set()
    await asyncio.gather(late, again)
    assert fetcher.fetched.count(paths[0]) == 2
    await closures.close()


async def test_one_that_still_waits_for_its_turn_is_given_up_at_once() -> None:
    fetcher = FakeFetcher()
    fetcher.open.clear()
    closures = ClosureService(fetcher)
    paths = [StorePath.parse(f"/nix/store/{'1' * 32}-p{number}") for number in range(AT_ONCE + 1)]
    for path in paths:
        with pytest.raises(InProgress):
            await closures.ensure(path, budget=0.01, who=path)
    assert closures.count() == (AT_ONCE, 1)
    closures.unwanted(paths[-1])
    await asyncio.sleep(0.01)
    assert closures.count() == (AT_ONCE, 0)
    fetcher.open.set()
    await closures.close()
