"""The kernel calls that Python has no name for: the mount API of Linux 5.12, statx and openat2, as thin as can be.

Every function raises :class:`OSError` with the kernel's errno and the path it is about; every descriptor returned is
close-on-exec and belongs to the caller.  ctypes releases the GIL for the length of a call; calls that can wait for a
disk (:func:`umount2`, :func:`fsconfig_create`) belong in a worker thread.

Structures and numbers: ``linux/mount.h``, ``linux/openat2.h``; the call numbers from 424 on are the same on every
architecture but alpha (``scripts/syscall.tbl``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_NO_AUTOMOUNT = 0x800
_AT_STATX_DONT_SYNC = 0x4000

OPEN_TREE_CLONE = 1
"""Make a detached copy of the mount instead of a handle on it."""
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x04
"""The mount to move is the descriptor itself.  Without MOVE_MOUNT_T_SYMLINKS a link as target is not followed."""
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
_MOUNT_ATTR_IDMAP = 0x00100000
MS_PRIVATE = 1 << 18
"""As ``propagation`` of mount_setattr: leave the peer group; nothing mounted in one copy shows up in another."""
UMOUNT_NOFOLLOW = 8
STATX_ATTR_MOUNT_ROOT = 0x2000
"""statx: the path is the root of a mount, also of a bind of the same file system (Linux 5.8)."""
RESOLVE_NO_XDEV = 0x01
"""openat2: refuse (EXDEV) to walk into another mount, also a bind of the same file system."""
RESOLVE_NO_SYMLINKS = 0x04
"""openat2: refuse (ELOOP) a symbolic link in any part of the path."""

_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442

_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FICLONE = 0x40049409
"""_IOW(0x94, 9, int), ``linux/fs.h``."""

FSCONFIG_STRING_LIMIT = 255
"""Longest string option in bytes: fsconfig(2) copies at most 256 bytes including the final zero, else EINVAL."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_Word = ctypes.c_long


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _Statx(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("between", ctypes.c_uint8 * 128),
        ("mnt_id", ctypes.c_uint64),
        ("rest", ctypes.c_uint8 * 104),
    )


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_tree(path: str, flags: int) -> int:
    """A descriptor of the mount at *path*, or with OPEN_TREE_CLONE of a detached copy rooted there."""
    return _call(path, _NR_OPEN_TREE, _Word(AT_FDCWD), os.fsencode(path), _Word(flags))


def open_tree_at(directory: int, path: str, flags: int) -> int:
    """:func:`open_tree` of *path* below *directory*, which may be a detached mount (a copy of that: Linux 6.15)."""
    return _call(path, _NR_OPEN_TREE, _Word(directory), os.fsencode(path), _Word(flags))


def mount_setattr(mount: int, *, attributes: int, cleared: int = 0, propagation: int) -> None:
    """Add MOUNT_ATTR_* *attributes* to the mount of descriptor *mount*, take *cleared* away, set its propagation."""
    attr = _MountAttr(attributes, cleared, propagation, 0)
    size = _Word(ctypes.sizeof(attr))
    _call(None, _NR_MOUNT_SETATTR, _Word(mount), b"", _Word(AT_EMPTY_PATH), ctypes.byref(attr), size)


def idmap_mount(mount: int, user_namespace: int) -> None:
    """Show the files of the detached *mount* with the owners that *user_namespace*, a descriptor, maps theirs to."""
    attr = _MountAttr(_MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
    size = _Word(ctypes.sizeof(attr))
    _call(None, _NR_MOUNT_SETATTR, _Word(mount), b"", _Word(AT_EMPTY_PATH), ctypes.byref(attr), size)


def move_mount(mount: int, target: str) -> None:
    """Attach the detached *mount* at *target*; a symbolic link there is not followed."""
    flags = _Word(MOVE_MOUNT_F_EMPTY_PATH)
    _call(target, _NR_MOVE_MOUNT, _Word(mount), b"", _Word(AT_FDCWD), os.fsencode(target), flags)


def fsopen(fstype: str) -> int:
    """A configuration context for a new file system of type *fstype*."""
    return _call(fstype, _NR_FSOPEN, os.fsencode(fstype), _Word(FSOPEN_CLOEXEC))


def fsconfig_string(context: int, key: str, value: str) -> None:
    """Set a string option; at most :data:`FSCONFIG_STRING_LIMIT` bytes."""
    _fsconfig(context, _FSCONFIG_SET_STRING, key, os.fsencode(value), f"{key}={value}")


def fsconfig_flag(context: int, key: str) -> None:
    """Set an option that has no value."""
    _fsconfig(context, _FSCONFIG_SET_FLAG, key, None, key)


def fsconfig_create(context: int) -> None:
    """Make the superblock from the options set so far."""
    _fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, None)


def fsmount(context: int, attributes: int) -> int:
    """A detached mount of the superblock made in *context*, with MOUNT_ATTR_* *attributes*."""
    return _call(None, _NR_FSMOUNT, _Word(context), _Word(FSMOUNT_CLOEXEC), _Word(attributes))


def umount2(target: str, flags: int) -> None:
    """Detach the topmost mount at *target*.  The last one of a file system may write back what is dirty: can block."""
    while _libc.umount2(os.fsencode(target), flags) != 0:
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number), target)


def statx_attributes(path: str) -> int:
    """The STATX_ATTR_* bits of *path*; a symbolic link is not followed, an automount not triggered.

    The file system is not asked: it may have lost its server.
    """
    found = _Statx()
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    if _libc.statx(AT_FDCWD, os.fsencode(path), flags, 0, ctypes.byref(found)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(found.attributes)


def statx_mount_id(directory: int, name: str) -> int:
    """The mount that *name* in descriptor *directory* is in, by its id in the mount table (Linux 5.8).

    A symbolic link is not followed, and the file system is not asked: it may have lost its server.
    """
    found = _Statx()
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    if _libc.statx(directory, os.fsencode(name), flags, 0, ctypes.byref(found)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return int(found.mnt_id)


def openat2(directory: int, name: str, flags: int, resolve: int) -> int:
    """open(2) relative to descriptor *directory* with RESOLVE_* restrictions."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    size = _Word(ctypes.sizeof(how))
    return _call(name, _NR_OPENAT2, _Word(directory), os.fsencode(name), ctypes.byref(how), size)


def clone_file(source: int, target: int) -> None:
    """Let the empty file *target* share the blocks of *source*; EOPNOTSUPP or EXDEV where that is not to be had."""
    fcntl.ioctl(target, _FICLONE, source)


def sync_file_system(directory: str) -> None:
    """Write all that the file system of *directory* has to write; EIO or ENOSPC when some of that fails (Linux 5.8)."""
    with owned(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        if _libc.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), directory)


@contextlib.contextmanager
def owned(descriptor: int) -> Iterator[int]:
    """Closes *descriptor* at the end of the block, however it ends."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fsconfig(context: int, command: int, key: str | None, value: bytes | None, about: str | None) -> None:
    name = None if key is None else key.encode()
    try:
        _call(about, _NR_FSCONFIG, _Word(context), _Word(command), name, value, _Word(0))
    except OSError as error:
        if not (said := _messages(context)):
            raise
        assert error.errno is not None
        raise OSError(error.errno, f"{error.strerror} ({said})", about) from None


def _messages(context: int) -> str:
    """What the kernel itself says about a failure: lines such as ``e overlay: …``, read from the context."""
    lines: list[str] = []
    with contextlib.suppress(OSError):  # ENODATA: no (more) messages
        while len(lines) < 16:
            lines.append(os.fsdecode(os.read(context, 4096)).strip().removeprefix("e "))
    return "; ".join(lines)


def _call(about: str | None, number: int, *arguments: object) -> int:
    while (result := int(_libc.syscall(_Word(number), *arguments))) < 0:
        if (code := ctypes.get_errno()) != errno.EINTR:
            raise OSError(code, os.strerror(code), about)
    return result
