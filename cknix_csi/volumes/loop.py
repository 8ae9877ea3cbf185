"""Loop devices: a file as a disk, so that a file system can be made in it (``linux/loop.h``, loop(4)).

Every device is set up with autoclear: the kernel takes the file away from it when its last user is gone, that is after
the last unmount, and also when this process is killed before there was a mount.  So a device is never freed here, and
there is nothing to remember.

Loop devices belong to the whole machine.  One is recognised as ours by the identity of its file (device and inode), not
by its name: the kernel shows the name as seen through a mount that may have ended with an earlier container.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from cknix_csi.volumes import syscalls

BLOCK_SIZE = 4096
"""Bytes of a device's block and of the file system on it: with less, a disk of 4096-byte sectors has no direct I/O."""

_LOOP_CONFIGURE = 0x4C0A
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_CONTROL_DEVICE = os.makedev(10, 237)
"""``LOOP_CTRL_MINOR`` of ``linux/miscdevice.h``; opening it loads the module."""
_NAME_SIZE = 64
_BLOCK_DEVICES = "/sys/block"
_DELETED = b" (deleted)"

_GONE = frozenset({errno.ENXIO, errno.ENODEV, errno.ENOENT})
"""What is answered about a device that has no file (any more), or is none."""
_ATTEMPTS = 64
_PAUSE = 0.001
"""Seconds between two attempts to get a device that others were quicker to take."""


class _Info(ctypes.Structure):
    _fields_ = (
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * _NAME_SIZE),
        ("lo_crypt_name", ctypes.c_char * _NAME_SIZE),
        ("lo_encrypt_key", ctypes.c_uint8 * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _Info),
        ("reserved", ctypes.c_uint64 * 8),
    )


@dataclass(frozen=True, slots=True)
class LoopDevice:
    """A loop device that has a file."""

    number: int
    shown: bytes
    """Its file, as :func:`backing_file` gives it."""
    direct_io: bool
    """Its file's pages are not cached a second time; not so where the file's own file system refuses direct I/O."""
    autoclear: bool

    def ended(self) -> bool:
        """True when the kernel has taken the file away from it."""
        return backing_file(self.number) != self.shown

    def __str__(self) -> str:
        return f"/dev/loop{self.number}"


_one_at_a_time = threading.Lock()
"""Between asking for a free device and taking it: without, this process's own threads would race for each."""


@contextlib.contextmanager
def attached(image: int, *, name: str, scratch: str) -> Iterator[str]:
    """Give the file of descriptor *image* (open for writing) a loop device; yields the path of the device's node.

    The device lasts for the block, and as long as a file system is mounted from it.  *name* is what ``losetup`` shows
    as its file (the last 63 bytes).  Nodes that ``/dev`` lacks are made in the directory *scratch* for the block.
    Raises :class:`OSError`: ENODEV without the driver, EBUSY when others took every device that was offered.
    """
    with contextlib.ExitStack() as held:
        with _one_at_a_time:
            node = _take(image, name, scratch, held)
        yield node


def devices_of(image: str) -> list[LoopDevice]:
    """The loop devices whose file is *image*; none when it does not exist."""
    try:
        wanted = os.stat(image, follow_symlinks=False)
    except FileNotFoundError:
        return []
    tail = os.fsencode("/".join(image.rsplit("/", 2)[-2:]))
    found = []
    for number in _numbers():
        # Others' devices are not even opened, which would keep one that is about to end from ending.
        if (shown := backing_file(number)) is None or not shown.endswith(b"/" + tail):
            continue
        if (device := _device_of(number, shown, wanted, os.path.dirname(image))) is not None:
            found.append(device)
    return found


def backing_file(number: int) -> bytes | None:
    """The path of a device's file as the kernel shows it, raw bytes, without the mark of a deleted file.

    None for a device that has no file.
    """
    try:
        with open(f"{_BLOCK_DEVICES}/loop{number}/loop/backing_file", "rb", buffering=0) as file:
            shown = file.read()
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return None
    return shown.removesuffix(b"\n").removesuffix(_DELETED) or None


def _numbers() -> list[int]:
    names = (name.removeprefix("loop") for name in os.listdir(_BLOCK_DEVICES) if name.startswith("loop"))
    return sorted(int(name) for name in names if name.isdecimal())


def _device_of(number: int, shown: bytes, image: os.stat_result, scratch: str) -> LoopDevice | None:
    """What device *number* is, if its file is *image*."""
    info = _Info()
    try:
        with _opened(number, scratch, os.O_RDONLY) as (_, device):
            fcntl.ioctl(device, _LOOP_GET_STATUS64, info)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return None
    if (info.lo_device, info.lo_inode) != (_kernel_number(image.st_dev), image.st_ino):
        return None
    return LoopDevice(
        number,
        shown,
        direct_io=bool(info.lo_flags & _LO_FLAGS_DIRECT_IO),
        autoclear=bool(info.lo_flags & _LO_FLAGS_AUTOCLEAR),
    )


def _kernel_number(device: int) -> int:
    """A device's number as ``huge_encode_dev`` of ``linux/kdev_t.h`` writes it into ``lo_device``."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def _take(image: int, name: str, scratch: str, held: contextlib.ExitStack) -> str:
    """The node of a device that has *image* now, and keeps it at least until *held* is closed."""
    last: OSError | None = None
    with (
        _node("loop-control", stat.S_IFCHR, _CONTROL_DEVICE, scratch) as path,
        syscalls.owned(_control(path)) as control,
    ):
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE)
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            try:
                with contextlib.ExitStack() as offered:
                    node, device = offered.enter_context(_opened(number, scratch, os.O_RDWR))
                    _configure(device, image, name)
                    held.enter_context(offered.pop_all())
                    return node
            except OSError as error:
                # Somebody else took it; or took it and is giving it back, or removed it.
                if error.errno != errno.EBUSY and error.errno not in _GONE:
                    raise
                last = error
    raise OSError(errno.EBUSY, f"others took each of the {_ATTEMPTS} loop devices that were free") from last


def _configure(device: int, image: int, name: str) -> None:
    """Give *device* its file.  Direct I/O is a wish: the kernel leaves it off where the file's file system has none."""
    config = _Config(fd=image, block_size=BLOCK_SIZE)
    config.info.lo_flags = _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO
    config.info.lo_file_name = os.fsencode(name)[1 - _NAME_SIZE :]
    fcntl.ioctl(device, _LOOP_CONFIGURE, config)


def _control(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        raise OSError(errno.ENODEV, "the kernel has no loop devices: load the module `loop`") from error


@contextlib.contextmanager
def _opened(number: int, scratch: str, flags: int) -> Iterator[tuple[str, int]]:
    """Node and descriptor of loop device *number*."""
    with open(f"{_BLOCK_DEVICES}/loop{number}/dev", encoding="ascii") as file:
        major, minor = (int(part) for part in file.read().split(":"))
    with (
        _node(f"loop{number}", stat.S_IFBLK, os.makedev(major, minor), scratch) as node,
        syscalls.owned(os.open(node, flags | os.O_CLOEXEC)) as device,
    ):
        yield node, device


@contextlib.contextmanager
def _node(name: str, kind: int, device: int, scratch: str) -> Iterator[str]:
    """``/dev/<name>`` if that is it; otherwise, as in a container whose ``/dev`` is older, a node of our own."""
    path = f"/dev/{name}"
    if _is_device(path, kind, device):
        yield path
        return
    own = f"{scratch}/.{name}-{uuid.uuid4().hex}"
    os.mknod(own, kind | 0o600, device)
    try:
        yield own
    finally:
        os.unlink(own)


def _is_device(path: str, kind: int, device: int) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_IFMT(there.st_mode) == kind and there.st_rdev == device
