"""A driver killed at random times, with several volumes of all kinds going at once, again and again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cknix_csi.api.storepath import StorePath
from tests.kernel.kinds import KINDS
from tests.kernel.node import Node
from tests.kernel.store import fill_small

ROUNDS = int(os.environ.get("CKNIX_TEST_ROUNDS", "300"))
LONGEST = 0.04
"""Seconds from the start of a process to its end by SIGKILL, at most."""
COMMON = ("view", "writable view", "farm", "copy")
"""Kinds that are quickly made; the others have their turn less often."""


@dataclass(frozen=True)
class Volume:
    """What is published by a name, or was to be."""

    name: str
    kind: str
    root: StorePath

    @property
    def arguments(self) -> dict[str, Any]:
        return KINDS[self.kind]


@dataclass
class Pods:
    """A node's volumes: residents, which nobody ever unpublishes, and those that come and go."""

    scratch: Path
    roots: list[StorePath]
    residents: list[Volume]
    published: dict[str, Volume]

    def next(self, dice: random.Random, name: str) -> Volume | None:
        """What to publish by *name*; None where it is published, to unpublish that."""
        if name in self.published:
            return None
        kind = dice.choice(list(KINDS)) if dice.random() < 0.2 else dice.choice(COMMON)
        return Volume(name, kind, dice.choice(self.roots))

    def require_shown(self, volume: Volume) -> None:
        """It shows its closure, and where it is writable what was written there is still there."""
        store = self.scratch / "pods" / volume.name / "store"
        expected = {volume.root.basename, ".links"}
        if volume.kind.startswith("writable"):
            expected.add("mark")
        assert set(os.listdir(store)) == expected, volume
        assert (store / volume.root.basename / "bin/hello").read_text() == volume.root.name, volume


async def do(node: Node, name: str, volume: Volume | None) -> None:
    if volume is None:
        await node.unpublish(name)
    else:
        await node.publish(volume.root, name, **volume.arguments)


async def all_at_once(scratch: Path, begun: dict[str, Volume | None]) -> None:
    node = Node(scratch)
    async with asyncio.TaskGroup() as group:
        for name, volume in begun.items():
            group.create_task(do(node, name, volume))
    await node.volumes.close()


def killed_after(seconds: float, scratch: Path, begun: dict[str, Volume | None]) -> bool:
    """Do *begun* in a process that is killed; False when it was done before that."""
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(all_at_once(scratch, begun))
        except BaseException:
            os._exit(1)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in {0, -signal.SIGKILL}, begun
    return status != 0


def test_a_driver_killed_at_random_times_with_many_volumes_under_way_leaks_and_loses_nothing(scratch: Path) -> None:
    seed = int(os.environ.get("CKNIX_TEST_SEED") or random.randrange(1_000_000))
    print(f"CKNIX_TEST_SEED={seed}")
    dice = random.Random(seed)
    store = Node(scratch).store
    roots = [fill_small(store, f"small-{number}") for number in range(4)]
    kinds = ("view", "writable view", "farm without overlay", "writable view on a disk of its own")
    residents = [Volume(f"resident-{number}", kind, roots[number % 2]) for number, kind in enumerate(kinds)]
    pods = Pods(scratch, roots, residents, {})

    async def begin() -> None:
        node = Node(scratch)
        for volume in residents:
            target = await node.publish(volume.root, volume.name, **volume.arguments)
            if volume.kind.startswith("writable"):
                (target / "store/mark").touch()
        await node.volumes.close()

    async def carry_on(begun: dict[str, Volume | None]) -> None:
        """The next process: reconciles, and does what kubelet asks for again, or its opposite."""
        node = Node(scratch)
        report = await node.volumes.reconcile()
        assert report.problems == [], begun
        for name, volume in begun.items():
            if volume is None or dice.random() < 0.3:
                await node.unpublish(name)
                assert not os.path.lexists(node.pods / name), begun
                pods.published.pop(name, None)
                continue
            target = await node.publish(volume.root, name, **volume.arguments)
            if volume.kind.startswith("writable"):
                (target / "store/mark").touch()
            pods.published[name] = volume
        for volume in (*residents, *pods.published.values()):
            pods.require_shown(volume)
        await node.volumes.close()
        used = {volume.root.basename for volume in (*residents, *pods.published.values())}
        assert {name for name in node.store.roots() if name not in used} == set()
        assert os.listdir(node.data / "trash") == []

    asyncio.run(begin())
    killed = 0
    for _ in range(ROUNDS):
        names = dice.sample([f"p{number}" for number in range(8)], dice.randint(1, 5))
        begun = {name: pods.next(dice, name) for name in names}
        killed += killed_after(dice.uniform(0, LONGEST), scratch, begun)
        asyncio.run(carry_on(begun))
    print(f"{ROUNDS} rounds, {killed} killed under way")
    assert killed > ROUNDS // 4

    async def end() -> list[str]:
        node = Node(scratch)
        for volume in (*residents, *pods.published.values()):
            await node.unpublish(volume.name)
        return await node.left()

    assert asyncio.run(end()) == []
