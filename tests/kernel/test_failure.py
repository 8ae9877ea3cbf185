"""Failure, cancellation, a killed process: nothing is left, and what was published goes on."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from cknix_csi.api.errors import CknixError, MountFailed, OutOfSpace
from cknix_csi.volumes.closures import Closures
from cknix_csi.volumes.failures import TargetUnusable
from cknix_csi.volumes.mountinfo import MountTable, MountTableUnreadable
from cknix_csi.volumes.mounts import KernelMounts, Mounts
from cknix_csi.volumes.trash import delete_tree
from tests.kernel.node import Node, mount_ids, mounts_below, require_shows, run
from tests.kernel.steps import Stepped, SteppedClosures, SteppedMounts, SteppedSizedStorage
from tests.kernel.store import FakeStore, fill_small
from tests.kernel.victim import main as victim

both = pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])


class Injected(CknixError):
    """The failure that a test made."""


async def stepped(node: Node, before: Callable[[int, str], None]) -> Stepped:
    """Restart *node*; once it is ready, every call of Mounts and Closures is announced to *before*, numbered from 1."""
    armed = False
    steps = Stepped(lambda number, name: before(number, name) if armed else None)
    await node.restart(
        closures=SteppedClosures(node.store, steps), mounts=SteppedMounts(steps), sized=SteppedSizedStorage(steps)
    )
    await node.volumes.reconcile()
    steps.calls.clear()
    armed = True
    return steps


async def calls_of(node: Node, operation: Callable[[], Awaitable[object]]) -> list[str]:
    """The names of the steps that *operation* takes when nothing goes wrong."""
    steps = await stepped(node, lambda _number, _name: None)
    await operation()
    return steps.calls.copy()


def failing_at(step: int) -> Callable[[int, str], None]:
    def fail(number: int, name: str) -> None:
        if number == step:
            raise Injected(f"{name} fails")

    return fail


def failing_in(*names: str) -> Callable[[int, str], None]:
    def fail(_: int, name: str) -> None:
        if name in names:
            raise Injected(f"{name} fails")

    return fail


@both
async def test_a_publish_that_fails_at_any_step_leaves_nothing_and_its_retry_works(node: Node, writable: bool) -> None:
    names = await calls_of(node, lambda: node.publish(node.small, writable=writable))
    await node.unpublish()
    assert {"hold", "query", "write_state", "overlay", "clone"} <= set(names)
    for number, name in enumerate(names, 1):
        await stepped(node, failing_at(number))
        with pytest.raises(Injected, match=f"{name} fails"):
            await node.publish(node.small, writable=writable)
        assert await node.left() == [], f"failed at {number}: {name}"
        target = await node.publish(node.small, writable=writable)
        require_shows(target, node.store, [node.small])
        await node.unpublish()
        assert await node.left() == []


@both
async def test_a_publish_that_is_cancelled_at_any_step_leaves_nothing(node: Node, writable: bool) -> None:
    names = await calls_of(node, lambda: node.publish(node.small, writable=writable))
    await node.unpublish()
    for number, name in enumerate(names, 1):
        cancel = Cancel(number)
        await stepped(node, cancel)
        cancel.task = asyncio.create_task(node.publish(node.small, writable=writable))
        with pytest.raises(asyncio.CancelledError):
            await cancel.task
        assert await node.left() == [], f"cancelled at {number}: {name}"


class Cancel:
    """Cancels *task* while it is in the step of that number; the step itself goes on, as a thread does."""

    def __init__(self, step: int) -> None:
        self.task: asyncio.Task[Path] | None = None
        self._step = step
        self._loop = asyncio.get_running_loop()

    def __call__(self, number: int, _: str) -> None:
        if number != self._step or self.task is None:
            return
        cancelled = threading.Event()
        self._loop.call_soon_threadsafe(self._cancel, cancelled)
        if threading.current_thread() is not threading.main_thread():
            assert cancelled.wait(10)

    def _cancel(self, cancelled: threading.Event) -> None:
        assert self.task is not None
        self.task.cancel()
        cancelled.set()


@both
async def test_an_unpublish_that_fails_at_any_step_is_finished_by_its_retry(node: Node, writable: bool) -> None:
    await node.publish(node.small, writable=writable)
    names = await calls_of(node, node.unpublish)
    assert {"unmount", "release"} <= set(names)
    for number, name in enumerate(names, 1):
        await node.publish(node.small, writable=writable)
        await stepped(node, failing_at(number))
        with pytest.raises(Injected, match=f"{name} fails"):
            await node.unpublish()
        await node.unpublish()
        assert await node.left() == [], f"failed at {number}: {name}"


async def test_a_failed_publish_does_not_disturb_the_closures_other_pods(node: Node) -> None:
    target = await node.publish(node.small, "resident")
    before = mount_ids(target)
    for writable in (False, True):
        await stepped(node, failing_in("clone"))
        with pytest.raises(Injected):
            await node.publish(node.small, writable=writable)
    assert mount_ids(target) == before
    assert os.listdir(node.pods) == ["resident"]
    assert node.store.roots() == {node.small.basename}
    require_shows(target, node.store, [node.small])


async def test_a_directory_that_was_there_before_survives_a_failed_publish(node: Node) -> None:
    (node.pods / "a").mkdir()
    await stepped(node, failing_in("clone"))
    with pytest.raises(Injected):
        await node.publish(node.small)
    assert await node.left() == ["target a"]


async def test_a_bad_target_is_refused_before_anything_is_held_or_built(node: Node) -> None:
    (node.pods / "a").write_text("a file")
    with pytest.raises(TargetUnusable):
        await node.publish(node.small)
    calls = (await stepped(node, lambda _number, _name: None)).calls
    with pytest.raises(TargetUnusable):
        await node.publish(node.small)
    assert calls == ["mounted"]


async def test_what_appears_at_the_target_while_the_view_is_built_is_not_mounted_over(node: Node) -> None:
    def plant(_: int, name: str) -> None:
        if name == "query":
            (node.pods / "a/precious").mkdir(parents=True)

    await stepped(node, plant)
    with pytest.raises(TargetUnusable, match="'precious'"):
        await node.publish(node.small)
    assert await node.left() == ["target a"]


async def test_what_cannot_be_undone_is_answered_so_that_kubelet_comes_back(node: Node) -> None:
    await stepped(node, failing_in("clone", "release"))
    with pytest.raises(CknixError, match="clone fails; then undoing it failed: release fails") as error:
        await node.publish(node.small)
    assert error.value.code.transient
    await node.restart()
    await node.unpublish()
    assert await node.left() == []


async def test_while_the_mount_table_cannot_be_read_nothing_is_touched(node: Node) -> None:
    await node.publish(node.small)
    (node.data / "views/.building-old").mkdir()

    class Blind(KernelMounts):
        def table(self) -> MountTable:
            raise MountTableUnreadable("the mount table cannot be read")

    before = mounts_below(node.scratch)
    await node.restart(mounts=Blind())
    for operation in (node.volumes.reconcile(), node.publish(node.small, "b"), node.unpublish()):
        with pytest.raises(MountTableUnreadable):
            await operation
    assert mounts_below(node.scratch) == before
    assert sorted(os.listdir(node.data / "views")) == [".building-old", node.small.basename]
    assert os.listdir(node.pods) == ["a"]


async def test_the_kernels_own_words_reach_the_reader(node: Node) -> None:
    mounts = KernelMounts()
    for name in ("m", "upper", "work"):
        (node.scratch / name).mkdir()
    with pytest.raises(
        MountFailed, match=r"cannot mount an overlay at .*/m: No such file or directory \(lowerdir\+=/no"
    ):
        mounts.overlay(f"{node.scratch}/m", source="x", lower=["/no/such"], upper=None)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(MountFailed):
            mounts.overlay(f"{node.scratch}/m", source="x", lower=["/no/such"], upper=None)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@both
async def test_a_restarted_driver_sees_what_is_published_and_can_unpublish_it(node: Node, writable: bool) -> None:
    target = await node.publish(node.small, writable=writable)
    before = mount_ids(target)
    await node.restart()
    report = await node.volumes.reconcile()
    assert report.adopted == [node.small.basename]
    published = node.volumes.published(target)
    assert published is not None
    assert (published.closure_id, published.writable) == (node.small.basename, writable)
    await node.publish(node.small, writable=writable)
    assert mount_ids(target) == before
    await node.unpublish()
    assert await node.left() == []


async def test_reconcile_removes_what_is_nobodys_and_says_so(node: Node) -> None:
    kept = await node.publish(node.small, "kept")
    await node.publish(node.shapes, "unmounted", writable=True)
    run("umount", node.pods / "unmounted")
    (node.data / "views/.building-1/meta/nix").mkdir(parents=True)
    (node.data / "trash/old/deep").mkdir(parents=True)
    (node.data / "volumes/empty").mkdir()
    lonely = fill_small(node.store, "lonely-1.0")
    await node.store.hold(lonely.basename, lonely)
    await node.restart()
    report = await node.volumes.reconcile()
    assert report.problems == []
    assert report.adopted == [node.small.basename]
    assert report.views_removed == [node.shapes.basename]
    assert report.roots_released == [lonely.basename]
    assert len(report.volumes_removed) == 1
    assert report.half_built == 1
    assert len(report.words()) == 5
    require_shows(kept, node.store, [node.small])
    await node.unpublish("kept")
    await node.unpublish("unmounted")
    assert await node.left() == []


async def test_reconcile_takes_a_gc_root_again_that_somebody_removed_under_a_pod(node: Node) -> None:
    await node.publish(node.small)
    await node.store.release(node.small.basename)
    await node.restart()
    report = await node.volumes.reconcile()
    assert report.roots_taken == [node.small.basename]
    assert node.store.roots() == {node.small.basename}


async def test_the_longest_data_root_and_volume_id_hide_no_volume_from_reconcile(scratch: Path) -> None:
    deep = scratch / ("d" * (128 - len(f"{scratch}//data")))
    deep.mkdir()
    node = Node(deep)
    node.fill()
    assert len(str(node.data)) == 128
    for name in ("v" * 76, "v" * 77, "v" * 120, "v" * 200):
        target = await node.publish(node.small, name, writable=True)
        (target / "store/mark").touch()
    await node.restart()
    report = await node.volumes.reconcile()
    assert report.volumes_removed == []
    for name in ("v" * 76, "v" * 77, "v" * 120, "v" * 200):
        assert (node.pods / name / "store/mark").exists()
        await node.unpublish(name)
    assert await node.left() == []


@both
async def test_a_full_disk_is_named_and_what_was_begun_on_it_is_undone(node: Node, writable: bool) -> None:
    await node.volumes.close()
    run("mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=400", "small-disk", node.data)
    resident = await node.publish(node.shapes, "resident")
    fillers = node.data / "fillers"
    fillers.mkdir()
    for left in range(60):  # inodes; each step of a publish is one day the one that does not find any
        await node.restart()  # the trash is empty
        for number in range(os.statvfs(node.data).f_ffree - left):
            (fillers / str(number)).touch()
        try:
            await node.publish(node.small, writable=writable)
        except OutOfSpace as error:
            assert "No space left on device" in str(error)
            assert "free space or inodes" in str(error)
            assert os.listdir(node.pods) == ["resident"]
            assert node.store.roots() == {node.shapes.basename}
        else:
            break
        finally:
            for filler in fillers.iterdir():
                filler.unlink()
    assert left > 10
    for target, root in ((node.pods / "a", node.small), (resident, node.shapes)):
        require_shows(target, node.store, [info.path for info in (await node.store.query(root)).paths])
    await node.unpublish()
    await node.unpublish("resident")
    fillers.rmdir()
    await node.volumes.close()
    run("umount", node.data)
    assert await node.left() == []


async def test_reconcile_leaves_alone_what_it_does_not_know(node: Node) -> None:
    await node.volumes.reconcile()
    (node.data / "views/notes.txt").write_text("an administrator's")
    (node.data / "views/lost+found").mkdir()
    await node.restart()
    await node.volumes.reconcile()
    await node.volumes.close()
    assert sorted(os.listdir(node.data / "views")) == ["lost+found", "notes.txt"]


@both
async def test_when_the_shared_overlay_was_unmounted_by_somebody_pods_go_on_and_new_ones_start(
    node: Node, writable: bool
) -> None:
    target = await node.publish(node.small)
    run("umount", node.data / "views" / node.small.basename / "m")
    await node.restart()
    second = await node.publish(node.small, "second", writable=writable)
    for volume in (target, second):
        require_shows(volume, node.store, [node.small])
    await node.unpublish("second")
    await node.unpublish()
    assert await node.left() == []


async def test_a_view_that_is_bound_elsewhere_is_kept_until_that_is_gone(node: Node) -> None:
    await node.publish(node.small)
    bound = node.scratch / "bound"
    bound.mkdir()
    run("mount", "--bind", node.data / "views" / node.small.basename / "meta", bound)
    with pytest.raises(CknixError, match=f"still used by the mount at {bound}"):
        await node.unpublish()
    assert node.store.roots() == {node.small.basename}
    run("umount", bound)
    await node.unpublish()
    assert await node.left() == []


async def test_the_trash_is_emptied_without_leaving_it(node: Node) -> None:
    volume = await node.publish(node.small, writable=True)
    outside = node.scratch / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (volume / "link").symlink_to(outside)
    deep = volume / "deep"
    deep.mkdir()
    descriptor = os.open(deep, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    await node.unpublish()
    assert await node.left() == []
    assert os.listdir(outside) == ["precious"]


async def test_a_mount_inside_the_trash_is_never_walked_into(node: Node) -> None:
    await node.volumes.reconcile()
    outside = node.scratch / "outside"
    (outside / "precious").mkdir(parents=True)
    inside = node.data / "trash/old/mounted"
    inside.mkdir(parents=True)
    run("mount", "--bind", outside, inside)
    await node.restart()
    await node.volumes.reconcile()
    await node.volumes.close()
    assert os.listdir(outside) == ["precious"]
    assert len(mount_ids(inside)) == 1
    with pytest.raises(OSError) as refused:
        delete_tree(str(node.data / "trash/old"))
    assert refused.value.errno == errno.EXDEV
    assert os.listdir(outside) == ["precious"]
    run("umount", inside)
    await node.volumes.reconcile()
    assert await node.left() == []


def kill_at(node: Node, operations: Sequence[dict[str, object]], step: int, when: str, warm: str = "") -> int:
    """Run *operations* in a process of their own that kills itself *when* ("before", "after") it does *step*.

    Returns how that ended.  It is a child of this process: a new Python would take much longer than what it is to do.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            asyncio.run(victim(str(node.scratch), json.dumps(operations), str(step), when, warm))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@both
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_process_killed_at_any_step_of_publish_is_recovered_from(node: Node, writable: bool, when: str) -> None:
    resident = await node.publish(node.shapes, "resident")
    before = mount_ids(resident)
    await node.volumes.close()
    step = 0
    while True:
        step += 1
        done = kill_at(node, [{"do": "publish", "root": str(node.small), "writable": writable}], step, when)
        if done == 0:
            break
        assert done == -signal.SIGKILL
        await node.restart()
        target = await node.publish(node.small, writable=writable)
        require_shows(target, node.store, [node.small])
        await node.unpublish()
        await node.volumes.close()
        assert mount_ids(resident) == before
        assert os.listdir(node.pods) == ["resident"]
        assert node.store.roots() == {node.shapes.basename}
        assert [os.listdir(node.data / name) for name in ("views", "volumes", "trash")] == [
            [node.shapes.basename],
            [],
            [],
        ]
    assert step > 8
    await node.unpublish()
    await node.unpublish("resident")
    assert await node.left() == []


@both
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_process_killed_at_any_step_of_unpublish_is_finished_by_the_next(
    node: Node, writable: bool, when: str
) -> None:
    step = 0
    while True:
        step += 1
        await node.publish(node.small, writable=writable)
        await node.volumes.close()
        done = kill_at(node, [{"do": "unpublish"}], step, when)
        if done == 0:
            break
        assert done == -signal.SIGKILL
        await node.restart()
        await node.volumes.reconcile()
        await node.unpublish()
        assert await node.left() == []
    assert step > 5
    assert await node.left() == []


def test_the_stepped_parts_are_what_they_stand_for(scratch: Path) -> None:
    steps = Stepped(lambda _number, _name: None)
    mounts: Mounts = SteppedMounts(steps)
    closures: Closures = SteppedClosures(FakeStore(scratch), steps)
    assert mounts.table().at("/")
    assert closures.store_dir.is_dir()
    assert steps.calls == ["table"]
