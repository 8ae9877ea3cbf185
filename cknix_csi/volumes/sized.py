"""A place of limited size for what a writable volume writes, so that no pod can fill the node.

    <path>/disk.img   a sparse file a little larger than the limit, with an ext4 in it
    <path>/space      where that is mounted, through a loop device; or a tmpfs of that size
    <path>/space/{upper,work}

The limit is what a pod can write: ``df`` in an empty place tells that much as available, and at most 6 % more.  The
image is larger by what ext4 keeps for itself: 3 % for inodes (one per 8 KiB), 2 % and at most 16 MiB to never run out
in the middle of a write, the journal and 0.1 MB.  That is all the node can lose beyond the limit: 6 % of 16Mi, 12 % of
64Mi, where the journal begins, 4 % of 10Gi.  The limit itself is the label of the file system.  On disk an empty place
takes 0.1 MB whatever its limit, and grows with what is written.
What the pod deletes is its own again at once, and the node's after
:meth:`SizedStorage.trim` or with the volume: giving blocks back with each deletion makes that 10 times as slow.

Nothing here survives its volume, so nothing is done for that: no barriers, no flushing, no check of an ext4 found after
a crash.  What a crash leaves is released and thrown away, never used again: the image, a half-made file system, the
loop device (which ends by itself: see :mod:`.loop`) or the mount.  The journal is there for speed: without one, ext4
looks for each new inode through all those deleted in the last five minutes (``recently_deleted`` of fs/ext4/ialloc.c;
10,000 files deleted and written again take 6 to 14 s then, and 0.25 s with a journal).

When the *node's* disk is full while the limit is not reached, the loop device fails writes that ext4 has promised a
place to: data in the pod's page cache is lost, and the pod's fsync answers ENOSPC or EIO (an overlay mounted
``volatile`` goes on answering so); ext4 becomes read-only (EROFS) when its own metadata cannot be written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cknix_csi.api.errors import Conflict, MountFailed
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.volumes import loop, syscalls
from cknix_csi.volumes.failures import VolumeFailed, explained
from cknix_csi.volumes.mounts import Mounts, Upper

log = logging.getLogger(__name__)

SPACE = "space"
"""Name of the directory, in that of the volume at one target, where the file system of limited size is mounted."""
IMAGE = "disk.img"

_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
_BYTES_PER_INODE = 8192
"""In a Nix store there is an inode for each 15 to 30 KiB; a chmod through the overlay takes one without any data."""
_BYTES_PER_MEMORY_INODE = 4096
"""The smallest file takes a page.  What the inodes themselves take (1 KiB each) is not counted by tmpfs."""
_FEATURES = (
    "none",  # whatever the machine's mke2fs.conf says
    "extent",
    "dir_index",
    "filetype",
    "flex_bg",
    "sparse_super2",
    "large_file",
    "huge_file",
    "dir_nlink",
    "extra_isize",
    "uninit_bg",  # inode tables are not written until they are used
)
_WITH_JOURNAL = 64 << 20
"""Bytes from which on there is a journal: smaller places have neither room for it nor enough inodes to need it."""
_INODE_SIZE = 256
_GROUP = 128 << 20
"""Bytes of a block group: what one block of its bitmap can count."""
_SMALLEST_GROUP = 6 << 20
"""Bytes that a last group needs to be of use: mkfs leaves one out that has little beyond its inode tables (4 MiB)."""
_RESERVE = 16 << 20
"""Most bytes that the kernel sets aside of an ext4; of a smaller one 2 % (``ext4_calculate_resv_clusters``)."""
_LABEL = (1024 + 0x78, 16)
"""Where ``s_volume_name`` is in the image (``fs/ext4/ext4.h``): offset and bytes."""
_MKFS_SECONDS = 60.0
_MKFS_OUTPUT = 4096
_WHERE_MKFS_IS = "/usr/local/sbin:/usr/sbin:/sbin"
"""Searched after PATH, which need not name them."""

_EXT4_IOC_SHUTDOWN = 0x8004587D
_WITHOUT_FLUSHING = struct.pack("I", 2)
_WORTH_DROPPING = 64 << 20
"""Bytes in a place from which on it is shut down before it is unmounted, which the kernel logs as an alert."""
_FITRIM = 0xC0185879
_ALL_EXTENTS = struct.pack("QQQ", 0, 2**64 - 1, 0)
_PATIENCE_SECONDS = 1.0
_POLL_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a place is, as ``df`` counts: what the file system keeps for itself is neither used nor available."""

    bytes: int
    bytes_used: int
    bytes_available: int
    inodes: int
    inodes_used: int
    inodes_available: int


class SizedStorage(Protocol):
    """Places of limited size.  All may wait for a disk: call it in a worker thread."""

    def make(self, path: str, limit: Limit) -> Upper:
        """A fresh place in the directory *path*, which has none: mounted at ``<path>/space``, nosuid and nodev.

        When it fails nothing is mounted, and at most files are left in *path*.  Raises OutOfSpace, MountFailed,
        VolumeFailed.
        """

    def release(self, path: str) -> bool:
        """End mount and loop device of the place in *path*, if there are any, whatever a crash left of them.

        True when one was mounted: what the mount table said before is no longer so.  What was written is lost.
        Afterwards *path* holds ordinary files, which the caller throws away.  Raises Conflict, before anything is
        changed, while a mount uses what was written; MountFailed, VolumeFailed, MountTableUnreadable.
        """

    def limit(self, path: str) -> Limit | None:
        """The limit of the place in *path*, in whole blocks; None when none is mounted there.  Raises VolumeFailed."""

    def usage(self, path: str) -> Usage | None:
        """How full the place in *path* is; None when none is mounted there.  Raises VolumeFailed."""

    def trim(self, path: str) -> None:
        """Give the node back what was deleted in the place in *path*, but for the last minute.  Raises VolumeFailed."""


class KernelSizedStorage:
    """:class:`SizedStorage` by loop devices and ``mkfs.ext4``, the only process that is spawned (4 ms)."""

    def __init__(self, mounts: Mounts) -> None:
        self._mounts = mounts

    def make(self, path: str, limit: Limit) -> Upper:
        space = f"{path}/{SPACE}"
        with explained(f"make a place of {limit} in {path}"):
            os.mkdir(space, 0o700)
            if limit.medium is Medium.MEMORY:
                _mount_memory(space, limit.bytes)
            else:
                _mount_disk(path, space, limit.bytes)
        return Upper(f"{space}/upper", f"{space}/work")

    def release(self, path: str) -> bool:
        space = f"{path}/{SPACE}"
        with explained(f"find the loop devices of {path}"):
            devices = loop.devices_of(f"{path}/{IMAGE}")
        mounted = self._mounts.mounted(space)
        if mounted:
            self._require_unused(path, space)
            if devices:
                _drop_unwritten(space)
            self._mounts.unmount(space)
        with explained(f"see the loop devices of {path} end"):
            for device in devices:
                _await_end(device, path)
        return mounted

    def limit(self, path: str) -> Limit | None:
        space = f"{path}/{SPACE}"
        if not self._mounts.mounted(space):
            return None
        with explained(f"see how large {space} is"):
            try:
                return _limit_of(f"{path}/{IMAGE}")
            except FileNotFoundError:
                found = os.statvfs(space)
                return Limit(found.f_blocks * found.f_frsize, Medium.MEMORY)

    def usage(self, path: str) -> Usage | None:
        space = f"{path}/{SPACE}"
        if not self._mounts.mounted(space):
            return None
        with explained(f"see how full {space} is"):
            found = os.statvfs(space)
        return Usage(
            bytes=found.f_blocks * found.f_frsize,
            bytes_used=(found.f_blocks - found.f_bfree) * found.f_frsize,
            bytes_available=found.f_bavail * found.f_frsize,
            inodes=found.f_files,
            inodes_used=found.f_files - found.f_ffree,
            inodes_available=found.f_favail,
        )

    def trim(self, path: str) -> None:
        space = f"{path}/{SPACE}"
        if not self._mounts.mounted(space) or not os.path.exists(f"{path}/{IMAGE}"):
            return
        with explained(f"trim {space}"), syscalls.owned(os.open(space, os.O_RDONLY | os.O_DIRECTORY)) as root:
            fcntl.ioctl(root, _FITRIM, _ALL_EXTENTS)

    def _require_unused(self, path: str, space: str) -> None:
        tail = "/" + "/".join(path.split("/")[-2:])
        table = self._mounts.table()
        clones = (clone for mount in table.at(space) for clone in table.on_device(mount.device))
        for mount in (*table.using(path, tail), *clones):
            if mount.target != space:
                raise Conflict(f"the written data in {path} is still used by the mount at {mount.target}; unmount that")


def _mount_disk(path: str, space: str, size: int) -> None:
    image_path = f"{path}/{IMAGE}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with syscalls.owned(os.open(image_path, flags, 0o600)) as image:
        journal = _journal_mebibytes(size)
        os.ftruncate(image, image_size(size))
        _make_ext4(image, journal, label=str(size - size % loop.BLOCK_SIZE))
        with loop.attached(image, name=image_path, scratch=path) as device, _context("ext4") as context:
            syscalls.fsconfig_string(context, "source", device)
            for option in (
                "noinit_itable",  # a thread of the kernel would write all of the inode tables
                "nobarrier",
                "noauto_da_alloc",
            ):
                syscalls.fsconfig_flag(context, option)
            syscalls.fsconfig_string(context, "errors", "remount-ro")
            if journal:
                syscalls.fsconfig_string(context, "data", "writeback")
                syscalls.fsconfig_string(context, "commit", "60")
            _mount(context, space)


def _journal_mebibytes(size: int) -> int:
    """Size of the journal for a place of *size* bytes."""
    if size < _WITH_JOURNAL:
        return 0
    return 4 if size < 1 << 30 else 16


def image_size(limit: int) -> int:
    """Bytes of an image whose file system has room for *limit* bytes of a pod's."""
    block = loop.BLOCK_SIZE
    # Of a group: two bitmaps, its descriptor, and what its inode table is rounded up by.
    groups = limit // (_GROUP * 15 // 16) + 1
    room = limit + (_journal_mebibytes(limit) << 20) + (18 + 3 * groups) * block
    # Solved for the image, of which the inodes and the reserve are a part.
    inodes = _INODE_SIZE / _BYTES_PER_INODE
    size = int(min(room / (1 - inodes - 0.02), (room + _RESERVE) / (1 - inodes)))
    if size > _GROUP and 0 < size % _GROUP < _SMALLEST_GROUP:
        size += _SMALLEST_GROUP
    return size + -size % block


def _limit_of(image_path: str) -> Limit:
    """The limit that the file system in the image was made for."""
    offset, length = _LABEL
    with syscalls.owned(os.open(image_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as image:
        label = os.pread(image, length, offset).rstrip(b"\0")
        # Without a label it is from an earlier version, whose limit was the image's size.
        return Limit(int(label) if label.isdigit() else os.fstat(image).st_size)


def _mount_memory(space: str, size: int) -> None:
    with _context("tmpfs") as context:
        syscalls.fsconfig_string(context, "source", "cknix")
        syscalls.fsconfig_string(context, "size", str(size - size % loop.BLOCK_SIZE))
        syscalls.fsconfig_string(context, "nr_inodes", str(size // _BYTES_PER_MEMORY_INODE))
        syscalls.fsconfig_string(context, "mode", "0755")
        _mount(context, space)


@contextlib.contextmanager
def _context(fstype: str) -> Iterator[int]:
    with syscalls.owned(syscalls.fsopen(fstype)) as context:
        yield context


def _mount(context: int, space: str) -> None:
    """Mount the configured file system at *space*, complete: nobody ever sees it without its directories."""
    with explained(f"mount a file system at {space}", MountFailed):
        syscalls.fsconfig_create(context)
        root = syscalls.fsmount(context, _ATTRIBUTES)
    with syscalls.owned(root):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir("lost+found", dir_fd=root)
        for name in ("upper", "work"):
            os.mkdir(name, 0o755, dir_fd=root)
        syscalls.move_mount(root, space)


def _make_ext4(image: int, journal: int, label: str) -> None:
    """An empty ext4 with *journal* MiB of journal in the file of descriptor *image*, called *label*.

    Raises :class:`OSError` with ENOSPC, VolumeFailed.
    """
    program = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', os.defpath)}:{_WHERE_MKFS_IS}")
    if program is None:
        raise VolumeFailed(
            "cannot make a volume with a size limit on disk: this node's driver has no mkfs.ext4; install e2fsprogs "
            "beside it, or ask for memory instead of disk"
        )
    features, extended = [*_FEATURES], "nodiscard,lazy_itable_init=1,num_backup_sb=0"
    options = ["-q", "-F", "-b", str(loop.BLOCK_SIZE), "-I", str(_INODE_SIZE), "-i", str(_BYTES_PER_INODE)]
    options += ["-m", "0", "-L", label]
    if journal:
        features.append("has_journal")
        extended += ",lazy_journal_init=1"
        options += ["-J", f"size={journal}"]
    options += ["-O", ",".join(features), "-E", extended]
    # By descriptor: should we be killed now, it works on this file and on no other that later has its name.
    argv = [program, *options, f"/proc/self/fd/{image}"]
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={"LC_ALL": "C"},
        pass_fds=(image,),
        start_new_session=True,
    ) as process:
        try:
            ended = _ends(process.pid, _MKFS_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        assert process.stderr is not None
        said = os.fsdecode(os.read(process.stderr.fileno(), _MKFS_OUTPUT)).strip()
    if not ended:
        raise VolumeFailed(f"mkfs.ext4 was stopped after {_MKFS_SECONDS:.0f} s; is the node's disk overloaded?")
    if code != 0:
        if os.strerror(errno.ENOSPC) in said:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise VolumeFailed(f"mkfs.ext4 answered {code}: {said}")


def _ends(pid: int, seconds: float) -> bool:
    """True when the child *pid* ends within *seconds*; it is not reaped."""
    with syscalls.owned(os.pidfd_open(pid)) as process:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(seconds * 1000))


def _drop_unwritten(space: str) -> None:
    """Make the unmount of much written data quick: what is only in the page cache need not reach the disk any more."""
    with contextlib.suppress(OSError):
        found = os.statvfs(space)
        if (found.f_blocks - found.f_bfree) * found.f_frsize >= _WORTH_DROPPING:
            with syscalls.owned(os.open(space, os.O_RDONLY | os.O_DIRECTORY)) as root:
                fcntl.ioctl(root, _EXT4_IOC_SHUTDOWN, _WITHOUT_FLUSHING)


def _await_end(device: loop.LoopDevice, path: str) -> None:
    """Wait until *device* has let go of its file: others, such as udev, may have it open for a moment."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not device.ended():
        if time.monotonic() > deadline:
            # It ends when they do, and then frees the file, whatever has become of its name.
            log.warning("%s still shows what was written in %s: a mount in another namespace holds it", device, path)
            return
        time.sleep(_POLL_SECONDS)
