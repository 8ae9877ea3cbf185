"""A process killed just before any call by which it changes something: the next one finishes, and nothing is left.

The steps of test_failure.py are calls of the parts; these are all calls of the system, in between and inside of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes.warm import Warm
from tests.kernel.kinds import KINDS
from tests.kernel.node import Node, run
from tests.kernel.points import every_point, killed_at, points_of
from tests.kernel.store import fill_small

DIFFERENT = ("view", "writable view on a disk of its own", "writable farm", "writable copy")
"""Kinds of volume that between them have all that any has."""
kinds = pytest.mark.parametrize("arguments", [KINDS[kind] for kind in DIFFERENT], ids=DIFFERENT)

Work = Callable[[Node], Awaitable[object]]


def by_process(
    scratch: Path, work: Work, *, warm: int = 0, seconds: float = 600.0
) -> Callable[[], Coroutine[Any, Any, None]]:
    """*work* on the node in *scratch*, by a process that begins and ends with it."""

    async def operation() -> None:
        node = Node(scratch)
        await node.restart(keep_warm=Warm(warm, seconds))
        try:
            await work(node)
        finally:
            await node.volumes.close()

    return operation


def now(scratch: Path, work: Work) -> None:
    asyncio.run(by_process(scratch, work)())


class Crashed:
    """A node on which another pod has had a volume of another closure all the time."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.store = Node(scratch).store
        self.root = fill_small(self.store, "small-1.0")
        self.other = fill_small(self.store, "resident-1.0")
        self.publish_resident()

    def publish_resident(self) -> None:
        now(self.scratch, lambda node: node.publish(self.other, "resident"))
        self._resident = os.stat(self.scratch / "pods/resident").st_dev

    async def require_recovered(self, node: Node, moment: str, arguments: dict[str, Any], *, publish: bool) -> None:
        """The next process reconciles without a problem, and kubelet's next call succeeds; then nothing is left."""
        report = await node.volumes.reconcile()
        assert report.problems == [], moment
        if publish:
            volume = await node.publish(self.root, **arguments)
            assert set(os.listdir(volume / "store")) == {self.root.basename, ".links"}, moment
            assert (volume / "store" / self.root.basename / "bin/hello").read_text() == "small-1.0", moment
        await node.unpublish()
        await node.volumes.close()
        self.require_clean(node, moment)

    def require_clean(self, node: Node, moment: str) -> None:
        """Only the resident's volume is there, untouched."""
        other = self.other.basename
        assert os.stat(node.pods / "resident").st_dev == self._resident, moment
        table = Path("/proc/self/mountinfo").read_text().splitlines()  # as it stands: findmnt takes its time
        mounts = {line.split()[4] for line in table if f" {self.scratch}/" in line}
        assert mounts == {f"{node.data}/views/{other}/m", f"{node.pods}/resident"}, moment
        assert os.listdir(node.pods) == ["resident"], moment
        assert node.store.roots() == {other}, moment
        left = {name: os.listdir(node.data / name) for name in ("views", "farms", "volumes", "trash")}
        assert left == {"views": [other], "farms": [], "volumes": [], "trash": []}, moment


@kinds
def test_a_process_killed_anywhere_in_a_publish_is_recovered_from(scratch: Path, arguments: dict[str, Any]) -> None:
    crashed = Crashed(scratch)
    last = 0
    for point, _ in every_point(by_process(scratch, lambda node: node.publish(crashed.root, **arguments))):
        retried = point % 3 != 0  # or the pod was deleted meanwhile
        now(
            scratch,
            lambda node: crashed.require_recovered(node, f"killed at {point}", arguments, publish=retried),  # noqa: B023
        )
        last = point
    assert last > 20


@kinds
def test_a_process_killed_anywhere_in_an_unpublish_is_recovered_from(scratch: Path, arguments: dict[str, Any]) -> None:
    crashed = Crashed(scratch)
    now(scratch, lambda node: node.publish(crashed.root, **arguments))
    last = 0
    for point, killed in every_point(by_process(scratch, lambda node: node.unpublish())):
        now(scratch, lambda node: crashed.require_recovered(node, f"killed at {point}", {}, publish=False))  # noqa: B023
        if killed:
            now(scratch, lambda node: node.publish(crashed.root, **arguments))
        last = point
    assert last > 5


def test_a_process_killed_anywhere_while_it_keeps_warm_uses_again_and_forgets_is_recovered_from(scratch: Path) -> None:
    crashed = Crashed(scratch)

    async def come_and_go(node: Node) -> None:
        for _ in range(2):
            await node.publish(crashed.root)
            await node.unpublish()
        await node.volumes.forget_unused()

    for point, _ in every_point(by_process(scratch, come_and_go, warm=4)):
        now(
            scratch,
            lambda node: crashed.require_recovered(node, f"killed at {point}", {}, publish=point % 2 == 0),  # noqa: B023
        )


def test_a_process_killed_anywhere_while_what_it_kept_warm_goes_in_its_time_is_recovered_from(scratch: Path) -> None:
    crashed = Crashed(scratch)

    async def come_and_expire(node: Node) -> None:
        await node.publish(crashed.root)
        await node.unpublish()
        async with asyncio.timeout(10):
            while crashed.root.basename in node.store.roots():
                await asyncio.sleep(0.005)

    come_and_go = points_of(by_process(scratch, come_and_expire, warm=4, seconds=0.0))
    killed = 0
    for point in range(come_and_go - 12, come_and_go + 1):  # what comes before is that of the test above
        killed += killed_at(point, by_process(scratch, come_and_expire, warm=4, seconds=0.0))
        now(
            scratch,
            lambda node: crashed.require_recovered(node, f"killed at {point}", {}, publish=point % 2 == 0),  # noqa: B023
        )
    assert killed > 6


def test_a_process_killed_anywhere_in_its_start_is_followed_by_one_that_cleans_up(scratch: Path) -> None:
    """A start that has everything to do: see make_a_mess."""
    crashed = Crashed(scratch)
    last = 0
    make_a_mess(crashed)
    for point, killed in every_point(by_process(scratch, lambda node: node.volumes.reconcile())):
        now(scratch, lambda node: crashed.require_recovered(node, f"killed at {point}", {}, publish=False))  # noqa: B023
        if killed:
            make_a_mess(crashed)
        last = point
    assert last > 10


def make_a_mess(crashed: Crashed) -> None:
    """What crashes, a reboot and administrators leave: unmounted volumes, half-built trees, lonely roots, trash."""

    async def work(node: Node) -> None:
        gone = {name: KINDS[name] for name in ("view", "writable view on a disk of its own", "farm", "writable copy")}
        for number, arguments in enumerate(gone.values()):
            root = fill_or_find(node, f"gone-{number}")
            run("umount", await node.publish(root, f"gone-{number}", **arguments))
            (node.pods / f"gone-{number}").rmdir()
        lonely = fill_or_find(node, "lonely")
        await node.store.hold(lonely.basename, lonely)

    now(crashed.scratch, work)
    for made in ("views/.building-1/meta/nix", "farms/.building-1/tree/nix", "trash/old/deep", "volumes/empty"):
        (crashed.scratch / "data" / made).mkdir(parents=True)


def fill_or_find(node: Node, name: str) -> StorePath:
    for entry in os.listdir(node.store.store_dir):
        if entry.endswith(f"-{name}"):
            return StorePath.from_basename(entry)
    return fill_small(node.store, name)
