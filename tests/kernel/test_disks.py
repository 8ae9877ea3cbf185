"""Disks that fail a driver at any point of its work: full, out of inodes, read-only, dead, unreadable.

Everything is on one small ext4 file system: the store, the data root and kubelet's pods.  The fault is the kernel's own
and comes just before a call that changes something; see points.py.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.errors import OutOfSpace
from cknix_csi.api.limits import Limit
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes.copies import Copies
from cknix_csi.volumes.failures import LimitReached
from tests.kernel.kinds import KINDS
from tests.kernel.node import Node, mounts_below, require_shows, run
from tests.kernel.points import Outcome, points_of, struck_at
from tests.kernel.store import fill_small, seal
from tests.kernel.test_crash_points import Crashed, by_process, now

LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_REMOUNT = 1, 32
EXT4_IOC_SHUTDOWN = 0x8004587D
AT_ONCE = b"\2\0\0\0"
"""Without writing back anything: EXT4_GOING_FLAGS_NOLOGFLUSH."""
POINTS = int(os.environ.get("CKNIX_TEST_POINTS", "4"))
"""At how many points of an operation, chosen by chance, each fault comes."""

DIFFERENT = ("view", "writable view on a disk of its own", "farm", "writable copy")
kinds = pytest.mark.parametrize("arguments", [KINDS[kind] for kind in DIFFERENT], ids=DIFFERENT)


class Disk:
    """A small ext4 file system on a loop device, and what can befall it."""

    def __init__(self, scratch: Path) -> None:
        self.image = scratch / "disk.img"
        self.at = scratch / "disk"
        self.at.mkdir()
        with self.image.open("xb") as file:
            file.truncate(48 << 20)
        run("mkfs.ext4", "-q", "-m", "0", "-N", "512", "-J", "size=4", self.image)
        self.mount()

    def mount(self) -> None:
        run("mount", "-o", "loop", self.image, self.at)

    def sync(self) -> None:
        """What is there now survives a death of the disk."""
        run("sync", "--file-system", self.at)

    def unmount(self) -> None:
        """With all that is mounted on it, as a reboot does."""
        for target in reversed(mounts_below(self.at)):
            run("umount", "--lazy", target)

    def heal(self) -> None:
        """What an administrator does: make room, or check the disk and mount it again."""
        for filler in self.at.glob("filler*"):
            filler.unlink()
        with suppress(OSError):
            self._remount(0)
            (self.at / "written").touch()
            (self.at / "written").unlink()
            return
        self.unmount()
        run("e2fsck", "-fy", self.image, check=False)  # answers 1 when it has repaired something
        self.mount()

    def _remount(self, flags: int) -> None:
        if LIBC.mount(None, os.fsencode(self.at), None, ctypes.c_ulong(MS_REMOUNT | flags), None) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    # Faults

    def fill(self) -> None:
        """Not one block is free."""
        with open(self.at / "filler", "wb") as file:
            end = 0
            for size in (1 << 20, 1 << 16, 1 << 12, 1 << 10):
                with suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), end, size)
                        end += size

    def use_up_inodes(self) -> None:
        with suppress(OSError):
            for number in range(10_000):
                (self.at / f"filler{number}").touch()

    def make_read_only(self) -> None:
        with suppress(OSError):  # EBUSY: a file is open for writing just now; the next point will do
            self._remount(MS_RDONLY)

    def die(self) -> None:
        """Every further access to what is not in memory is an I/O error."""
        directory = os.open(self.at, os.O_RDONLY)
        fcntl.ioctl(directory, EXT4_IOC_SHUTDOWN, AT_ONCE)
        os.close(directory)


@pytest.fixture
def disk(scratch: Path) -> Iterator[Disk]:
    disk = Disk(scratch)
    yield disk
    disk.heal()
    disk.unmount()


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("CKNIX_TEST_SEED") or random.randrange(1_000_000))
    print(f"CKNIX_TEST_SEED={seed}")
    return random.Random(seed)


FAULTS: dict[str, tuple[Callable[[Disk], None], str]] = {
    "full": (Disk.fill, "free space or inodes on that file system"),
    "out of inodes": (Disk.use_up_inodes, "free space or inodes on that file system"),
    "read-only": (Disk.make_read_only, "read-only: see the kernel log"),
    "dead": (Disk.die, "see the kernel log"),
}
"""What befalls the disk, and what the message says that helps."""
faults = pytest.mark.parametrize(("fault", "remedy"), FAULTS.values(), ids=FAULTS.keys())


def some_of(points: int, dice: random.Random) -> list[int]:
    """At most POINTS of the points from 1, always with the first and the last one."""
    among = range(2, points)
    return sorted({1, points, *dice.sample(among, min(len(among), max(0, POINTS - 2)))})


def require_told(outcome: Outcome, remedy: str, moment: str) -> None:
    assert outcome.in_words, (moment, outcome)
    assert remedy in outcome.message, (moment, outcome)


@kinds
@faults
def test_a_publish_that_a_disk_fails_is_told_undone_and_works_when_the_disk_does(
    disk: Disk, dice: random.Random, fault: Callable[[Disk], None], remedy: str, arguments: dict[str, Any]
) -> None:
    crashed = Crashed(disk.at)
    disk.sync()
    publish = by_process(disk.at, lambda node: node.publish(crashed.root, **arguments))
    points = points_of(publish)
    now(disk.at, lambda node: node.unpublish())
    told = 0
    for point in some_of(points, dice):
        moment = f"{fault.__name__} at {point} of {points}"
        outcome = struck_at(point, lambda: fault(disk), publish)
        if outcome.error:
            told += 1
            require_told(outcome, remedy, moment)
            if fault in (Disk.fill, Disk.use_up_inodes):  # undoing needs no room
                crashed.require_clean(Node(disk.at), moment)
            elif not outcome.transient:  # kubelet will not come back for this volume
                assert mounts_below(disk.at / "pods/a") == [], moment
                assert not (disk.at / "pods/a").exists(), moment
        disk.heal()
        if fault is Disk.die:
            run("umount", "--lazy", disk.at / "pods/resident", check=False)
            crashed.publish_resident()
        now(
            disk.at,
            lambda node: crashed.require_recovered(node, moment, arguments, publish=True),  # noqa: B023
        )
    assert told


@kinds
@pytest.mark.parametrize("fault", [Disk.fill, Disk.use_up_inodes], ids=["full", "out of inodes"])
def test_an_unpublish_needs_no_room(
    disk: Disk, dice: random.Random, fault: Callable[[Disk], None], arguments: dict[str, Any]
) -> None:
    crashed = Crashed(disk.at)
    now(disk.at, lambda node: node.publish(crashed.root, **arguments))
    fault(disk)
    outcome = struck_at(0, lambda: None, by_process(disk.at, lambda node: node.unpublish()))
    assert outcome.error == "", outcome
    crashed.require_clean(Node(disk.at), "after the unpublish")
    again = struck_at(0, lambda: None, by_process(disk.at, lambda node: node.unpublish()))
    assert again.error == "", again


@kinds
@pytest.mark.parametrize(("fault", "remedy"), [FAULTS["read-only"], FAULTS["dead"]], ids=["read-only", "dead"])
def test_an_unpublish_that_a_disk_fails_is_told_and_finished_when_the_disk_works(
    disk: Disk, dice: random.Random, fault: Callable[[Disk], None], remedy: str, arguments: dict[str, Any]
) -> None:
    crashed = Crashed(disk.at)
    disk.sync()
    unpublish = by_process(disk.at, lambda node: node.unpublish())
    now(disk.at, lambda node: node.publish(crashed.root, **arguments))
    points = points_of(unpublish)
    told = 0
    for point in some_of(points, dice):
        moment = f"{fault.__name__} at {point} of {points}"
        now(disk.at, lambda node: node.publish(crashed.root, **arguments))
        outcome = struck_at(point, lambda: fault(disk), unpublish)
        if outcome.error:
            told += 1
            require_told(outcome, remedy, moment)
        else:
            assert mounts_below(disk.at / "pods/a") == [], moment
        disk.heal()
        if fault is Disk.die:
            crashed.publish_resident()
        now(
            disk.at,
            lambda node: crashed.require_recovered(node, moment, {}, publish=False),  # noqa: B023
        )
    assert told


_BUT_THE_STORE = "find data pods nix/references nix/roots -type f -exec cat {} +"
IN_MEMORY = {
    "nothing": "true",
    "the data root": "ls data data/* pods",
    "all but the store": f"{_BUT_THE_STORE}; ls nix/store",
    "all but what is in store paths": f"{_BUT_THE_STORE}; ls -l nix/store",
}
"""What has been read before the disk is lost, by a shell."""


@pytest.mark.parametrize("kind", ["view", "farm"])
def test_a_disk_that_cannot_be_read_is_told_and_what_was_on_it_works_when_it_can(scratch: Path, kind: str) -> None:
    """The file of its loop device is cut: what is not in memory is gone."""
    disk = Disk(scratch)
    node = Node(disk.at)
    earlier, root = (fill_small(node.store, name) for name in ("earlier", "small"))
    now(disk.at, lambda node: node.publish(earlier, "earlier", **KINDS[kind]))
    now(disk.at, lambda node: node.unpublish("earlier"))
    disk.unmount()
    whole = scratch / "whole.img"
    run("cp", "--sparse=always", disk.image, whole)
    told = set()
    for command in IN_MEMORY.values():
        disk.mount()
        node = Node(disk.at)
        run("sh", "-c", f'cd "$1"; {command}', "-", disk.at)
        os.truncate(disk.image, 64 << 10)
        outcome = struck_at(0, lambda: None, lambda: node.publish(root, **KINDS[kind]))  # noqa: B023
        if outcome.error:
            require_told(outcome, "the disk reports errors: see the kernel log", command)
            assert mounts_below(disk.at / "pods/a") == [], command
            told.add(outcome.message)
        disk.unmount()
        run("cp", "--sparse=always", whole, disk.image)
        disk.mount()
        asyncio.run(shows(Node(disk.at), root, KINDS[kind]))
        disk.unmount()
        run("cp", "--sparse=always", whole, disk.image)
    assert len(told) > 1


async def shows(node: Node, root: StorePath, arguments: dict[str, Any]) -> None:
    require_shows(await node.publish(root, **arguments), node.store, [root])
    await node.unpublish()
    assert await node.left() == [f"mount {node.scratch}"]


@pytest.mark.parametrize("taken", ["before", "meanwhile"])
async def test_a_copy_for_which_the_nodes_disk_has_no_room_is_refused_and_not_shown_with_holes(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    """Its own file system has room, but is a sparse file on the node's disk."""
    if taken == "meanwhile":
        monkeypatch.setattr(Copies, "_free", lambda _: 1 << 40)  # there was room when that was looked at
    node = Node(disk.at)
    root, path = node.store.add("big-1.0")
    path.mkdir()
    (path / "file").write_bytes(os.urandom(12 << 20))
    seal(path)
    disk.sync()
    space = os.statvfs(disk.at)
    with open(disk.at / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - (6 << 20))
    arguments: dict[str, Any] = {"writable": True, "presentation": Presentation.COPY, "limit": Limit(24 << 20)}
    with pytest.raises(OutOfSpace, match="node's disk") as refused:
        await node.publish(root, **arguments)
    assert not isinstance(refused.value, LimitReached)
    disk.heal()
    assert await node.left() == [f"mount {disk.at}"]
    await node.restart()
    monkeypatch.undo()
    await node.publish(root, **arguments)
    disk.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert (node.pods / "a/store" / root.basename / "file").read_bytes() == (path / "file").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [({"host_users": False}, "farms"), ({"writable": True, "presentation": Presentation.COPY}, "volumes")],
    ids=["farm", "copy"],
)
async def test_a_volume_whose_files_somebody_removed_can_be_unpublished(
    scratch: Path, arguments: dict[str, Any], directory: str
) -> None:
    node = Node(scratch)
    root = fill_small(node.store, "small-1.0")
    await node.publish(root, **arguments)
    run("rm", "-r", "--one-file-system", node.data / directory)
    await node.unpublish()
    assert not (node.pods / "a").exists()
    (node.data / directory).mkdir(exist_ok=True)
    assert await node.left() == []
