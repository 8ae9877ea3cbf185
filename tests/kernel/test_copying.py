"""Making a private copy: nobody waits for it, nothing it needs goes meanwhile, and what cannot fit is not begun."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.errors import Invalid, OutOfSpace
from cknix_csi.api.limits import Limit
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes import copies
from cknix_csi.volumes.failures import LimitReached
from cknix_csi.volumes.volumes import PublishRequest
from tests.kernel.kinds import KINDS
from tests.kernel.node import Node, require_shows, run
from tests.kernel.store import fill_small, seal

MEBIBYTE = 1 << 20
COPY: dict[str, Any] = {"presentation": Presentation.COPY}


class Gate:
    """Copying stops at the first byte of each file until :meth:`open`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reached = asyncio.Event()
        self._open = threading.Event()
        self._send = os.sendfile

    def sendfile(self, target: int, source: int, offset: int, count: int) -> int:
        self._loop.call_soon_threadsafe(self._reached.set)
        assert self._open.wait(10)
        return self._send(target, source, offset, count)

    async def reached(self) -> None:
        async with asyncio.timeout(10):
            await self._reached.wait()

    def open(self) -> None:
        self._open.set()


@pytest.fixture
async def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(os, "sendfile", gate.sendfile)
    return gate


def big(node: Node, mebibytes: int, name: str = "big-1.0") -> StorePath:
    root, path = node.store.add(name)
    path.mkdir()
    (path / "file").write_bytes(os.urandom(mebibytes * MEBIBYTE))
    seal(path)
    return root


@contextmanager
def small_disk(node: Node, mebibytes: int) -> Iterator[None]:
    """The data root is a disk of its own."""
    run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", node.data)
    try:
        yield
    finally:
        run("umount", node.data)


async def test_other_pods_of_the_closure_come_and_go_while_it_is_copied(node: Node, gate: Gate) -> None:
    copying = asyncio.create_task(node.publish(node.small, "copied", **COPY))
    await gate.reached()
    for kind in ("view", "farm", "writable view"):
        require_shows(await node.publish(node.small, kind, **KINDS[kind]), node.store, [node.small])
        await node.unpublish(kind)
        assert node.store.roots() == {node.small.basename}, "what is being copied stays"
    assert os.listdir(node.data / "views") == os.listdir(node.data / "farms") == []
    gate.open()
    require_shows(await copying, node.store, [node.small])
    assert node.store.roots() == set()
    await node.unpublish("copied")
    assert await node.left() == []


async def test_a_closure_stays_held_until_the_last_of_its_copies_is_made(node: Node, gate: Gate) -> None:
    first, second = (asyncio.create_task(node.publish(node.small, name, **COPY)) for name in "ab")
    await gate.reached()
    await asyncio.sleep(0)
    first.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await first
    require_shows(await second, node.store, [node.small])
    assert node.store.roots() == set()
    await node.unpublish("b")
    assert await node.left() == []


async def test_a_root_that_somebody_removed_is_taken_again_while_it_is_copied(node: Node, gate: Gate) -> None:
    copying = asyncio.create_task(node.publish(node.small, **COPY))
    await gate.reached()
    await node.store.release(node.small.basename)
    await node.volumes.hold_mounted()
    assert node.store.roots() == {node.small.basename}
    gate.open()
    await copying
    await node.unpublish()
    assert await node.left() == []


async def test_how_far_a_copy_is_can_be_asked(node: Node, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "AT_ONCE", 2)
    root = big(node, 3)
    assert node.volumes.copying("csi-a", node.pods / "a") is None
    copying = [asyncio.create_task(node.publish(root, name, **COPY)) for name in "abc"]
    await gate.reached()
    async with asyncio.timeout(10):
        while len(told := {node.volumes.copying(f"csi-{name}", node.pods / name) or "" for name in "abc"}) < 2:
            await asyncio.sleep(0.001)
    assert f"still copying {root.basename}: waiting for one of 2 other copies to be made" in told
    assert f"still copying {root.basename}: 0 B of 3.0 MiB, 0s" in told
    gate.open()
    await asyncio.gather(*copying)
    assert node.volumes.copying("csi-a", node.pods / "a") is None
    for name in "abc":
        await node.unpublish(name)
    assert await node.left() == []


async def test_what_is_larger_than_its_limit_is_refused_before_anything_is_written(node: Node) -> None:
    root = big(node, 5)
    with pytest.raises(LimitReached, match=r"must fit into its size limit of 4Mi on disk, .* take 5.0 MiB") as refused:
        await node.publish(root, writable=True, limit=Limit(4 * MEBIBYTE), **COPY)
    assert refused.value.needed is None
    assert await node.left() == []


@pytest.mark.parametrize("writable", [False, True])
async def test_what_the_nodes_disk_has_no_room_for_is_refused_with_both_numbers(node: Node, writable: bool) -> None:
    root = big(node, 9)
    with small_disk(node, 8):
        with pytest.raises(
            OutOfSpace, match=r"takes 9.0 MiB, and on the node's disk 8.0 MiB are free; free"
        ) as refused:
            await node.publish(root, writable=writable, limit=Limit(64 * MEBIBYTE) if writable else None, **COPY)
        assert not isinstance(refused.value, LimitReached)
        assert refused.value.needed == 9 * MEBIBYTE
        assert os.listdir(node.data / "volumes") == os.listdir(node.data / "trash") == []
        await node.volumes.close()
    assert await node.left() == []


@pytest.mark.parametrize("writable", [False, True])
async def test_no_copy_is_larger_than_the_node_allows(node: Node, writable: bool) -> None:
    root = big(node, 5)
    request = node.request(root, writable=writable, limit=Limit(4 * MEBIBYTE) if writable else None, **COPY)
    rule = r'"presentation": a copy of .* takes 5.0 MiB, more than the 4Mi that this node gives .*CKNIX_SIZE_LIMIT_MAX'
    with pytest.raises(Invalid, match=rule):
        await node.volumes.publish(allowing(request, 4 * MEBIBYTE))
    assert await node.left() == []
    fitting = node.request(root, writable=writable, **COPY)
    await node.volumes.publish(allowing(fitting, 5 * MEBIBYTE))
    await node.unpublish()
    assert await node.left() == []


def allowing(request: PublishRequest, maximum: int) -> PublishRequest:
    return PublishRequest(
        request.volume_id,
        request.target,
        request.root,
        request.writable,
        request.limit,
        request.presentation,
        maximum=maximum,
    )


async def test_what_fits_is_never_refused_however_large_it_looks(node: Node) -> None:
    """Holes and further names of a file take nothing."""
    root, path = node.store.add("looks-large")
    path.mkdir()
    (path / "file").write_bytes(os.urandom(3 * MEBIBYTE))
    for number in range(8):
        os.link(path / "file", path / f"name-{number}")
    with (path / "hole").open("wb") as hole:
        hole.truncate(64 * MEBIBYTE)
    seal(path)
    with small_disk(node, 4):
        await node.publish(root, **COPY)
        assert (node.pods / "a/store" / root.basename / "hole").stat().st_size == 64 * MEBIBYTE
        await node.unpublish()
        await node.volumes.close()
    assert await node.left() == []


async def test_room_that_is_being_made_is_waited_for(node: Node) -> None:
    root = big(node, 5)
    with small_disk(node, 8):
        await node.publish(root, **COPY)
        await node.unpublish()  # deleted in the background
        await node.publish(root, "b", **COPY)
        await node.unpublish("b")
        await node.volumes.close()
    assert await node.left() == []


async def test_the_trash_may_be_taken_away_under_a_running_daemon(node: Node, scratch: Path) -> None:
    root = fill_small(node.store, "small")
    for arguments in (KINDS["view"], KINDS["writable view"], COPY):
        await node.publish(root, **arguments)
        await node.volumes.emptied()
        (node.data / "trash").rmdir()
        await node.unpublish()
        assert not (node.pods / "a").exists()
    assert await node.left() == []
