"""Trees of store objects made again in worker threads, and the presentation `copy` that has every file for itself.

Everything is done by descriptors: no symbolic link is followed, no other mount entered, and no path is too long.  Names
are bytes to the kernel; Python's surrogates carry those that are not UTF-8.  What Nix leaves of metadata is kept: mode,
owner, time, and which files are one inode (Nix strips all else when it registers a path).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from cknix_csi.finishing import finish
from cknix_csi.volumes import soundness, syscalls
from cknix_csi.volumes.failures import StoreDamaged
from cknix_csi.volumes.farm import FarmReport

THREADS = min(4, os.cpu_count() or 1)
"""Of a tree.  The GIL lets them overlap in the kernel only: more than processors, or more than four, are slower."""
_CHUNK = 16 << 20
"""Bytes copied between two looks at whether to stop."""
_LONG_PATH = 4000
"""Bytes; the kernel takes paths below PATH_MAX (4096), so longer ones are walked in parts."""
_LOCKS = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RESOLVE = syscalls.RESOLVE_NO_XDEV | syscalls.RESOLVE_NO_SYMLINKS
_NO_REFLINK = {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV}
"""What FICLONE answers when it will answer so for every file of this pair of directories."""


_BLOCK = 4096
_BLOCK_OF_STAT = 512
"""Bytes per unit of st_blocks, whatever the file system (stat(2))."""

T = TypeVar("T")


class Stopped(Exception):
    """The work was told to stop."""


class Placer(Protocol):
    """How one entry that is not a directory comes into a tree; called from several threads at once."""

    def file(self, source: int, target: int, name: str, report: FarmReport) -> None:
        """Make the regular file *name* of directory *source* in directory *target*.  Raises OSError, Stopped."""

    def symlink(self, source: int, target: int, name: str, report: FarmReport) -> None:
        """The same for a symbolic link.  Raises OSError."""

    def stop(self) -> None:
        """Make calls under way end soon with :class:`Stopped`."""

    def close(self) -> None:
        """Nothing more will be placed.  Raises OSError."""


async def rebuild(store_dir: Path, names: Sequence[str], placer: Placer, destination: str, threads: int) -> FarmReport:
    """Make the objects *names* of *store_dir* in *destination* with *threads* threads.

    Cancelled, it stops all threads and waits for them.  Raises OSError, StoreDamaged.
    """
    return await _rebuild(_Rebuild(placer, threads), store_dir, names, destination)


async def _rebuild(work: _Rebuild, store_dir: Path, names: Sequence[str], destination: str) -> FarmReport:
    return await _aside(lambda: work.run(str(store_dir), names, destination), work.stop)


async def _aside(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Run *work* in a thread of its own, not one of the loop's few: what is quick must not wait for this.

    Cancelled, it calls *stop* and waits for the end.
    """
    with ThreadPoolExecutor(1, "cknix tree 0") as executor:
        running = asyncio.get_running_loop().run_in_executor(executor, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop()
            await finish(_ended(running))
            raise


async def _ended(running: asyncio.Future[T]) -> None:
    await asyncio.wait({running})
    if not running.cancelled():
        running.exception()  # seen: what failed last does not matter to who has given up


class _Rebuild:
    """One tree; each directory is one piece of work, and finding more of them adds to the heap."""

    def __init__(self, placer: Placer, threads: int) -> None:
        self._placer = placer
        self._threads = threads
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        """Paths of directories, made in the destination already, from the top of either tree."""
        self._busy = 0
        self._stopped = False
        self._failure: BaseException | None = None
        self._reports: list[FarmReport] = []
        """One of each thread, growing."""
        self._source = -1
        self._target = -1

    @property
    def bytes_done(self) -> int:
        """Of files' data, so far."""
        return sum(report.bytes_copied + report.bytes_reflinked for report in self._reports)

    def stop(self) -> None:
        self._placer.stop()
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def run(self, store_dir: str, names: Sequence[str], destination: str) -> FarmReport:
        with (
            syscalls.owned(os.open(store_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as self._source,
            syscalls.owned(os.open(destination, _DIRECTORY)) as self._target,
        ):
            top = [(name, None) for name in names]
            self._waiting = self._entries(self._source, self._target, "", top, self._new_report())
            helpers: list[threading.Thread] = []
            try:
                for number in range(1, self._threads):
                    helpers.append(threading.Thread(target=self._work, name=f"cknix tree {number}"))
                    helpers[-1].start()
                self._work()
            except BaseException:  # no more threads can be started: those that could must not go on alone
                self.stop()
                raise
            finally:
                for helper in helpers:
                    if helper.ident is not None:
                        helper.join()
        if self._failure is not None:
            raise self._failure
        self._placer.close()
        total = FarmReport()
        for report in self._reports:
            total.add(report)
        return total

    def _work(self) -> None:
        report = self._new_report()
        try:
            found: list[str] | None = None
            while (path := self._next(found)) is not None:
                found = self._directory(path, report)
        except BaseException as failure:
            with self._changed:
                self._failure = self._failure or failure
            self.stop()

    def _new_report(self) -> FarmReport:
        report = FarmReport()
        with self._changed:
            self._reports.append(report)
        return report

    def _next(self, found: list[str] | None) -> str | None:
        """Put down what was *found* in the last directory and take another; None when all is done."""
        with self._changed:
            if found is not None:
                self._busy -= 1
                self._waiting += found
                if len(found) > 1 or not self._busy:
                    self._changed.notify_all()
            while not self._waiting and self._busy and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise Stopped
            if not self._waiting:
                return None
            self._busy += 1
            return self._waiting.pop()

    def _directory(self, path: str, report: FarmReport) -> list[str]:
        """Fill and finish one directory; returns the paths of those in it, which are made but empty."""
        with (
            syscalls.owned(_open(self._source, path)) as source,
            syscalls.owned(_open(self._target, path)) as target,
        ):
            with os.scandir(source) as entries:
                found = self._entries(source, target, path, ((entry.name, entry) for entry in entries), report)
            # Now, with all its entries made: what happens inside those does not touch it.
            copy_metadata(os.fstat(source), target)
            return found

    def _entries(
        self,
        source: int,
        target: int,
        path: str,
        entries: Iterable[tuple[str, os.DirEntry[str] | None]],
        report: FarmReport,
    ) -> list[str]:
        """Make *entries* of directory *source* in *target*; returns the paths of those that are directories."""
        directories: list[str] = []
        for name, entry in entries:
            if self._stopped:
                raise Stopped
            kind = _kind(source, name, entry)
            if kind == stat.S_IFREG:
                self._placer.file(source, target, name, report)
            elif kind == stat.S_IFDIR:
                os.mkdir(name, 0o700, dir_fd=target)
                directories.append(f"{path}/{name}" if path else name)
                report.directories += 1
            elif kind == stat.S_IFLNK:
                self._placer.symlink(source, target, name, report)
                report.symlinks += 1
            else:
                raise StoreDamaged(f"{path or name} in the store holds something that is no directory, file or link")
        return directories


def _kind(directory: int, name: str, entry: os.DirEntry[str] | None) -> int:
    """The file type bits of *name*; without a stat where the listing told them."""
    if entry is not None:
        if entry.is_file(follow_symlinks=False):
            return stat.S_IFREG
        if entry.is_dir(follow_symlinks=False):
            return stat.S_IFDIR
        if entry.is_symlink():
            return stat.S_IFLNK
    return stat.S_IFMT(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)


def _open(top: int, path: str) -> int:
    """A descriptor of the directory *path* below *top*, however long; no part of it is a link or another mount."""
    if len(path) * 4 <= _LONG_PATH:  # no character has more bytes
        return syscalls.openat2(top, path, _DIRECTORY, _RESOLVE)
    with contextlib.ExitStack() as held:
        rest = os.fsencode(path)
        while len(rest) > _LONG_PATH:
            head, _, _ = rest[:_LONG_PATH].rpartition(b"/")
            rest = rest[len(head) + 1 :]
            top = held.enter_context(syscalls.owned(syscalls.openat2(top, os.fsdecode(head), _DIRECTORY, _RESOLVE)))
        return syscalls.openat2(top, os.fsdecode(rest), _DIRECTORY, _RESOLVE)


def copy_metadata(original: os.stat_result, file: int) -> None:
    """Give *file*, which is ours alone, owner, mode and time of *original*.  Raises OSError."""
    if original.st_uid or original.st_gid:
        os.fchown(file, original.st_uid, original.st_gid)
    os.fchmod(file, stat.S_IMODE(original.st_mode))
    os.utime(file, ns=(original.st_mtime_ns, original.st_mtime_ns))


class Copier:
    """Places files by reflink or copy, sparse ones sparse; what is one inode in the store is one inode of its own here.

    *destination*: the directory that the tree is made in; while files are placed, it holds one more entry.
    """

    def __init__(self, destination: str) -> None:
        self._anchors = f"{destination}/.copying-{uuid.uuid4().hex}"
        """The directory where the first copy of an inode with several names has another name: its inode's number."""
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._anchored = False
        self._reflinks = True
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        if self._anchored:
            with os.scandir(self._anchors) as entries:
                names = [entry.path for entry in entries]
            for name in names:
                os.unlink(name)
            os.rmdir(self._anchors)

    def file(self, source: int, target: int, name: str, report: FarmReport) -> None:
        with syscalls.owned(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)) as original:
            found = os.fstat(original)
            if found.st_nlink == 1:
                self._copy(original, found, target, name, report)
                return
            anchor = f"{self._anchors}/{found.st_dev:x}-{found.st_ino:x}"
            with self._locks[found.st_ino % _LOCKS]:
                if self._link(anchor, target, name):
                    report.linked += 1
                    return
                self._copy(original, found, target, name, report)
                self._anchor(target, name, anchor)

    def symlink(self, source: int, target: int, name: str, report: FarmReport) -> None:
        original = os.stat(name, dir_fd=source, follow_symlinks=False)
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        if original.st_uid or original.st_gid:
            os.chown(name, original.st_uid, original.st_gid, dir_fd=target, follow_symlinks=False)
        times = (original.st_mtime_ns, original.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)

    def _link(self, anchor: str, target: int, name: str) -> bool:
        """Give the copy that *anchor* is a further name; False when there is none, or it can have no more."""
        try:
            os.link(anchor, name, dst_dir_fd=target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.EMLINK}:
                raise
            return False
        return True

    def _anchor(self, target: int, name: str, anchor: str) -> None:
        if not self._anchored:
            os.makedirs(self._anchors, 0o700, exist_ok=True)
            self._anchored = True
        with contextlib.suppress(FileNotFoundError):
            os.unlink(anchor)  # one that can have no more names
        os.link(name, anchor, src_dir_fd=target, follow_symlinks=False)

    def _copy(self, original: int, found: os.stat_result, target: int, name: str, report: FarmReport) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with syscalls.owned(os.open(name, flags, 0o600, dir_fd=target)) as copy:
            if self._reflink(original, copy):
                report.reflinked += 1
                report.bytes_reflinked += found.st_size
            else:
                self._copy_data(original, found.st_size, copy, report)
                report.copied += 1
            copy_metadata(found, copy)

    def _reflink(self, original: int, copy: int) -> bool:
        if not self._reflinks:
            return False
        try:
            syscalls.clone_file(original, copy)
        except OSError as error:
            if error.errno in _NO_REFLINK:
                self._reflinks = False
            elif error.errno != errno.EINVAL:  # which is about this file
                raise
            return False
        return True

    def _copy_data(self, original: int, size: int, copy: int, report: FarmReport) -> None:
        """Copy what is not a hole."""
        os.ftruncate(copy, size)
        end = 0
        while (start := _next_data(original, end)) is not None:
            end = os.lseek(original, start, os.SEEK_HOLE)
            os.lseek(copy, start, os.SEEK_SET)
            while start < end:
                if self._stopped:
                    raise Stopped
                # Not copy_file_range: it refuses pairs of file systems (EXDEV) that sendfile takes, and gains nothing.
                sent = os.sendfile(copy, original, start, min(_CHUNK, end - start))
                if not sent:
                    raise OSError(errno.EIO, "the file became shorter while it was copied")
                start += sent
                report.bytes_copied += sent


def _next_data(file: int, offset: int) -> int | None:
    try:
        return os.lseek(file, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


class CopyEngine:
    """The presentation `copy`: all files are the tree's own, so that it may be written to without harm to the store."""

    def __init__(self, threads: int = THREADS) -> None:
        self._threads = threads
        self._work: _Rebuild | None = None

    @property
    def bytes_done(self) -> int:
        """How many bytes of files' data the last :meth:`fill` has made so far."""
        return self._work.bytes_done if self._work is not None else 0

    async def fill(self, store_dir: Path, names: Sequence[str], destination: str) -> FarmReport:
        """See :class:`~cknix_csi.volumes.farm.FarmEngine`."""
        self._work = _Rebuild(Copier(destination), self._threads)
        return await _rebuild(self._work, store_dir, names, destination)

    async def measure(self, store_dir: Path, names: Sequence[str]) -> CopySize:
        """What a copy of the objects *names* of *store_dir* will take.

        A cancellation ends the work soon.  Raises OSError, StoreDamaged.
        """
        stop = threading.Event()
        return await _aside(lambda: _measure(str(store_dir), names, stop), stop.set)


@dataclass(frozen=True, slots=True)
class CopySize:
    """The data of files, of which each inode counts once and holes do not."""

    data: int
    """Bytes: no file system that keeps them as they are takes less."""
    in_blocks: int
    """Bytes, each file in whole blocks of 4 KiB: what ext4 and tmpfs take at the least."""


def _measure(store_dir: str, names: Sequence[str], stop: threading.Event) -> CopySize:
    data = in_blocks = 0
    seen: set[tuple[int, int]] = set()
    waiting: list[str] = []

    def count(path: str, found: os.stat_result) -> None:
        nonlocal data, in_blocks
        if stat.S_ISDIR(found.st_mode):
            waiting.append(path)
        elif stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) not in seen:
            if found.st_nlink > 1:
                seen.add((found.st_dev, found.st_ino))
            size = min(found.st_size, found.st_blocks * _BLOCK_OF_STAT)
            data += size
            in_blocks += -(-size // _BLOCK) * _BLOCK

    with syscalls.owned(os.open(store_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as top:
        for name in names:
            try:
                count(name, os.stat(name, dir_fd=top, follow_symlinks=False))
            except FileNotFoundError:
                raise soundness.missing(name) from None
        while waiting:
            if stop.is_set():
                raise Stopped
            path = waiting.pop()
            with syscalls.owned(_open(top, path)) as directory, os.scandir(directory) as entries:
                for entry in entries:
                    count(f"{path}/{entry.name}", entry.stat(follow_symlinks=False))
    return CopySize(data, in_blocks)
