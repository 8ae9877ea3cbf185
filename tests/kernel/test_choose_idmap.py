"""What the chooser relies on for pods with ``hostUsers: false``: which mounts the kernel id-maps, as a runtime will."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cknix_csi.volumes import syscalls
from cknix_csi.volumes.copytree import CopyEngine
from cknix_csi.volumes.farm import Farms, furnish, settle
from cknix_csi.volumes.linking import LinkEngine
from cknix_csi.volumes.mounts import KernelMounts
from cknix_csi.volumes.trash import Trash
from cknix_csi.volumes.view import Var
from tests.kernel.node import Node, metadata, run

MOUNTS = KernelMounts()
FIRST_ID = 200_000


@pytest.fixture
def user_namespace() -> Iterator[int]:
    """A descriptor of a user namespace that maps ids from 0 to those from FIRST_ID, as a runtime makes one."""
    child = subprocess.Popen(("unshare", "--user", "cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"!")
        child.stdin.flush()
        assert os.read(child.stdout.fileno(), 1) == b"!"  # unshare is behind it
        for kind in ("uid", "gid"):
            Path(f"/proc/{child.pid}/{kind}_map").write_text(f"0 {FIRST_ID} 65536")
        with syscalls.owned(os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY)) as namespace:
            yield namespace
    finally:
        child.kill()
        child.communicate()


async def farm(node: Node) -> Farms:
    """A farm of the closure ``node.small``."""
    for name in ("farms", "trash"):
        (node.data / name).mkdir(exist_ok=True)
    trash = Trash(str(node.data / "trash"))
    farms = Farms(str(node.data / "farms"), node.store.store_dir, trash, LinkEngine(), Var())
    closure = await node.store.query(node.small)
    building = farms.reserve()
    await farms.begin(building, closure)
    await node.store.write_state(closure, Path(building, "tree"))
    farms.complete(building, closure.id)
    return farms


def idmapped(volume: Path, at: Path, namespace: int) -> None:
    """What containerd and runc do with a volume of such a pod: a copy of its mount, id-mapped, goes into the pod."""
    flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
    with syscalls.owned(syscalls.open_tree(str(volume), flags)) as tree:
        syscalls.idmap_mount(tree, namespace)
        syscalls.move_mount(tree, str(at))


async def test_a_published_farm_can_be_id_mapped_and_stays_read_only(node: Node, user_namespace: int) -> None:
    farms = await farm(node)
    target, pod = node.pods / "target", node.pods / "pod"
    target.mkdir()
    pod.mkdir()
    MOUNTS.clone(farms.origin(node.small.basename), str(target), writable=False)
    idmapped(target, pod, user_namespace)
    program = pod / "store" / node.small.basename / "bin/hello"
    assert program.read_text() == "small-1.0"
    assert (program.stat().st_uid, program.stat().st_gid) == (FIRST_ID, FIRST_ID)
    assert program.samefile(node.store.store_dir / node.small.basename / "bin/hello")
    with pytest.raises(OSError) as refused:
        program.chmod(0o777)
    assert refused.value.errno == errno.EROFS
    options = run("findmnt", "--noheadings", "--output", "VFS-OPTIONS", "--mountpoint", pod).strip().split(",")
    assert {"ro", "nosuid", "nodev", "idmapped"} <= set(options)
    for mount in (pod, target):
        MOUNTS.unmount(str(mount))


async def test_a_pod_of_a_user_namespace_cannot_make_its_farm_writable(node: Node) -> None:
    """What makes a farm without an overlay safe: mounts that come from outside are locked as they are."""
    farms = await farm(node)
    target = node.pods / "target"
    target.mkdir()
    MOUNTS.clone(farms.origin(node.small.basename), str(target), writable=False)
    in_namespace = ("unshare", "--user", "--map-root-user", "--mount", "--propagation", "unchanged")
    attempt = 'mount -o remount,bind,rw "$1" || echo refused; touch "$1/store/new" 2>/dev/null || echo read-only'
    said = run(*in_namespace, "sh", "-c", attempt, "-", target)
    assert said.split() == ["refused", "read-only"]
    MOUNTS.unmount(str(target))


async def test_a_private_copy_can_be_id_mapped_and_written_to_by_the_pods_root(node: Node, user_namespace: int) -> None:
    closure = await node.store.query(node.small)
    copy, target, pod = node.data / "copy", node.pods / "target", node.pods / "pod"
    await furnish(str(copy), closure, node.store.store_dir, CopyEngine(), Var())
    settle(str(copy), Var())
    before = metadata(node.store.store_dir, content=True)
    for directory in (target, pod):
        directory.mkdir()
    MOUNTS.clone(f"{copy}/nix", str(target), writable=True)
    idmapped(target, pod, user_namespace)
    root_of_the_pod = ("setpriv", f"--reuid={FIRST_ID}", f"--regid={FIRST_ID}", "--clear-groups")
    inside = pod / "store" / node.small.basename / "bin/hello"
    node.scratch.chmod(0o755)  # or this user could not come so far
    run(*root_of_the_pod, "chmod", "0755", inside)
    run(*root_of_the_pod, "sh", "-c", 'echo changed >"$1"', "-", inside)
    run(*root_of_the_pod, "touch", pod / "store/new")
    assert (copy / "nix/store/new").stat().st_uid == 0
    assert (copy / "nix/store" / node.small.basename / "bin/hello").read_text() == "changed\n"
    assert metadata(node.store.store_dir, content=True) == before
    for mount in (pod, target):
        MOUNTS.unmount(str(mount))


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
async def test_a_redirect_view_cannot_be_id_mapped(node: Node, user_namespace: int, writable: bool) -> None:
    target, pod = await node.publish(node.small, writable=writable), node.pods / "pod"
    pod.mkdir()
    with pytest.raises(OSError) as refused:
        idmapped(target, pod, user_namespace)
    assert refused.value.errno == errno.EINVAL


async def test_nor_can_an_overlay_over_a_farm(node: Node, user_namespace: int) -> None:
    farms = await farm(node)
    target, pod = node.pods / "target", node.pods / "pod"
    target.mkdir()
    pod.mkdir()
    MOUNTS.overlay(str(target), source="cknix-test", lower=farms.layers(node.small.basename), upper=None)
    with pytest.raises(OSError) as refused:
        idmapped(target, pod, user_namespace)
    assert refused.value.errno == errno.EINVAL
    MOUNTS.unmount(str(target))
