"""What privileged pods leave mounted inside their volumes, and what administrators mount in our directories."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cknix_csi.api.errors import CknixError, MountFailed
from cknix_csi.volumes import syscalls
from cknix_csi.volumes.failures import TargetUnusable
from cknix_csi.volumes.mountinfo import Mount, MountTable, escape
from cknix_csi.volumes.mounts import KernelMounts
from tests.kernel.node import Node, mount_ids, mounts_below, run
from tests.kernel.test_failure import calls_of, kill_at

both = pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
_MOVE_MOUNT_BENEATH = 0x200


def tmpfs(target: Path | str, source: str = "pods-own") -> None:
    run("mount", "-t", "tmpfs", source, target)


@pytest.fixture
def precious(scratch: Path) -> Path:
    """A directory that a pod may show inside its volume, and nobody may empty."""
    directory = scratch / "precious"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep/file").write_text("precious")
    return directory


def on_a_store_path(_volume: Path, _precious: Path, own: Path) -> None:
    tmpfs(own)


def on_a_store_path_from_elsewhere(_: Path, precious: Path, own: Path) -> None:
    run("mount", "--bind", precious, own)


def stacked(_: Path, precious: Path, own: Path) -> None:
    tmpfs(own)
    (own / "under").mkdir()
    tmpfs(own / "under")
    run("mount", "--bind", precious, own)
    tmpfs(own / "deep")
    tmpfs(own)


def nested(_: Path, precious: Path, own: Path) -> None:
    at = own
    for level in range(5):
        tmpfs(at, f"level-{level}")
        at = at / "in"
        at.mkdir()
    run("mount", "--bind", precious, at)


def on_a_file(volume: Path, precious: Path, _: Path) -> None:
    run("mount", "--bind", precious / "deep/file", volume / "var/nix/db/db.sqlite")


def with_odd_names(_: Path, precious: Path, own: Path) -> None:
    tmpfs(own)
    for name in ("a space", "new\nline", "tab\t", "back\\slash", r"oct\040al", "\udcff\udcfe", "gone (deleted)", "#"):
        (own / name).mkdir()
        run("mount", "--bind", precious, own / name)
        tmpfs(own / name / "deep")


def in_the_whole_volume(volume: Path, precious: Path, own: Path) -> None:
    tmpfs(own)
    tmpfs(volume)
    (volume / "x").mkdir()
    run("mount", "--bind", precious, volume / "x")


def of_the_volume_itself(volume: Path, _: Path, own: Path) -> None:
    run("mount", "--bind", volume, own)


def an_inner_one_first_and_then_what_covers_it(_: Path, precious: Path, own: Path) -> None:
    """Both stand on the same mount, so that neither holds the other; the path of the inner one leads elsewhere."""
    tmpfs(own)
    (own / "outer/inner").mkdir(parents=True)
    (own / "outer/link").mkdir()
    run("mount", "--bind", precious, own / "outer/inner")
    tmpfs(own / "outer/link")
    run("mount", "--bind", precious, own / "outer")
    (own / "outer/inner").mkdir(exist_ok=True)
    tmpfs(own / "outer/inner", "visible")
    (precious / "link").symlink_to(precious / "deep")


LEFT_BY_PODS: dict[str, Callable[[Path, Path, Path], None]] = {
    make.__name__.replace("_", " "): make
    for make in (
        on_a_store_path,
        on_a_store_path_from_elsewhere,
        stacked,
        nested,
        on_a_file,
        with_odd_names,
        in_the_whole_volume,
        of_the_volume_itself,
        an_inner_one_first_and_then_what_covers_it,
    )
}


@both
@pytest.mark.parametrize("leave", LEFT_BY_PODS.values(), ids=LEFT_BY_PODS.keys())
async def test_what_a_pod_left_mounted_inside_goes_with_its_volume_and_keeps_its_content(
    node: Node, precious: Path, leave: Callable[[Path, Path, Path], None], writable: bool
) -> None:
    volume = await node.publish(node.small, writable=writable)
    leave(volume, precious, volume / "store" / node.small.basename / "bin")
    assert len(mounts_below(volume)) > 1
    await node.unpublish()
    assert (precious / "deep/file").read_text() == "precious"
    assert await node.left() == []


async def test_a_mount_slid_beneath_ours_goes_with_it(node: Node, precious: Path) -> None:
    volume = await node.publish(node.small)
    inside = volume / "store" / node.small.basename / "bin"
    tmpfs(inside)
    for target in (inside, volume):
        with syscalls.owned(syscalls.open_tree(str(precious), syscalls.OPEN_TREE_CLONE)) as tree:
            beneath(tree, target)
    assert len(mount_ids(volume)) == 2
    await node.unpublish()
    assert (precious / "deep/file").exists()
    assert await node.left() == []


def beneath(tree: int, target: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_long(syscalls.MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_BENEATH)
    at = ctypes.c_long(syscalls.AT_FDCWD)
    if libc.syscall(ctypes.c_long(429), ctypes.c_long(tree), b"", at, os.fsencode(target), flags) != 0:
        pytest.skip(f"MOVE_MOUNT_BENEATH needs Linux 6.5: {os.strerror(ctypes.get_errno())}")


async def test_a_busy_mount_inside_holds_the_volume_until_it_is_free_and_is_named(node: Node, precious: Path) -> None:
    volume = await node.publish(node.small, writable=True)
    for name in ("idle", "used"):
        (volume / name).mkdir()
        tmpfs(volume / name, f"tmpfs-{name}")
    (volume / "used/data").write_text("still wanted")
    user = subprocess.Popen(["cat"], cwd=volume / "used", stdin=subprocess.PIPE)
    try:
        with pytest.raises(MountFailed, match=rf"tmpfs mount of 'tmpfs-used' at {volume}/used: .*still uses it"):
            await node.unpublish()
        assert Path(f"/proc/{user.pid}/cwd/data").read_text() == "still wanted"
        assert str(volume / "used") in mounts_below(volume)
        assert node.volumes.published(volume) is not None
        assert node.store.roots() == {node.small.basename}
    finally:
        assert user.stdin is not None
        user.stdin.close()
        user.wait(10)
    await node.unpublish()
    assert await node.left() == []


@pytest.mark.parametrize("user", [0, 65534], ids=["of-root", "of-another-user"])
async def test_a_mount_inside_that_lost_its_server_is_unmounted(node: Node, user: int) -> None:
    volume = await node.publish(node.small, writable=True)
    (volume / "fuse").mkdir()
    dead_fuse(volume / "fuse", user)
    with pytest.raises(OSError, match=r"not connected|Permission denied"):
        os.listdir(volume / "fuse")
    await node.unpublish()
    assert await node.left() == []


def dead_fuse(target: Path, user: int) -> None:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse here")
    libc = ctypes.CDLL(None, use_errno=True)
    with syscalls.owned(os.open("/dev/fuse", os.O_RDWR)) as server:
        options = f"fd={server},rootmode=40000,user_id={user},group_id={user}".encode()
        done = libc.mount(b"dead", os.fsencode(target), b"fuse", ctypes.c_ulong(0), options)
        assert done == 0, os.strerror(ctypes.get_errno())


async def test_a_loop_device_on_a_file_of_the_volume_goes_too(node: Node) -> None:
    volume = await node.publish(node.small, writable=True)
    (volume / "mounted").mkdir()
    with open(volume / "image", "wb") as image:
        image.truncate(4 << 20)
    run("mkfs.ext4", "-q", volume / "image")
    run("mount", "-o", "loop", volume / "image", volume / "mounted")
    await node.unpublish()
    assert await node.left() == []


async def test_a_mount_beside_the_target_or_hidden_below_it_is_not_inside_and_stays(node: Node) -> None:
    beside, hidden, peer = node.pods / "a-beside", node.pods / "a/hidden", node.scratch / "peer"
    for directory in (beside, hidden.parent, peer):
        directory.mkdir()
    run("mount", "--bind", node.pods, node.pods)
    run("mount", "--make-shared", node.pods)
    await node.publish(node.small)
    tmpfs(beside)
    run("mount", "--bind", node.pods, peer)
    (peer / "a/hidden").mkdir()
    tmpfs(peer / "a/hidden")  # its copy is where the volume covers it
    run("mount", "--make-rprivate", peer)
    run("umount", "--lazy", peer)
    assert len(mount_ids(hidden)) == 1
    with pytest.raises(TargetUnusable, match="not this driver's"):
        await node.unpublish()
    assert mounts_below(node.pods) == [str(node.pods), str(beside), str(hidden)]
    run("umount", hidden)
    hidden.rmdir()
    await node.unpublish()
    assert mounts_below(node.pods) == [str(node.pods), str(beside)]


async def test_a_directory_that_became_a_link_is_not_followed(node: Node, precious: Path) -> None:
    tmpfs(precious / "deep", "not-the-pods")
    table = KernelMounts().table()
    (mount,) = table.sourced("not-the-pods")
    (node.pods / "link").symlink_to(precious)
    with pytest.raises(MountFailed, match="Too many levels of symbolic links"):
        KernelMounts().unmount_one(Mount(**{**fields(mount), "target": str(node.pods / "link/deep")}))
    assert len(mount_ids(precious / "deep")) == 1


def fields(mount: Mount) -> dict[str, Any]:
    return {field.name: getattr(mount, field.name) for field in dataclasses.fields(mount)}


async def test_a_mount_that_was_covered_or_taken_away_since_the_table_was_read_is_left_to_the_next_look(
    node: Node,
) -> None:
    mounts, at = KernelMounts(), node.pods / "a"
    at.mkdir()
    tmpfs(at, "first")
    (first,) = mounts.table().sourced("first")
    tmpfs(at, "second")
    mounts.unmount_one(first)
    assert len(mount_ids(at)) == 2
    (second,) = mounts.table().sourced("second")
    mounts.unmount_one(second)
    mounts.unmount_one(second)
    assert mount_ids(at) == [str(first.id)]
    mounts.unmount_one(first)
    at.rmdir()
    mounts.unmount_one(first)


@both
async def test_a_foreign_mount_in_a_layer_of_ours_stops_deletion_and_is_never_walked_into(
    node: Node, precious: Path, writable: bool
) -> None:
    """Only an administrator can have put it there: it is named, and unmounted by nobody but him."""
    await node.publish(node.small, writable=writable)
    layer = next(node.data.glob("volumes/*/*/upper" if writable else "views/*/meta/nix/var"))
    (layer / "in").mkdir()
    run("mount", "--bind", precious, layer / "in")
    with pytest.raises(CknixError, match=f"still used by the mount at {layer}/in"):
        await node.unpublish()
    await node.restart()
    report = await node.volumes.reconcile()
    assert [f"still used by the mount at {layer}/in" in problem for problem in report.problems] == [True]
    await node.volumes.close()
    assert len(mount_ids(layer / "in")) == 1
    assert (precious / "deep/file").exists()
    run("umount", layer / "in")
    await node.restart()
    await node.unpublish()
    assert await node.left() == []


@both
async def test_an_unpublish_killed_between_the_mounts_inside_is_finished_by_the_next(
    node: Node, precious: Path, writable: bool
) -> None:
    def leave(volume: Path) -> None:
        stacked(volume, precious, volume / "store" / node.small.basename / "bin")

    leave(await node.publish(node.small, writable=writable))
    assert (await calls_of(node, node.unpublish)).count("unmount_one") == 6
    step = 0
    while True:
        step += 1
        leave(await node.publish(node.small, writable=writable))
        await node.volumes.close()
        if (done := kill_at(node, [{"do": "unpublish"}], step, "after")) == 0:
            break
        assert done == -signal.SIGKILL
        await node.restart()
        await node.unpublish()
        assert (precious / "deep/file").exists()
        assert await node.left() == []
    assert step > 12


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[int, str]]:
    """Mounts as (parent, path below it): each stands on an earlier one, or for -1 on the volume."""
    count = draw(st.integers(1, 12))
    paths = st.sampled_from(["", "/a", "/a/b", "/a/b/c", "/d", "/a b"])
    return [(draw(st.integers(-1, number - 1)), draw(paths)) for number in range(count)]


@given(trees(), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_in_whatever_way_mounts_stand_on_each_other_none_is_unmounted_before_what_holds_or_covers_it(
    tree: list[tuple[int, str]], order: Random
) -> None:
    targets: list[str] = []
    for parent, path in tree:
        targets.append(("/t" if parent < 0 else targets[parent]) + path)
    lines = [b"10 1 0:1 / /t rw - overlay o rw\n", b"11 1 0:1 / /t2 rw - tmpfs beside rw\n"]
    for number, ((parent, _), target) in enumerate(zip(tree, targets, strict=True)):
        line = b"%d %d 0:1 / " % (100 + number, 10 if parent < 0 else 100 + parent)
        lines.append(line + escape(target) + b" rw - tmpfs x rw\n")
    order.shuffle(lines)
    table = MountTable(b"".join(lines))
    (volume,) = table.at("/t")[:1]
    left = {mount.id: mount for mount in table.inside_out(volume)}
    assert len(left) == len(tree) + 1
    for mount in table.inside_out(volume):
        del left[mount.id]
        for other in left.values():
            assert other.parent != mount.id, "it still holds one"
            if other.parent == mount.parent:
                assert not mount.target.startswith(f"{other.target}/"), "it is still covered"
