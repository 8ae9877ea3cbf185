"""Faults that drivers like this one have had and that no other test here is about; docs/faults.md lists them all."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.volumes.mounts import KernelMounts
from tests.kernel.kinds import KINDS, READ_ONLY
from tests.kernel.node import Node, mounts_below, run
from tests.kernel.points import points_of, struck_at
from tests.kernel.test_crash_points import Crashed, by_process, now

kinds = pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS.keys())


@kinds
async def test_nothing_of_ours_is_in_kubelets_directories_but_the_target(node: Node, arguments: dict[str, Any]) -> None:
    target = await node.publish(node.small, **arguments)
    assert os.listdir(node.pods) == ["a"]
    assert sorted(os.listdir(target)) == ["store", "var"]
    await node.unpublish()
    assert os.listdir(node.pods) == []


@pytest.mark.parametrize("arguments", READ_ONLY.values(), ids=READ_ONLY.keys())
def test_at_no_point_of_a_publish_is_a_read_only_volume_mounted_writable(
    scratch: Path, arguments: dict[str, Any]
) -> None:
    crashed = Crashed(scratch)
    publish = by_process(scratch, lambda node: node.publish(crashed.root, **arguments))
    target = str(scratch / "pods/a")

    def look() -> None:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            assert fields[4] != target or fields[5].split(",")[0] == "ro"

    points = points_of(publish)
    now(scratch, lambda node: node.unpublish())
    for point in range(points - 12, points + 1):  # the mounts are the last of a publish
        assert struck_at(point, look, publish).error == "", point
        look()
        assert mounts_below(Path(target)) == [target]
        now(scratch, lambda node: node.unpublish())


@kinds
async def test_a_namespace_that_keeps_a_copy_of_a_volume_does_not_hold_up_its_end(
    node: Node, arguments: dict[str, Any]
) -> None:
    """As another container's, made while the volume was mounted: rmdir(2) of the target must not wait for it."""
    target = await node.publish(node.small, **arguments)
    held = subprocess.Popen(
        ("unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; read line"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert held.stdout is not None
    held.stdout.readline()
    try:
        await node.unpublish()
        assert not target.exists()
        assert await node.left() == []
        await node.publish(node.small, **arguments)
        await node.unpublish()
        assert await node.left() == []
    finally:
        held.communicate(b"\n")


def test_a_writable_copy_of_a_mount_that_is_read_only_is_no_read_only_volume(scratch: Path) -> None:
    """Else a disk that was mounted read-only for a while left volumes that are not what was asked for."""
    for name in ("disk", "pod"):
        (scratch / name).mkdir()
    run("mount", "-t", "tmpfs", "cknix-test", scratch / "disk")
    (scratch / "disk/nix").mkdir()
    run("mount", "-o", "remount,ro", scratch / "disk")
    KernelMounts().clone(f"{scratch}/disk/nix", f"{scratch}/pod", writable=True)
    run("mount", "-o", "remount,rw", scratch / "disk")
    (scratch / "pod/new").touch()
    for name in ("pod", "disk"):
        run("umount", scratch / name)
