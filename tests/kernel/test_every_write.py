"""Every way to write that the kernel has, tried on every kind of volume."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.storepath import StorePath
from tests.kernel.kinds import READ_ONLY, WRITABLE, require_same
from tests.kernel.node import Node, metadata
from tests.kernel.store import seal

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
RENAME_EXCHANGE = 2
AT_FDCWD = -100
LIBC = ctypes.CDLL(None, use_errno=True)

ACL = struct.pack("<I" + "HHI" * 5, 2, 1, 7, 2**32 - 1, 2, 7, 1234, 4, 5, 2**32 - 1, 16, 7, 2**32 - 1, 32, 5, 2**32 - 1)
"""What setfacl writes for ``u:1234:rwx`` (linux/posix_acl_xattr.h): version 2, then tag, permissions and id of each."""


class Place:
    """Where to write: two files, a full and an empty directory of a store path, and a link; and the database."""

    def __init__(self, volume: Path, root: StorePath) -> None:
        self.store = volume / "store"
        self.root = self.store / root.basename
        self.directory = self.root / "bin"
        self.file, self.other, self.link = (self.directory / name for name in ("file", "other", "link"))
        self.empty = self.root / "empty"
        self.state = volume / "var/nix/db"

    @property
    def new(self) -> Path:
        return self.directory / "new"


@pytest.fixture
def root(node: Node) -> StorePath:
    root, at = node.store.add("all-there-is-to-write-to")
    (at / "bin").mkdir(parents=True)
    (at / "empty").mkdir()
    (at / "bin/file").write_text("content of a file")
    (at / "bin/other").write_text("another content")
    (at / "bin/link").symlink_to("file")
    seal(at)
    return root


def libc(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def opened(path: Path, flags: int, then: Callable[[int], object] = lambda _: None) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        then(descriptor)
    finally:
        os.close(descriptor)


def set_flags(descriptor: int) -> None:
    """Chattr +d, which every file system that has flags has."""
    flags = bytearray(8)
    fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, flags)
    value = int.from_bytes(flags[:4], "little") ^ 0x40
    fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, value.to_bytes(8, "little"))


def set_attributes(descriptor: int) -> None:
    attributes = bytearray(28)
    fcntl.ioctl(descriptor, FS_IOC_FSGETXATTR, attributes)
    attributes[0] ^= 0x80  # nodump
    fcntl.ioctl(descriptor, FS_IOC_FSSETXATTR, bytes(attributes))


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:  # by a short name: a socket's has 108 bytes
        opened(path.parent, os.O_PATH, lambda directory: made.bind(f"/proc/self/fd/{directory}/{path.name}"))


def map_shared(descriptor: int) -> None:
    with mmap.mmap(descriptor, 4, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        mapped[0:4] = b"XXXX"


WRITES: dict[str, Callable[[Place], object]] = {
    "open for writing": lambda at: opened(at.file, os.O_WRONLY, lambda file: os.write(file, b"XXXX")),
    "open for reading and writing": lambda at: opened(at.file, os.O_RDWR, lambda file: os.pwrite(file, b"X", 2)),
    "open for appending": lambda at: opened(at.file, os.O_WRONLY | os.O_APPEND, lambda file: os.write(file, b"X")),
    "open and truncate": lambda at: opened(at.file, os.O_RDONLY | os.O_TRUNC),
    "truncate": lambda at: os.truncate(at.file, 3),
    "create": lambda at: opened(at.new, os.O_CREAT | os.O_WRONLY),
    "create a file without a name": lambda at: opened(at.directory, os.O_TMPFILE | os.O_WRONLY),
    "fallocate": lambda at: opened(at.file, os.O_RDWR, lambda file: os.posix_fallocate(file, 0, 1 << 16)),
    "map shared and write": lambda at: opened(at.file, os.O_RDWR, map_shared),
    "copy_file_range": lambda at: opened(
        at.other, os.O_RDONLY, lambda source: opened(at.file, os.O_WRONLY, lambda to: os.copy_file_range(source, to, 9))
    ),
    "mkdir": lambda at: os.mkdir(at.new),
    "mknod of a file": lambda at: os.mknod(at.new),
    "mknod of a device": lambda at: os.mknod(at.new, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "mkfifo": lambda at: os.mkfifo(at.new),
    "bind a socket": lambda at: bind_socket(at.new),
    "symlink": lambda at: os.symlink("x", at.new),
    "link": lambda at: os.link(at.file, at.new),
    "link of a link": lambda at: os.link(at.link, at.new, follow_symlinks=False),
    "rename": lambda at: os.rename(at.file, at.new),
    "rename over another": lambda at: os.rename(at.link, at.file),
    "rename a directory": lambda at: os.rename(at.empty, at.root / "moved"),
    "rename a store path": lambda at: os.rename(at.root, at.store / "moved"),
    "exchange": lambda at: libc(
        LIBC.renameat2(AT_FDCWD, os.fsencode(at.file), AT_FDCWD, os.fsencode(at.link), RENAME_EXCHANGE)
    ),
    "unlink": lambda at: os.unlink(at.file),
    "unlink a link": lambda at: os.unlink(at.link),
    "rmdir": lambda at: os.rmdir(at.empty),
    "chmod": lambda at: os.chmod(at.file, 0o777),
    "chmod to setuid": lambda at: os.chmod(at.file, 0o4755),
    "chmod of a directory": lambda at: os.chmod(at.directory, 0o777),
    "fchmod of what is open for reading": lambda at: opened(at.file, os.O_RDONLY, lambda file: os.fchmod(file, 0o777)),
    "chown": lambda at: os.chown(at.file, 1, 1),
    "chown of a link": lambda at: os.lchown(at.link, 1, 1),
    "fchown of what is open for reading": lambda at: opened(at.file, os.O_RDONLY, lambda file: os.fchown(file, 1, 1)),
    "utimes": lambda at: os.utime(at.file),
    "utimes of a link": lambda at: os.utime(at.link, follow_symlinks=False),
    "setxattr": lambda at: os.setxattr(at.file, "trusted.x", b"y"),
    "setxattr of a user": lambda at: os.setxattr(at.file, "user.x", b"y"),
    "setxattr of capabilities": lambda at: os.setxattr(
        at.file, "security.capability", struct.pack("<5I", 0x02000001, 1, 0, 0, 0)
    ),
    "setfacl": lambda at: os.setxattr(at.file, "system.posix_acl_access", ACL),
    "ioctl that sets flags": lambda at: opened(at.file, os.O_RDONLY, set_flags),
    "ioctl that sets attributes": lambda at: opened(at.file, os.O_RDONLY, set_attributes),
    "a new store path": lambda at: os.mkdir(at.store / "new"),
    "unlink the database": lambda at: os.unlink(at.state / "db.sqlite"),
    "write to the database": lambda at: opened(at.state / "db.sqlite", os.O_WRONLY, lambda file: os.write(file, b"X")),
    "a journal beside the database": lambda at: opened(at.state / "db.sqlite-wal", os.O_CREAT | os.O_WRONLY),
}

LIMITED = {"copy_file_range", "ioctl that sets flags", "ioctl that sets attributes"}
"""Writes that some upper layers do not have: those on a file system other than the store's, those in memory."""


@pytest.mark.parametrize("arguments", READ_ONLY.values(), ids=READ_ONLY.keys())
async def test_a_read_only_volume_refuses_every_way_to_write(
    node: Node, root: StorePath, arguments: dict[str, Any]
) -> None:
    """To root with all capabilities, as a privileged container is."""
    before = metadata(node.store.store_dir, content=True)
    place = Place(await node.publish(root, **arguments), root)
    answers = {}
    for name, write in WRITES.items():
        try:
            write(place)
            answers[name] = "done"
        except OSError as error:
            answers[name] = errno.errorcode[error.errno or 0]
    assert {name: answer for name, answer in answers.items() if answer != "EROFS"} == {}
    with pytest.raises(OSError) as refused:
        opened(place.file, os.O_RDONLY, map_shared)
    assert refused.value.errno == errno.EACCES, "mmap(2): what is open for reading cannot be mapped to be written"
    assert metadata(node.store.store_dir, content=True) == before


@pytest.mark.parametrize("arguments", WRITABLE.values(), ids=WRITABLE.keys())
async def test_a_writable_volume_keeps_every_way_to_write_to_itself(
    node: Node, root: StorePath, arguments: dict[str, Any]
) -> None:
    before = metadata(node.store.store_dir, content=True)
    neighbours = [await node.publish(root, "reader"), await node.publish(root, "writer", **arguments)]
    closure = await node.store.query(root)
    missed = {}
    for number, (name, write) in enumerate(WRITES.items()):
        place = Place(await node.publish(root, f"p{number}", **arguments), root)
        try:
            write(place)
        except OSError as error:
            missed[name] = errno.errorcode[error.errno or 0]
        await node.unpublish(f"p{number}")
    assert metadata(node.store.store_dir, content=True) == before
    for neighbour in neighbours:
        require_same(neighbour, node.store.store_dir, closure)
    assert set(missed) <= LIMITED, missed
