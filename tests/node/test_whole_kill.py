"""The whole daemon killed at random moments: what comes after converges, leaks nothing and touches no running pod."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import suppress
from dataclasses import dataclass

from grpclib.exceptions import GRPCError, StreamTerminatedError

from tests.node.whole import Cluster, Source, WholeNode, require_exactly

ROUNDS = 100
ENOUGH = 30
SECONDS = 25.0
"""After this long the rounds end, if there have been enough."""


@dataclass(frozen=True)
class Operation:
    """A publish of *path*, or an unpublish when there is none."""

    volume: str
    path: str = ""
    writable: bool = False


async def run(node: WholeNode, operation: Operation) -> None:
    if operation.path:
        await node.publish_retrying(operation.volume, writable=operation.writable, storePath=operation.path)
    else:
        await node.unpublish(operation.volume)


async def begin(node: WholeNode, operation: Operation) -> None:
    """Until it is done or the daemon dies."""
    with suppress(GRPCError, StreamTerminatedError, OSError):
        if operation.path:
            await node.publish(operation.volume, writable=operation.writable, storePath=operation.path)
        else:
            await node.unpublish(operation.volume)


async def test_a_daemon_killed_at_any_moment_is_taken_over_by_the_next(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    seed = int(os.environ.get("CKNIX_TEST_SEED") or random.randrange(1_000_000))
    print(f"CKNIX_TEST_SEED={seed}")
    dice = random.Random(seed)
    paths = [source.results[name] for name in ("hello", "other", "toolbox", "file")]
    residents = {"resident-ro": False, "resident-rw": True}
    volumes = ["a", "b", "c"]
    published: dict[str, Operation] = {}

    def next_operation(volume: str) -> Operation:
        if volume in published:
            return Operation(volume)
        return Operation(volume, dice.choice(paths), writable=dice.random() < 0.5)

    await whole.start()
    for resident, writable in residents.items():
        await whole.publish(resident, writable=writable, storePath=source.chain)
    mounted = {resident: whole.mount_id(resident) for resident in residents}
    began = time.monotonic()
    rounds = 0
    while rounds < ROUNDS and (rounds < ENOUGH or time.monotonic() - began < SECONDS):
        rounds += 1
        if dice.random() < 0.3:
            whole.collect_garbage()  # what is published next must be fetched again
        operations = [next_operation(volume) for volume in dice.sample(volumes, dice.randint(1, 3))]
        tasks = [asyncio.create_task(begin(whole, operation)) for operation in operations]
        await asyncio.sleep(dice.choice((0.01, 0.1, 0.6)) * dice.random())
        whole.kill(with_children=dice.random() < 0.5)
        await asyncio.gather(*tasks)
        assert {resident: whole.mount_id(resident) for resident in residents} == mounted
        if dice.random() < 0.2:  # and in the middle of the start
            whole.launch()
            await asyncio.sleep(0.3 * dice.random())
            whole.kill()
        await whole.start()
        for begun in operations:
            deleted = dice.random() < 0.2  # the pod, meanwhile
            operation = Operation(begun.volume) if deleted else begun
            await run(whole, operation)
            published.pop(operation.volume, None)
            if operation.path:
                published[operation.volume] = operation
                require_exactly(whole.shown(operation.volume), source, operation.path)
    print(f"{rounds} rounds in {time.monotonic() - began:.1f} s")
    assert {resident: whole.mount_id(resident) for resident in residents} == mounted
    for resident in residents:
        require_exactly(whole.shown(resident), source, source.chain)
    assert whole.admin("nix-store", "--verify", "--check-contents") == []
    for volume in (*volumes, *residents):
        await whole.unpublish(volume)
    await whole.left_nothing()
    whole.end_children()  # of a daemon that was killed alone: what they fetch is theirs until they end
    whole.collect_garbage()
    assert source.chain not in whole.registered_paths()
