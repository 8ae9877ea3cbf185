"""Places of limited size: what a pod can write into them, what they cost the node, and how they end."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cknix_csi.api.errors import Conflict, MountFailed, OutOfSpace
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.volumes import loop, sized
from cknix_csi.volumes.failures import VolumeFailed
from cknix_csi.volumes.mounts import KernelMounts
from cknix_csi.volumes.sized import KernelSizedStorage, SizedStorage
from tests.kernel.node import mounts_below, run

MIB = 1 << 20
MOUNTS = KernelMounts()
STORAGE: SizedStorage = KernelSizedStorage(MOUNTS)

media = pytest.mark.parametrize("medium", Medium, ids=["disk", "memory"])


@pytest.fixture(autouse=True)
def no_loop_device_stays(scratch: Path) -> Iterator[None]:
    """After the test and its cleaning up, whatever it checked itself."""
    yield
    for target in reversed(mounts_below(scratch)):
        run("umount", target)
    wait_until(lambda: loops(scratch) == [])


class Pod:
    """A writable volume below *root* as a pod sees it: an overlay over a redirected package of one big file."""

    def __init__(self, root: Path, limit: Limit, name: str = "csi-a") -> None:
        self.path = root / "volumes" / name / "0123456789abcdef"
        self.store, self.meta, self.volume = root / "store", root / "meta", self.path / "m"
        if not self.store.exists():
            (self.store / "package").mkdir(parents=True)
            (self.store / "package/big").write_bytes(b"b" * 3 * MIB)
            (self.meta / "package").mkdir(parents=True)
            os.setxattr(self.meta / "package", "trusted.overlay.redirect", b"/package")
        self.volume.mkdir(parents=True)
        self.upper = STORAGE.make(str(self.path), limit)
        lower = [str(self.meta), str(self.store)]
        MOUNTS.overlay(str(self.volume), source="cknix-test", lower=lower, upper=self.upper)

    @property
    def on_disk(self) -> int:
        """Bytes that the image takes of the node's disk."""
        return (self.path / sized.IMAGE).stat().st_blocks * 512

    def end(self) -> None:
        MOUNTS.unmount(str(self.volume))
        STORAGE.release(str(self.path))


def loops(below: Path) -> list[dict[str, object]]:
    """The loop devices with a file below a directory, as losetup reports them."""
    output = run("losetup", "--list", "--json", "--output", "NAME,BACK-FILE,DIO,AUTOCLEAR")
    devices = json.loads(output)["loopdevices"] if output else []
    return [device for device in devices if f"{below}/" in str(device["back-file"])]


def left(below: Path) -> list[object]:
    return [*mounts_below(below), *loops(below)]


def on_disk(below: Path) -> int:
    """Bytes of the node's disk that all in a directory takes; what is mounted there not counted."""
    return int(run("du", "--summarize", "--one-file-system", "--block-size=1", below).split()[0])


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fill(file: Path, at_most: int, *, step: int = 65536) -> int:
    """Write until the file system is full; the bytes that found room."""
    written = 0
    with open(file, "wb", buffering=0) as opened:
        try:
            while written < at_most:
                written += opened.write(b"x" * step)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return written


# What a pod can write


@media
@pytest.mark.parametrize("size", [4 * MIB, 200 * MIB])
def test_writes_succeed_up_to_the_limit_and_hardly_beyond(scratch: Path, medium: Medium, size: int) -> None:
    pod = Pod(scratch, Limit(size, medium))
    before = on_disk(scratch)
    written = fill(pod.volume / "new", 2 * size)
    assert size <= written <= (1.06 * size if medium is Medium.DISK else size)
    os.sync()
    assert on_disk(scratch) - before <= (sized.image_size(size) if medium is Medium.DISK else 0)
    with pytest.raises(OSError) as full:
        (pod.volume / "more").write_bytes(b"x" * MIB)
    assert full.value.errno == errno.ENOSPC
    (scratch / "outside").write_bytes(b"x" * MIB)
    pod.end()
    assert left(scratch) == []


@pytest.mark.parametrize(
    "size",
    [
        *(MIB, MIB + 5, 3 * MIB // 2, 16 * MIB, 64 * MIB - 1, 64 * MIB, 100 * MIB),
        *(MIB * mebibytes for mebibytes in range(116, 124)),  # images around one block group
        *(240 * MIB, 800 * MIB, (1 << 30) - 1, 1 << 30, 10 << 30, 67_248_303_033, 1 << 40),
    ],
)
def test_as_much_is_available_as_the_limit_says_and_a_few_percent_more_at_most(scratch: Path, size: int) -> None:
    STORAGE.make(str(scratch), Limit(size))
    available = int(run("df", "--block-size=1", "--output=avail", scratch / sized.SPACE).split()[1])
    assert size <= available <= 1.06 * size
    image = (scratch / sized.IMAGE).stat()
    assert image.st_size == sized.image_size(size) <= 1.17 * size + 0.1 * MIB
    assert STORAGE.limit(str(scratch)) == Limit(size).whole()
    STORAGE.release(str(scratch))


def test_a_place_of_an_earlier_version_has_the_limit_that_it_had(scratch: Path) -> None:
    """Its image was as large as the limit, and had no label."""
    STORAGE.make(str(scratch), Limit(16 * MIB))
    [device] = loops(scratch)
    run("e2label", str(device["name"]), "")
    assert STORAGE.limit(str(scratch)) == Limit(sized.image_size(16 * MIB))
    STORAGE.release(str(scratch))


@media
def test_what_a_pod_deletes_is_room_for_it_again(scratch: Path, medium: Medium) -> None:
    pod = Pod(scratch, Limit(64 * MIB, medium))
    first = fill(pod.volume / "new", 128 * MIB)
    (pod.volume / "new").unlink()
    assert fill(pod.volume / "new", 128 * MIB) >= first - MIB
    pod.end()


@media
def test_inodes_are_limited_too(scratch: Path, medium: Medium) -> None:
    pod = Pod(scratch, Limit(MIB, medium))
    with pytest.raises(OSError) as full:
        for number in range(1024):
            (pod.volume / str(number)).touch()
    assert full.value.errno == errno.ENOSPC
    pod.end()


@media
def test_metadata_of_a_big_file_is_changed_without_its_content(scratch: Path, medium: Medium) -> None:
    pod = Pod(scratch, Limit(2 * MIB, medium))
    big = pod.volume / "package/big"
    big.chmod(0o600)
    copied = Path(pod.upper.upper, "package/big")
    assert copied.stat().st_size == 3 * MIB
    assert copied.stat().st_blocks * 512 <= 4096
    assert big.read_bytes() == (pod.store / "package/big").read_bytes()
    assert (pod.store / "package/big").stat().st_mode & 0o777 != 0o600
    pod.end()


@media
def test_redirects_are_followed_and_made(scratch: Path, medium: Medium) -> None:
    pod = Pod(scratch, Limit(2 * MIB, medium))
    (pod.volume / "package").rename(pod.volume / "moved")
    assert (pod.volume / "moved/big").stat().st_size == 3 * MIB
    assert os.getxattr(Path(pod.upper.upper, "moved"), "trusted.overlay.redirect") == b"package"
    (pod.volume / "moved/big").unlink()
    assert os.listdir(pod.volume / "moved") == []
    assert os.listdir(pod.store / "package") == ["big"]
    options = run("findmnt", "--noheadings", "--output", "FS-OPTIONS", "--mountpoint", pod.volume).strip().split(",")
    assert {"metacopy=on", "redirect_dir=on"} <= set(options)
    assert {"volatile", "fsync=volatile"} & set(options)
    pod.end()


@media
def test_the_place_itself_takes_no_devices_or_setuid(scratch: Path, medium: Medium) -> None:
    pod = Pod(scratch, Limit(MIB, medium))
    space = Path(pod.upper.upper).parent
    options = run("findmnt", "--noheadings", "--output", "VFS-OPTIONS", "--mountpoint", space).strip().split(",")
    assert {"rw", "nosuid", "nodev"} <= set(options)
    assert sorted(os.listdir(space)) == ["upper", "work"]
    pod.end()


@media
def test_usage_is_what_df_says(scratch: Path, medium: Medium) -> None:
    assert STORAGE.usage(str(scratch)) is None
    pod = Pod(scratch, Limit(100 * MIB, medium))
    (pod.volume / "new").write_bytes(b"x" * 30 * MIB)
    os.sync()
    usage = STORAGE.usage(str(pod.path))
    assert usage is not None
    columns = "size,used,avail,itotal,iused,iavail"
    df = run("df", "--block-size=1", f"--output={columns}", Path(pod.upper.upper)).splitlines()[1].split()
    assert [
        *(usage.bytes, usage.bytes_used, usage.bytes_available),
        *(usage.inodes, usage.inodes_used, usage.inodes_available),
    ] == [int(number) for number in df]
    assert 30 * MIB <= usage.bytes_used < 31 * MIB
    pod.end()
    assert STORAGE.usage(str(pod.path)) is None


# What it costs the node


def test_a_limit_of_20_gib_takes_less_than_2_mb_and_no_time(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.perf_counter()
    pod = Pod(scratch, Limit(20 << 30))
    made = time.perf_counter() - begun
    os.sync()
    assert pod.on_disk < 2_000_000
    usage = STORAGE.usage(str(pod.path))
    assert usage is not None
    assert usage.bytes_available >= 20 << 30
    begun = time.perf_counter()
    pod.end()
    with capsys.disabled():
        print(f"\n20 GiB: made in {made * 1000:.1f} ms, ended in {(time.perf_counter() - begun) * 1000:.1f} ms")


def test_what_is_written_is_not_cached_twice(scratch: Path) -> None:
    pod = Pod(scratch, Limit(100 * MIB))
    (pod.volume / "new").write_bytes(b"x" * 50 * MIB)
    os.sync()
    assert (pod.volume / "new").read_bytes() == b"x" * 50 * MIB
    [device] = loops(scratch)
    assert (device["dio"], device["autoclear"]) == (True, True)
    cached = run("fincore", "--bytes", "--noheadings", "--output", "RES", pod.path / sized.IMAGE)
    assert int(cached) < MIB
    assert [(one.direct_io, one.autoclear) for one in loop.devices_of(str(pod.path / sized.IMAGE))] == [(True, True)]
    pod.end()


def test_the_node_gets_back_what_a_pod_deleted(scratch: Path) -> None:
    pod = Pod(scratch, Limit(100 * MIB))
    (pod.volume / "new").write_bytes(b"x" * 50 * MIB)
    os.sync()
    before = pod.on_disk
    assert before > 50 * MIB
    (pod.volume / "new").unlink()
    run("sync", "--file-system", pod.upper.upper)
    STORAGE.trim(str(pod.path))
    assert pod.on_disk < before - 49 * MIB
    pod.end()
    STORAGE.trim(str(pod.path))


def test_files_written_again_after_a_deletion_are_written_as_quickly(scratch: Path) -> None:
    """An ext4 without a journal takes 20 to 50 times as long the second time."""
    pod = Pod(scratch, Limit(1 << 30))

    def write() -> float:
        begun = time.thread_time()
        for number in range(8000):
            os.close(os.open(f"{pod.upper.upper}/{number}", os.O_CREAT | os.O_WRONLY))
        return time.thread_time() - begun

    first = write()
    run("find", pod.upper.upper, "-type", "f", "-delete")
    assert write() < 5 * first
    pod.end()


def test_much_written_data_is_dropped_and_not_first_brought_to_the_disk(scratch: Path) -> None:
    pod = Pod(scratch, Limit(1 << 30))
    (pod.volume / "new").write_bytes(b"x" * 200 * MIB)
    before = pod.on_disk
    pod.end()
    assert pod.on_disk < before + 100 * MIB
    assert left(scratch) == []


# Ends


@media
def test_a_place_in_use_is_not_released(scratch: Path, medium: Medium) -> None:
    pod = Pod(scratch, Limit(MIB, medium))
    run("mount", "--bind", pod.volume, scratch / "meta")
    MOUNTS.unmount(str(pod.volume))
    with pytest.raises(Conflict, match=f"is still used by the mount at {scratch}/meta; unmount that"):
        STORAGE.release(str(pod.path))
    (scratch / "meta/new").write_text("still works")
    run("umount", scratch / "meta")
    STORAGE.release(str(pod.path))
    assert left(scratch) == []


@media
def test_releasing_twice_or_where_nothing_is_does_nothing(scratch: Path, medium: Medium) -> None:
    STORAGE.release(str(scratch))
    STORAGE.release(str(scratch / "none"))
    pod = Pod(scratch, Limit(MIB, medium))
    pod.end()
    pod.end()
    assert left(scratch) == []


def test_an_image_is_never_used_again(scratch: Path) -> None:
    pod = Pod(scratch, Limit(MIB))
    pod.end()
    Path(pod.upper.upper).parent.rmdir()
    with pytest.raises(VolumeFailed, match="File exists"):
        STORAGE.make(str(pod.path), Limit(MIB))
    assert left(scratch) == []


def test_a_device_that_another_namespace_holds_ends_with_that(scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
    pod = Pod(scratch, Limit(MIB))
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    other.stdout.readline()
    pod.end()
    [device] = loops(scratch)
    assert f"{device['name']} still shows what was written in {pod.path}" in caplog.text
    (pod.path / sized.IMAGE).unlink()
    other.communicate()
    wait_until(lambda: loops(scratch) == [])


def test_two_data_roots_do_not_touch_each_others_devices(scratch: Path) -> None:
    pods = [Pod(scratch / name, Limit(MIB)) for name in ("one", "other")]
    images = [str(pod.path / sized.IMAGE) for pod in pods]
    assert loop.devices_of(images[0]) != loop.devices_of(images[1])
    pods[0].end()
    assert loop.devices_of(images[0]) == []
    [device] = loop.devices_of(images[1])
    assert [str(device)] == [one["name"] for one in loops(scratch)]
    (pods[1].volume / "new").write_text("still works")
    os.sync()
    assert (pods[1].volume / "new").read_text() == "still works"
    pods[1].end()


def test_thirty_at_once_do_not_disturb_each_other(scratch: Path) -> None:
    Pod(scratch, Limit(MIB), "csi-first").end()

    def live(number: int) -> None:
        pod = Pod(scratch, Limit(8 * MIB), f"csi-{number}")
        (pod.volume / "new").write_text(str(number))
        run("sync", "--file-system", pod.upper.upper)
        assert (pod.volume / "new").read_text() == str(number)
        pod.end()

    with ThreadPoolExecutor(30) as threads:
        list(threads.map(live, range(30)))
    assert left(scratch) == []


def test_processes_that_take_loop_devices_at_the_same_time_all_get_some(scratch: Path) -> None:
    program = (
        "import os, sys\n"
        "from cknix_csi.volumes.mounts import KernelMounts\n"
        "from cknix_csi.api.limits import Limit\n"
        "from cknix_csi.volumes.sized import KernelSizedStorage\n"
        "storage = KernelSizedStorage(KernelMounts())\n"
        "for number in range(10):\n"
        "    path = f'{sys.argv[1]}/{number}'\n"
        "    os.makedirs(path)\n"
        "    storage.make(path, Limit(1 << 20))\n"
        "for number in range(10):\n"
        "    storage.release(f'{sys.argv[1]}/{number}')\n"
    )
    command = ["unshare", "--mount", sys.executable, "-c", program]
    processes = [subprocess.Popen([*command, str(scratch / str(number))]) for number in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    assert loops(scratch) == []


def test_no_descriptor_is_left_open(scratch: Path) -> None:
    Pod(scratch, Limit(MIB), "csi-first").end()
    before = len(os.listdir("/proc/self/fd"))
    for number, medium in enumerate((Medium.DISK, Medium.MEMORY) * 2):
        Pod(scratch, Limit(MIB, medium), f"csi-{number}").end()
    with pytest.raises(VolumeFailed):
        STORAGE.make(str(scratch / "none"), Limit(MIB))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_place_that_is_busy_for_a_moment_is_released_after_it(scratch: Path) -> None:
    STORAGE.make(str(scratch), Limit(MIB))
    descriptor = os.open(scratch / "space", os.O_RDONLY)
    threading.Timer(0.2, os.close, [descriptor]).start()
    STORAGE.release(str(scratch))
    assert left(scratch) == []


def test_a_place_that_stays_busy_is_named_and_the_retry_works(scratch: Path) -> None:
    STORAGE.make(str(scratch), Limit(MIB))
    said = r"cannot unmount .*/space: .*something still uses it"
    with (scratch / "space/upper/open").open("w"), pytest.raises(MountFailed, match=said):
        STORAGE.release(str(scratch))
    STORAGE.release(str(scratch))
    assert left(scratch) == []


# Nodes that lack something


def test_a_container_whose_dev_has_no_loop_devices_makes_nodes_of_its_own(scratch: Path) -> None:
    run("mount", "-t", "tmpfs", "cknix-test", "/dev")
    try:
        os.mknod("/dev/null", 0o20666, os.makedev(1, 3))
        Path("/dev/loop0").touch()
        pod = Pod(scratch, Limit(MIB))
        (pod.volume / "new").write_text("works")
        assert len(loop.devices_of(str(pod.path / sized.IMAGE))) == 1
        assert sorted(os.listdir(pod.path)) == ["disk.img", "m", "space"]
        pod.end()
        assert loop.devices_of(str(pod.path / sized.IMAGE)) == []
    finally:
        run("umount", "/dev")
    assert left(scratch) == []


def test_without_mkfs_the_message_names_the_package(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(scratch))
    monkeypatch.setattr(sized, "_WHERE_MKFS_IS", str(scratch))
    with pytest.raises(VolumeFailed, match=r"no mkfs\.ext4; install e2fsprogs beside it, or ask for memory"):
        STORAGE.make(str(scratch), Limit(MIB))


@pytest.mark.parametrize(("script", "said"), [("exit 3", "answered 3: $"), ("echo no >&2; exit 1", "answered 1: no$")])
def test_what_mkfs_says_is_passed_on(scratch: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    (scratch / "mkfs.ext4").write_text(f"#!/bin/sh\n{script}\n")
    (scratch / "mkfs.ext4").chmod(0o755)
    monkeypatch.setenv("PATH", f"{scratch}:{os.environ['PATH']}")
    with pytest.raises(VolumeFailed, match=f"mkfs.ext4 {said}"):
        STORAGE.make(str(scratch), Limit(MIB))
    assert left(scratch) == []


def test_a_mkfs_that_hangs_is_stopped_with_its_children(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch / "mkfs.ext4").write_text(f"#!/bin/sh\nsleep 300 & echo $! > {scratch}/child\nwait\n")
    (scratch / "mkfs.ext4").chmod(0o755)
    monkeypatch.setenv("PATH", f"{scratch}:{os.environ['PATH']}")
    monkeypatch.setattr(sized, "_MKFS_SECONDS", 1.0)
    with pytest.raises(VolumeFailed, match=r"mkfs\.ext4 was stopped after 1 s"):
        STORAGE.make(str(scratch), Limit(MIB))
    child = int((scratch / "child").read_text())
    wait_until(lambda: not Path(f"/proc/{child}").exists())


# A node whose own disk is full


def fill_disk(disk: Path) -> None:
    """Leave not one block free."""
    for number in range(100):
        if not fill(disk / f"others-{number}", 100 * MIB, step=1024 if number else MIB):
            return
        os.sync()  # what was set aside for metadata is free only then


@pytest.fixture
def small_disk(scratch: Path) -> Path:
    """A disk of 60 MiB for the data root."""
    image, directory = scratch / "small.img", scratch / "small"
    directory.mkdir()
    run("truncate", "--size", "60M", image)
    run("mkfs.ext4", "-q", "-m", "0", image)
    run("mount", "-o", "loop", image, directory)
    return directory


def test_a_full_disk_is_told_as_such_and_the_retry_works(small_disk: Path) -> None:
    (small_disk / "volume").mkdir()
    fill_disk(small_disk)
    with pytest.raises(OutOfSpace, match="free space or inodes on that file system"):
        STORAGE.make(str(small_disk / "volume"), Limit(20 << 30))
    STORAGE.release(str(small_disk / "volume"))
    assert left(small_disk / "volume") == []
    run("rm", "--recursive", small_disk / "volume", *small_disk.glob("others-*"))
    Pod(small_disk, Limit(20 << 30)).end()


@pytest.mark.parametrize("size", [48 * MIB, 1 << 30], ids=["without journal", "with journal"])
def test_a_disk_that_fills_up_under_a_volume_fails_its_writes_and_nothing_else(small_disk: Path, size: int) -> None:
    pod = Pod(small_disk, Limit(size))
    (pod.volume / "early").write_text("on disk before")
    os.sync()
    fill_disk(small_disk)
    with pytest.raises(OSError) as refused, open(pod.volume / "late", "wb", buffering=0) as file:
        for _ in range(40):
            file.write(b"x" * MIB)
        subprocess.run(["sync", "--file-system", pod.upper.upper], check=False, stderr=subprocess.DEVNULL)
        os.fsync(file.fileno())
    assert refused.value.errno in {errno.ENOSPC, errno.EIO, errno.EROFS}
    assert (pod.volume / "early").read_text() == "on disk before"
    pod.end()
    assert left(pod.path) == []
    run("rm", "--recursive", pod.path, *small_disk.glob("others-*"))
    again = Pod(small_disk, Limit(size))
    (again.volume / "new").write_text("works")
    again.end()


# Loop devices by themselves


def test_the_kernels_name_of_a_device_is_read_whatever_is_in_it(scratch: Path) -> None:
    directory = scratch / "a b\\012c\tä (deleted)"
    directory.mkdir()
    image = directory / "disk\n.img"
    image.write_bytes(bytes(MIB))
    with open(image, "r+b") as file, loop.attached(file.fileno(), name=str(image), scratch=str(scratch)) as node:
        number = int(node.removeprefix("/dev/loop"))
        assert loop.backing_file(number) == os.fsencode(image)
        [device] = loop.devices_of(str(image))
        assert str(device) == node
        assert not device.ended()
        image.unlink()
        assert loop.backing_file(number) == os.fsencode(image)
        assert loop.devices_of(str(image)) == []
    wait_until(lambda: loop.backing_file(number) is None or device.ended())


def test_a_file_of_the_same_name_elsewhere_is_not_taken_for_ours(scratch: Path) -> None:
    for name in ("one", "other"):
        (scratch / name / "volume").mkdir(parents=True)
        (scratch / name / "volume/disk.img").write_bytes(bytes(MIB))
    image = scratch / "one/volume/disk.img"
    with open(image, "r+b") as file, loop.attached(file.fileno(), name=str(image), scratch=str(scratch)):
        assert len(loop.devices_of(str(image))) == 1
        assert loop.devices_of(str(scratch / "other/volume/disk.img")) == []


def test_direct_io_is_done_without_where_the_file_system_has_none(scratch: Path) -> None:
    run("mount", "-t", "ramfs", "cknix-test", scratch)
    place = scratch / "place"
    place.mkdir()
    upper = Path(STORAGE.make(str(place), Limit(MIB)).upper)
    (upper / "new").write_text("works")
    os.sync()
    assert [device["dio"] for device in loops(scratch)] == [False]
    STORAGE.release(str(place))
    assert loops(scratch) == []
