"""A private mount namespace for this process, and a scratch node for each test that leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.cluster.harness.scratch import scratch_base
from tests.kernel.node import Node, mounts_below, run
from tests.kernel.store import FakeStore

CLONE_NEWNS = 0x20000
MS_REC_PRIVATE = (1 << 14) | (1 << 18)


@pytest.fixture(scope="session", autouse=True)
def private_mount_namespace() -> None:
    """No mount of a test is ever seen by the machine, and all of them end with this process."""
    if os.geteuid() != 0:
        pytest.skip("tests/kernel mounts file systems: run as root")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        pytest.skip(f"no private mount namespace: {os.strerror(ctypes.get_errno())}; CAP_SYS_ADMIN is needed")
    assert libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None) == 0


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty directory on a disk's file system (an overlay cannot be the upper layer of another)."""
    path = Path(tempfile.mkdtemp(prefix="cknix-kernel-", dir=scratch_base())).resolve()
    try:
        yield path
    finally:
        for target in reversed(mounts_below(path)):
            run("umount", "--lazy", target)
        run("rm", "--recursive", "--force", "--one-file-system", path)  # at any depth, which shutil.rmtree is not


@pytest.fixture
def store(scratch: Path) -> FakeStore:
    """A store of its own, which is empty."""
    return FakeStore(scratch / "nix")


@pytest.fixture
async def node(scratch: Path) -> AsyncIterator[Node]:
    """A node's directories, a store of two closures, and volumes on it."""
    node = Node(scratch)
    node.fill()
    try:
        yield node
    finally:
        await node.volumes.close()
