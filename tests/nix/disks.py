"""Small disks for stores, and closures of known sizes to fill them with."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import struct
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.storepath import StorePath
from tests.nixes import NixEnv

MEBIBYTE = 1024 * 1024
CLONE_NEWNS = 0x20000
MS_REC_PRIVATE = (1 << 14) | (1 << 18)


def fill(env: NixEnv, closures: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> dict[str, StorePath]:
    """Make closures of the names given, each a file that refers to data of *sizes* bytes; all paths by name."""
    scratch = env.directory / "data"
    scratch.mkdir(exist_ok=True)
    for name, size in sizes.items():
        (scratch / name).write_bytes(os.urandom(size))
    data = "".join(f'{name} = builtins.path {{ path = "{scratch / name}"; name = "{name}"; }}; ' for name in sizes)
    roots = "".join(
        f'{name} = builtins.toFile "{name}" "{name} {" ".join(f"${{data.{part}}}" for part in parts)}"; '
        for name, parts in closures.items()
    )
    lines = env.run(
        "nix-instantiate",
        *("--eval", "--strict", "--read-write-mode", "--expr"),
        f"let data = {{ {data} }}; roots = {{ {roots} }}; all = data // roots; "
        'in builtins.concatStringsSep " " (map (name: "${name}=${all.${name}}") (builtins.attrNames all))',
    )
    words = lines.stdout.strip().strip('"').split()
    return {name: StorePath.parse(path) for name, _, path in (word.partition("=") for word in words)}


def on_small_disk(target: Path, kind: str, mebibytes: int, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run *body* where *target* is a file system of its own, in a mount namespace that this thread alone sees."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk: run as root")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            _enter_own_mounts()
            with small_disk(target, target.with_name("image"), kind, mebibytes):
                asyncio.run(body())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _enter_own_mounts() -> None:
    """A mount namespace for this thread, and the threads and processes that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    assert libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None) == 0


@contextmanager
def small_disk(target: Path, image: Path, kind: str, mebibytes: int) -> Iterator[None]:
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "small-disk", str(target)]
    else:
        with image.open("wb") as file:
            file.truncate(mebibytes * MEBIBYTE)
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
        command = ["mount", "-o", "loop", str(image), str(target)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)


# linux/include/uapi/linux/ext4.h (until 6.6: fs/ext4/ext4.h): EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32), and its flag
# EXT4_GOING_FLAGS_NOLOGFLUSH: from now on nothing is written any more, not even the journal.
_SHUTDOWN = 0x8004587D
_TRIES = 50
_AT_ONCE = struct.pack("I", 2)


class Disk:
    """An ext4 at *target*, on a file, that can lose its power; for a process with mounts of its own."""

    def __init__(self, target: Path, mebibytes: int) -> None:
        self.target = target
        self._image = self._used = target.with_name(f"{target.name}.image")
        with self._image.open("wb") as file:
            file.truncate(mebibytes * MEBIBYTE)
        # Blocks of 4 KiB, as any larger disk has: see tests.node.disks.
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", str(self._image)], check=True)
        self._mount()

    def lose_power(self) -> None:
        """What the file system has not written to the disk by now is lost; it fails whoever still uses it."""
        descriptor = os.open(self.target, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _AT_ONCE)
        finally:
            os.close(descriptor)
        # That it is unmounted writes to the disk once more, which no power cut does.
        copy = self._image.with_suffix(".copy")
        subprocess.run(["cp", "--sparse=always", str(self._image), str(copy)], check=True)
        self._image, self._used = copy, self._image

    def boot(self) -> None:
        """After :meth:`lose_power`, when nobody uses it any more: as the next boot finds it."""
        self.unplug()
        self._used.unlink()
        self._image = self._image.rename(self._used)
        self._mount()

    def unplug(self) -> None:
        """Unmount it, with all that is mounted in it."""
        for _ in range(_TRIES):
            # Threads that nobody waits for any more may have a file open still, or unmount their own.
            said = [
                subprocess.run(["umount", mountpoint], capture_output=True, check=False, text=True).stderr
                for mountpoint in reversed(self._mountpoints())
            ]
            if not self._mountpoints():
                return
            time.sleep(0.1)
        raise AssertionError(f"still mounted: {self._mountpoints()}: {said}")

    def _mount(self) -> None:
        # What is lost is for the test to say, so the kernel commits nothing by itself.
        subprocess.run(["mount", "-o", "loop,commit=600", str(self._image), str(self.target)], check=True)

    def _mountpoints(self) -> list[str]:
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return [point for point in points if point == str(self.target) or point.startswith(f"{self.target}/")]


def on_failing_disk(target: Path, mebibytes: int, body: Callable[[Disk], Coroutine[Any, Any, None]]) -> None:
    """As :func:`on_small_disk`, with an ext4 that *body* can take the power from.

    In a process of its own, since volumes look at the mounts of theirs; what it logs is known there only.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk: run as root")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _enter_own_mounts()
            disk = Disk(target, mebibytes)
            try:
                asyncio.run(body(disk))
            finally:
                disk.unplug()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "its traceback is above"
