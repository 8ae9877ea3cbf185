"""Writable volumes of limited size: a pod cannot fill the node, and nothing of the place outlives the volume."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path

import pytest

from cknix_csi.api.errors import Conflict, OutOfSpace
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.volumes.failures import VolumeFailed
from cknix_csi.volumes.mounts import KernelMounts, Upper
from cknix_csi.volumes.sized import KernelSizedStorage
from cknix_csi.volumes.volumes import Publication
from tests.kernel.node import Node, metadata, mount_ids, mounts_below, require_shows, run
from tests.kernel.test_failure import Injected, failing_at, kill_at, stepped
from tests.kernel.test_sized import MIB, fill, loops, no_loop_device_stays, wait_until

__all__ = ["no_loop_device_stays"]

DISK, MEMORY = Limit(8 * MIB), Limit(8 * MIB, Medium.MEMORY)
limits = pytest.mark.parametrize("limit", [DISK, MEMORY], ids=["disk", "memory"])


def as_json(limit: Limit) -> list[object]:
    return [limit.bytes, limit.medium.value]


async def left(node: Node) -> list[object]:
    found = await node.left()
    return [*found, *loops(node.scratch)]


@limits
async def test_a_pod_can_write_up_to_the_limit_and_nothing_outside_notices(node: Node, limit: Limit) -> None:
    before = metadata(node.store.store_dir, content=True)
    read_only = await node.publish(node.shapes, "read-only")
    other = await node.publish(node.shapes, "other", writable=True, limit=limit)
    volume = await node.publish(node.shapes, writable=True, limit=limit)
    written = fill(volume / "store/new", 3 * limit.bytes)
    assert 0.95 * limit.bytes < written <= 1.06 * limit.bytes
    with pytest.raises(OSError) as full:
        (volume / "store" / node.shapes.basename / "bin/hello").write_bytes(b"x" * MIB)
    assert full.value.errno == errno.ENOSPC
    (other / "store/new").write_bytes(b"x" * 4 * MIB)
    (node.data / "outside").write_bytes(b"x" * limit.bytes)
    (node.data / "outside").unlink()
    closure = await node.store.query(node.shapes)
    require_shows(read_only, node.store, [info.path for info in closure.paths])
    assert metadata(node.store.store_dir, content=True) == before
    for name in ("a", "other", "read-only"):
        await node.unpublish(name)
    assert await left(node) == []


@limits
async def test_a_volume_of_limited_size_shows_the_closure_and_keeps_writes_to_itself(node: Node, limit: Limit) -> None:
    volume = await node.publish(node.shapes, writable=True, limit=limit)
    closure = await node.store.query(node.shapes)
    require_shows(volume, node.store, [info.path for info in closure.paths])
    library = next((volume / "store").glob("*-library-1.0"))
    (library / "lib/big").chmod(0o644)
    os.chown(library / "lib/deep", 1234, 1234)
    run("mv", library, volume / "store/moved")
    assert (volume / "store/moved/lib/big").stat().st_size == 3 << 20
    await node.unpublish()
    await node.unpublish()
    assert await left(node) == []


@limits
async def test_the_kernel_tells_which_limit_a_volume_has_also_after_a_restart(node: Node, limit: Limit) -> None:
    odd = Limit(limit.bytes + 5, limit.medium)
    target = await node.publish(node.small, writable=True, limit=odd)
    before = mount_ids(target)
    for _ in range(2):
        found = node.volumes.published(target)
        assert found == Publication(node.small.basename, True, limit)
        assert str(found).endswith("small-1.0 (writable, at most 8Mi " + str(limit).split(maxsplit=1)[1] + ")")
        await node.publish(node.small, writable=True, limit=odd)
        assert mount_ids(target) == before
        await node.restart()
    await node.unpublish()
    assert await left(node) == []


@pytest.mark.parametrize("restart", [False, True], ids=["same process", "after a restart"])
async def test_another_limit_at_a_published_target_is_a_conflict_that_names_both(node: Node, restart: bool) -> None:
    target = await node.publish(node.small, writable=True, limit=DISK)
    unlimited = await node.publish(node.small, "unlimited", writable=True)
    before = mount_ids(target)
    if restart:
        await node.restart()
    for other, said in (
        (None, r"\(writable, at most 8Mi on disk\), not .*\(writable\)"),
        (Limit(9 * MIB), "at most 8Mi on disk.*, not .*at most 9Mi on disk"),
        (MEMORY, "at most 8Mi on disk.*, not .*at most 8Mi in memory"),
    ):
        with pytest.raises(Conflict, match=said):
            await node.publish(node.small, writable=True, limit=other)
    with pytest.raises(Conflict, match=r"\(writable\), not .*at most 8Mi on disk"):
        await node.publish(node.small, "unlimited", writable=True, limit=DISK)
    assert mount_ids(target) == before
    assert len(mount_ids(unlimited)) == 1


async def test_a_limit_means_nothing_to_a_read_only_volume(node: Node) -> None:
    target = await node.publish(node.small, limit=DISK)
    assert node.volumes.published(target) == Publication(node.small.basename, False)
    await node.publish(node.small, limit=MEMORY)
    assert loops(node.scratch) == []


@limits
async def test_a_pod_that_still_works_inside_keeps_its_place(node: Node, limit: Limit) -> None:
    volume = await node.publish(node.small, writable=True, limit=limit)
    bound = node.scratch / "bound"
    bound.mkdir()
    run("mount", "--bind", volume, bound)
    with pytest.raises(Conflict, match=f"is still used by the mount at {bound}"):
        await node.unpublish()
    (bound / "store/new").write_text("still works")
    run("umount", bound)
    await node.unpublish()
    assert await left(node) == []


@limits
async def test_a_publish_that_fails_at_any_step_leaves_nothing_and_its_retry_works(node: Node, limit: Limit) -> None:
    steps = await stepped(node, lambda _number, _name: None)
    await node.publish(node.small, writable=True, limit=limit)
    names = steps.calls.copy()
    await node.unpublish()
    assert {"make place", "overlay", "clone"} <= set(names)
    for number, name in enumerate(names, 1):
        await stepped(node, failing_at(number))
        with pytest.raises(Injected, match=f"{name} fails"):
            await node.publish(node.small, writable=True, limit=limit)
        assert await left(node) == [], f"failed at {number}: {name}"
    target = await node.publish(node.small, writable=True, limit=limit)
    require_shows(target, node.store, [node.small])
    await node.unpublish()
    assert await left(node) == []


@limits
async def test_an_unpublish_that_fails_at_any_step_is_finished_by_its_retry(node: Node, limit: Limit) -> None:
    await node.publish(node.small, writable=True, limit=limit)
    steps = await stepped(node, lambda _number, _name: None)
    await node.unpublish()
    names = steps.calls.copy()
    assert "release place" in names
    for number, name in enumerate(names, 1):
        await node.publish(node.small, writable=True, limit=limit)
        await stepped(node, failing_at(number))
        with pytest.raises(Injected, match=f"{name} fails"):
            await node.unpublish()
        await node.unpublish()
        assert await left(node) == [], f"failed at {number}: {name}"


class Breaking(KernelSizedStorage):
    """Makes places, and then says that it could not."""

    def make(self, path: str, limit: Limit) -> Upper:
        super().make(path, limit)
        raise VolumeFailed("the place is made, and then something else goes wrong")


@limits
async def test_a_place_that_was_made_half_way_is_undone(node: Node, limit: Limit) -> None:
    await node.restart(sized=Breaking(KernelMounts()))
    with pytest.raises(VolumeFailed, match="the place is made"):
        await node.publish(node.small, writable=True, limit=limit)
    assert await left(node) == []


async def test_a_full_disk_is_named_and_the_retry_works(node: Node) -> None:
    await node.volumes.close()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "small-disk", node.data)
    await node.publish(node.small, "resident")
    fill(node.data / "filler", 8 * MIB, step=4096)
    with pytest.raises(OutOfSpace, match="free space or inodes"):
        await node.publish(node.small, writable=True, limit=DISK)
    assert os.listdir(node.pods) == ["resident"]
    (node.data / "filler").unlink()
    await node.publish(node.small, writable=True, limit=DISK)
    for name in ("a", "resident"):
        await node.unpublish(name)
    await node.volumes.close()
    assert loops(node.scratch) == []
    run("umount", node.data)


@limits
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_process_killed_at_any_step_of_publish_is_recovered_from(node: Node, limit: Limit, when: str) -> None:
    operation = {"do": "publish", "root": str(node.small), "writable": True, "limit": as_json(limit)}
    resident = await node.publish(node.small, "resident", writable=True, limit=limit)
    before = mounts_below(node.scratch)
    (resident / "store/mine").touch()
    step = 0
    while True:
        step += 1
        await node.volumes.close()
        if (done := kill_at(node, [operation], step, when)) == 0:
            break
        assert done == -signal.SIGKILL
        await node.restart()
        if step % 2:  # what was begun is nobody's without the retry
            report = await node.volumes.reconcile()
            assert report.problems == []
            if not (node.pods / "a").is_mount():
                assert mounts_below(node.scratch) == before
        target = await node.publish(node.small, writable=True, limit=limit)
        require_shows(target, node.store, [node.small])
        assert fill(target / "store/new", 3 * limit.bytes) <= limit.bytes
        await node.unpublish()
        assert mounts_below(node.scratch) == before
        assert (resident / "store/mine").exists()
    assert step > 12
    for name in ("a", "resident"):
        await node.unpublish(name)
    assert await left(node) == []


@limits
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_process_killed_at_any_step_of_unpublish_is_finished_by_the_next(
    node: Node, limit: Limit, when: str
) -> None:
    step = 0
    while True:
        step += 1
        await node.publish(node.small, writable=True, limit=limit)
        await node.volumes.close()
        if (done := kill_at(node, [{"do": "unpublish"}], step, when)) == 0:
            break
        assert done == -signal.SIGKILL
        await node.restart()
        report = await node.volumes.reconcile()
        assert report.problems == []
        await node.unpublish()
        assert await left(node) == []
    assert step > 7
    assert await left(node) == []


@limits
async def test_a_process_killed_at_any_step_of_its_start_is_followed_by_one_that_cleans_up(
    node: Node, limit: Limit
) -> None:
    step = 0
    killed = True
    while killed:
        step += 1
        target = await node.publish(node.small, writable=True, limit=limit)
        await node.volumes.close()
        run("umount", target)
        killed = kill_at(node, [{"do": "unpublish", "name": "none"}], step, "before") == -signal.SIGKILL
        await node.restart()
        report = await node.volumes.reconcile()
        assert report.problems == []
        await node.unpublish()
        assert await left(node) == []
    assert step > 5


async def test_thirty_at_once_come_and_go_without_disturbing_each_other(node: Node) -> None:
    async def pod(number: int) -> Path:
        limit = (DISK, MEMORY, None)[number % 3]
        target = await node.publish(node.small, f"p{number}", writable=True, limit=limit)
        (target / "store/mine").write_text(str(number))
        await asyncio.sleep(0.01)
        assert (target / "store/mine").read_text() == str(number)
        await node.unpublish(f"p{number}")
        return target

    await asyncio.gather(*map(pod, range(30)))
    assert await left(node) == []


async def test_a_device_that_ends_later_leaves_nothing_either(node: Node) -> None:
    """A mount namespace made meanwhile, such as another container's, holds the place until it ends."""
    await node.publish(node.small, writable=True, limit=DISK)
    other = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; read line"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert other.stdout is not None
    await other.stdout.readline()
    await node.unpublish()
    assert await node.left() == []
    await other.communicate(b"\n")
    wait_until(lambda: loops(node.scratch) == [])
