"""Publish and unpublish as kubelet calls them: repeated, concurrent, on all kinds of targets."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cknix_csi.api.errors import CknixError, Conflict
from cknix_csi.volumes.failures import DataRootTaken, TargetUnusable
from cknix_csi.volumes.volumes import Publication, PublishRequest
from tests.kernel.node import Node, metadata, mount_ids, mounts_below, require_shows, run
from tests.kernel.steps import Stepped, SteppedMounts
from tests.kernel.store import fill_small

both = pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])


@both
async def test_a_second_publish_of_a_running_pods_volume_touches_nothing(node: Node, writable: bool) -> None:
    target = await node.publish(node.shapes, writable=writable)
    before, table = mount_ids(target), mounts_below(node.scratch)
    await node.publish(node.shapes, writable=writable)
    assert mount_ids(target) == before
    assert len(before) == 1
    assert mounts_below(node.scratch) == table


@both
async def test_unpublish_leaves_nothing_and_may_be_repeated(node: Node, writable: bool) -> None:
    await node.publish(node.shapes, writable=writable)
    await node.unpublish()
    await node.unpublish()
    assert await node.left() == []


async def test_unpublish_of_what_was_never_published_is_fine_even_where_its_parent_never_was(node: Node) -> None:
    await node.unpublish("never")
    await node.volumes.unpublish("csi-x", node.pods / "no/such/parent")
    (node.pods / "empty").mkdir()
    await node.unpublish("empty")
    assert await node.left() == []


@both
async def test_the_mount_table_tells_what_is_published(node: Node, writable: bool) -> None:
    assert node.volumes.published(node.pods / "a") is None
    target = await node.publish(node.shapes, writable=writable)
    assert node.volumes.published(target) == Publication(node.shapes.basename, writable)
    await node.unpublish()
    assert node.volumes.published(target) is None


@both
async def test_no_publish_of_a_known_closure_reads_the_mount_table_which_grows_with_all_that_is_mounted(
    node: Node, writable: bool
) -> None:
    steps = Stepped(lambda _number, _name: None)
    await node.restart(mounts=SteppedMounts(steps))
    await node.publish(node.shapes, "first")
    steps.calls.clear()
    assert node.volumes.published(node.pods / "a") is None
    await node.publish(node.shapes, writable=writable)
    assert "clone" in steps.calls
    assert "table" not in steps.calls


async def test_read_only_volumes_of_one_closure_share_one_overlay_and_writable_ones_have_their_own(node: Node) -> None:
    devices = []
    for name, writable in (("a", False), ("b", False), ("c", True), ("d", True)):
        devices.append((await node.publish(node.shapes, name, writable=writable)).stat().st_dev)
    assert devices[0] == devices[1]
    assert len(set(devices)) == 3


async def test_the_last_unpublish_and_no_other_takes_the_view_and_the_gc_root(node: Node) -> None:
    for name, writable in (("a", False), ("b", True)):
        await node.publish(node.shapes, name, writable=writable)
    await node.unpublish("a")
    assert node.store.roots() == {node.shapes.basename}
    closure = await node.store.query(node.shapes)
    require_shows(node.pods / "b", node.store, [info.path for info in closure.paths])
    await node.unpublish("b")
    assert await node.left() == []


async def test_a_directory_of_ours_is_made_for_kubelet_only(node: Node) -> None:
    node.volumes.published(node.pods / "a")
    request = node.request(node.small)
    before = os.umask(0)
    try:
        await node.volumes.publish(request)
    finally:
        os.umask(before)
    run("umount", request.target)
    assert request.target.stat().st_mode & 0o7777 == 0o750
    await node.unpublish()


@both
async def test_an_empty_directory_that_is_already_there_is_used(node: Node, writable: bool) -> None:
    (node.pods / "a").mkdir()
    target = await node.publish(node.small, writable=writable)
    assert (target / "store" / node.small.basename / "bin/hello").read_text() == "small-1.0"


async def test_another_closure_or_access_at_a_published_target_is_a_conflict_that_names_both(node: Node) -> None:
    target = await node.publish(node.shapes)
    before = mount_ids(target)
    with pytest.raises(Conflict, match=r"root-1.0 \(read-only\), not .*small-1.0 \(read-only\)"):
        await node.publish(node.small)
    with pytest.raises(Conflict, match=r"root-1.0 \(read-only\), not .*root-1.0 \(writable\)"):
        await node.publish(node.shapes, writable=True)
    assert mount_ids(target) == before
    assert node.store.roots() == {node.shapes.basename}


async def test_another_writable_volume_at_a_published_target_is_a_conflict(node: Node) -> None:
    target = await node.publish(node.shapes, writable=True)
    with pytest.raises(Conflict, match="another volume"):
        await node.volumes.publish(PublishRequest("csi-other", target, node.shapes, writable=True))


def make_file(target: Path, _: Path) -> None:
    target.write_text("somebody's")


def make_link(target: Path, scratch: Path) -> None:
    (scratch / "elsewhere").mkdir()
    target.symlink_to(scratch / "elsewhere")


def make_full(target: Path, _: Path) -> None:
    (target / "precious").mkdir(parents=True)


BAD_TARGETS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a file": (make_file, "is a file"),
    "a symbolic link": (make_link, "is a symbolic link"),
    "a directory with something in it": (make_full, "'precious'"),
}


@both
@pytest.mark.parametrize(("make", "said"), BAD_TARGETS.values(), ids=BAD_TARGETS.keys())
async def test_a_target_that_is_not_ours_is_refused_by_both_calls_and_left_as_it_is(
    node: Node, make: Callable[[Path, Path], None], said: str, writable: bool
) -> None:
    make(node.pods / "a", node.scratch)
    before = metadata(node.pods)
    with pytest.raises(TargetUnusable, match=said):
        await node.publish(node.shapes, writable=writable)
    with pytest.raises(TargetUnusable):
        await node.unpublish()
    assert metadata(node.pods) == before
    assert mounts_below(node.scratch) == []
    assert await node.left() == ["target a"]


async def test_a_target_whose_parent_is_missing_is_refused(node: Node) -> None:
    with pytest.raises(TargetUnusable, match="does not exist"):
        await node.publish(node.shapes, "no/parent")
    assert await node.left() == []


@both
async def test_a_foreign_mount_at_the_target_is_never_touched(node: Node, writable: bool) -> None:
    target = node.pods / "a"
    target.mkdir()
    run("mount", "-t", "tmpfs", "somebodys", target)
    before = mount_ids(target)
    with pytest.raises(Conflict, match=r"tmpfs mount of 'somebodys'"):
        await node.publish(node.shapes, writable=writable)
    with pytest.raises(Conflict, match=r"tmpfs mount of 'somebodys'"):
        await node.unpublish()
    assert mount_ids(target) == before
    assert await node.left() == [f"mount {target}", "target a"]


async def test_a_mount_stacked_on_ours_by_a_pod_goes_with_it(node: Node) -> None:
    target = await node.publish(node.shapes)
    run("mount", "-t", "tmpfs", "over", target)
    assert len(mount_ids(target)) == 2
    await node.unpublish()
    assert await node.left() == []


async def test_a_volume_in_use_is_not_unpublished_until_it_is_free(node: Node) -> None:
    target = await node.publish(node.shapes)
    with (
        (target / "store" / node.shapes.basename / "bin/hello").open(),
        pytest.raises(CknixError, match="still uses it"),
    ):
        await node.unpublish()
    assert node.volumes.published(target) is not None
    await node.unpublish()
    assert await node.left() == []


@pytest.mark.parametrize(
    "name", ["with space", "new\nline", "tab\t", "back\\slash", "comma,colon:", "\udcff\udcfe", "#"]
)
@both
async def test_any_name_of_a_target_works(node: Node, name: str, writable: bool) -> None:
    target = await node.publish(node.small, name, writable=writable)
    assert (target / "store" / node.small.basename / "bin/hello").read_text() == "small-1.0"
    await node.publish(node.small, name, writable=writable)
    assert len(mounts_below(node.pods)) == 1
    await node.unpublish(name)
    assert await node.left() == []


@pytest.mark.parametrize("volume_id", ["pvc/with/slashes", "..", ".", "-x", "", "v" * 300, "/nix", "a\nb", "~x"])
async def test_any_volume_id_works_and_stays_in_its_place(node: Node, volume_id: str) -> None:
    for target in (node.pods / "a", node.pods / "b"):
        await node.volumes.publish(PublishRequest(volume_id, target, node.small, writable=True))
        (target / "store/mark").write_text(target.name)
    assert {(node.pods / name / "store/mark").read_text() for name in "ab"} == {"a", "b"}
    assert len(os.listdir(node.data / "volumes")) == 1
    for target in (node.pods / "a", node.pods / "b"):
        await node.volumes.unpublish(volume_id, target)
    assert await node.left() == []


@pytest.mark.parametrize("name", ["n" * 300, "/".join(["d" * 200] * 25)], ids=["a name", "a path"])
async def test_a_target_that_is_too_long_is_refused_and_holds_nothing(node: Node, name: str) -> None:
    target = node.pods / name
    with pytest.raises(TargetUnusable, match="too long"):
        await node.volumes.publish(PublishRequest("v", target, node.small, writable=False))
    await node.volumes.unpublish("v", target)
    assert node.volumes.published(target) is None
    assert await node.left() == []


async def test_a_parent_that_is_a_link_is_followed(node: Node) -> None:
    (node.scratch / "kubelet").symlink_to(node.pods)
    request = PublishRequest("v", node.scratch / "kubelet/a", node.small, writable=True)
    await node.volumes.publish(request)
    await node.volumes.publish(request)
    assert len(mount_ids(node.pods / "a")) == 1
    await node.volumes.unpublish("v", request.target)
    assert await node.left() == []


async def test_fifty_publishes_at_once_and_then_fifty_unpublishes_leave_nothing(node: Node) -> None:
    roots = [node.shapes, node.small, fill_small(node.store, "third-1.0", [node.small])]
    names = [f"pod-{number}" for number in range(50)]
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(names):
            group.create_task(node.publish(roots[number % 3], name, writable=number % 2 == 0))
    for number, name in enumerate(names):
        closure = await node.store.query(roots[number % 3])
        shown = set(os.listdir(node.pods / name / "store")) - {".links"}
        assert shown == {info.path.basename for info in closure.paths}
    assert node.store.roots() == {root.basename for root in roots}
    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(node.unpublish(name))
    assert await node.left() == []


async def test_publish_and_unpublish_of_one_closure_by_different_pods_never_meet_badly(node: Node) -> None:
    async def pod(name: str) -> None:
        for round_ in range(12):
            target = await node.publish(node.small, name, writable=(round_ + len(name)) % 3 == 0)
            assert (target / "store" / node.small.basename / "bin/hello").read_text() == "small-1.0"
            assert node.store.roots() == {node.small.basename}
            await node.unpublish(name)

    async with asyncio.TaskGroup() as group:
        for name in ("a", "bb", "ccc", "dddd"):
            group.create_task(pod(name))
    assert await node.left() == []


async def test_the_same_publish_many_times_at_once_makes_one_mount(node: Node) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(node.publish(node.small, writable=True))
    assert len(mounts_below(node.pods)) == 1


async def test_two_volumes_that_want_one_target_at_once_get_one_winner(node: Node) -> None:
    roots = [node.small, node.shapes] * 2
    requests = [PublishRequest(f"v{at}", node.pods / "a", root, writable=True) for at, root in enumerate(roots)]
    results = await asyncio.gather(*map(node.volumes.publish, requests), return_exceptions=True)
    assert [type(result) for result in results if isinstance(result, BaseException)] == [Conflict] * 3
    assert len(mount_ids(node.pods / "a")) == 1


async def test_a_volume_reaches_mount_namespaces_that_follow_ours_and_leaves_them_again(node: Node) -> None:
    run("mount", "--bind", node.scratch, node.scratch)
    run("mount", "--make-shared", node.scratch)
    follower = subprocess.Popen(["unshare", "--mount", "--propagation", "slave", "cat"], stdin=subprocess.PIPE)
    try:
        table = Path(f"/proc/{follower.pid}/mountinfo")
        while Path(f"/proc/{follower.pid}/comm").read_text() != "cat\n":
            await asyncio.sleep(0.01)
        for name, writable in (("a", False), ("b", True)):
            target = await node.publish(node.small, name, writable=writable)
            assert f" {target} " in table.read_text()
        for name in ("a", "b"):
            await node.unpublish(name)
        assert "cknix:" not in table.read_text()
    finally:
        assert follower.stdin is not None
        follower.stdin.close()
        follower.wait(10)


async def test_two_processes_cannot_work_on_one_data_root(node: Node) -> None:
    await node.publish(node.small)
    other = Node(node.scratch)
    with pytest.raises(DataRootTaken, match=str(node.data)):
        await other.publish(node.small, "b")
    await node.volumes.close()
    await other.publish(node.small, "b")
    await other.volumes.close()


async def test_what_a_killed_process_was_about_to_start_may_hold_its_data_root_for_a_moment(node: Node) -> None:
    await node.publish(node.small)
    other = Node(node.scratch)
    publishing = asyncio.create_task(other.publish(node.small, "b"))
    await asyncio.sleep(0.1)
    assert not publishing.done()
    await node.volumes.close()
    await publishing
    await other.volumes.close()


async def test_volumes_of_another_data_root_are_foreign(node: Node) -> None:
    target = await node.publish(node.small)
    (node.scratch / "second").mkdir()
    other = Node(node.scratch / "second")
    assert fill_small(other.store, "small-1.0") == node.small
    report = await other.volumes.reconcile()
    assert report.adopted == []
    with pytest.raises(Conflict, match="did not mount"):
        await other.volumes.publish(PublishRequest("v", target, node.small, writable=False))
    await other.publish(node.small)
    await other.unpublish()
    assert await other.left() == []
    assert (target / "store" / node.small.basename / "bin/hello").read_text() == "small-1.0"
