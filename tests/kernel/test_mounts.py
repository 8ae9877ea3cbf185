"""The mounts themselves, without volumes around them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cknix_csi.api.errors import MountFailed
from cknix_csi.volumes import syscalls
from cknix_csi.volumes.mounts import KernelMounts
from tests.kernel.node import mount_ids, run

MOUNTS = KernelMounts()


@pytest.fixture
def places(scratch: Path) -> tuple[Path, Path]:
    """A directory with a file, and an empty one."""
    origin, target = scratch / "origin", scratch / "target"
    origin.mkdir()
    target.mkdir()
    (origin / "file").write_text("content")
    return origin, target


def test_a_read_only_copy_of_a_writable_directory_refuses_writes(places: tuple[Path, Path]) -> None:
    origin, target = places
    MOUNTS.clone(str(origin), str(target), writable=False)
    with pytest.raises(OSError) as refused:
        (target / "new").touch()
    assert refused.value.errno == errno.EROFS
    (origin / "new").touch()


def test_a_writable_copy_takes_writes_but_no_devices_or_setuid(places: tuple[Path, Path]) -> None:
    origin, target = places
    MOUNTS.clone(str(origin), str(target), writable=True)
    (target / "new").touch()
    assert (origin / "new").exists()
    options = run("findmnt", "--noheadings", "--output", "VFS-OPTIONS", "--mountpoint", target).strip().split(",")
    assert {"rw", "nosuid", "nodev"} <= set(options)


def test_a_target_that_is_a_link_is_not_followed(places: tuple[Path, Path]) -> None:
    origin, target = places
    link = target.parent / "link"
    link.symlink_to(target)
    with pytest.raises(MountFailed):
        MOUNTS.clone(str(origin), str(link), writable=False)
    assert mount_ids(target) == []


def test_everything_stacked_on_a_target_is_unmounted_and_nothing_else(places: tuple[Path, Path]) -> None:
    origin, target = places
    MOUNTS.clone(str(origin), str(origin), writable=True)
    for _ in range(5):
        MOUNTS.clone(str(origin), str(target), writable=False)
    assert len(mount_ids(target)) == 5
    MOUNTS.unmount(str(target))
    MOUNTS.unmount(str(target))
    assert mount_ids(target) == []
    assert len(mount_ids(origin)) == 1


def test_a_bind_of_the_same_file_system_is_seen_as_mounted(places: tuple[Path, Path]) -> None:
    origin, target = places
    assert not MOUNTS.mounted(str(target))
    run("mount", "--bind", origin, target)
    assert target.stat().st_dev == target.parent.stat().st_dev
    assert MOUNTS.mounted(str(target))
    assert not MOUNTS.mounted(str(target / "file"))
    assert not MOUNTS.mounted(str(target / "file/below"))
    assert not MOUNTS.mounted(str(target / "none"))
    run("umount", target)
    assert not MOUNTS.mounted(str(target))


def test_no_descriptor_is_left_open(places: tuple[Path, Path]) -> None:
    origin, target = places
    layers = [str(origin / "upper"), str(origin / "lower")]
    for layer in layers:
        os.mkdir(layer)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        MOUNTS.clone(str(origin), str(target), writable=False)
        MOUNTS.overlay(str(target), source="cknix-test", lower=layers, upper=None)
        MOUNTS.unmount(str(target))
        with pytest.raises(MountFailed):
            MOUNTS.clone(str(origin), str(target / "none"), writable=False)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_mount_that_a_name_is_in_is_told_by_the_id_of_the_mount_table(places: tuple[Path, Path]) -> None:
    origin, target = places
    (origin / "link").symlink_to(target)
    for _ in range(2):
        MOUNTS.clone(str(origin), str(target), writable=False)
    with syscalls.owned(os.open(target.parent, os.O_PATH | os.O_DIRECTORY)) as parent:
        beside = syscalls.statx_mount_id(parent, "origin")
        assert syscalls.statx_mount_id(parent, "origin/link") == beside
        assert str(syscalls.statx_mount_id(parent, "target")) in mount_ids(target)
        MOUNTS.unmount(str(target))
        assert syscalls.statx_mount_id(parent, "target") == beside
        with pytest.raises(FileNotFoundError):
            syscalls.statx_mount_id(parent, "none")
