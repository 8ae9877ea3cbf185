"""How much disk a directory takes that a pod may write to at the same time: as `du` counts, and never in a hurry.

Nothing says how many files are there, so counting them is kept cheap whatever they are: one tree at a time, in one
thread that rests three times as long as it works, and no tree again within a minute.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time
from dataclasses import dataclass

from cknix_csi.volumes import syscalls
from cknix_csi.volumes.failures import explained

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_CONFINED = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV
_BLOCK = 512
"""Bytes per unit of st_blocks, whatever the file system (stat(2))."""
_BATCH = 1000
_REST = 3.0
"""Seconds of rest for each second of work."""
_MOST_SECONDS_OF_REST = 0.1
_FORGOTTEN_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class TreeSize:
    """What a directory takes of its file system, itself included; a file of several names counts once."""

    bytes: int
    """Of blocks on disk: the hole in a file takes none."""
    inodes: int


@dataclass(frozen=True, slots=True)
class _Known:
    size: TreeSize
    at: float


class TreeSizes:
    """The sizes of trees by their path, each at most *fresh* seconds old when nothing keeps it from being counted."""

    def __init__(self, *, fresh: float = 55.0, patience: float = 5.0, most: int = 1_000_000) -> None:
        """Who asks waits for a count at most *patience* seconds.  A count ends when it has come to *most* inodes."""
        self._fresh = fresh
        self._patience = patience
        self._most = most
        self._known: dict[str, _Known] = {}
        self._counting: dict[str, tuple[_Count, asyncio.Task[TreeSize]]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._closing = threading.Event()

    async def of(self, path: str) -> TreeSize:
        """The size of the directory *path*: as just counted or, where that takes long, as it was the last time.

        Before there is a last time, what has been counted so far.  Raises VolumeFailed, also when it is not there.
        """
        now = time.monotonic()
        known = self._known.get(path)
        if known is not None and now - known.at < self._fresh:
            return known.size
        if path not in self._counting:
            count = _Count(path, self._most, self._closing)
            task = asyncio.create_task(self._run(count), name=f"cknix size of {path}")
            self._counting[path] = count, task
            task.add_done_callback(lambda ended: self._ended(path, ended))
        count, task = self._counting[path]
        await asyncio.wait({task}, timeout=self._patience)
        if task.done():
            return task.result()
        return count.so_far if known is None else known.size

    async def close(self) -> None:
        """End all counts and wait for them; the next one asked for begins anew."""
        self._closing.set()
        while self._counting:
            await asyncio.wait({task for _, task in self._counting.values()})
        self._closing = threading.Event()

    async def _run(self, count: _Count) -> TreeSize:
        async with self._one_at_a_time:
            await asyncio.to_thread(count.run)
            return count.so_far

    def _ended(self, path: str, task: asyncio.Task[TreeSize]) -> None:
        del self._counting[path]
        now = time.monotonic()
        self._known = {path: known for path, known in self._known.items() if now - known.at < _FORGOTTEN_SECONDS}
        if not task.cancelled() and task.exception() is None and not self._closing.is_set():
            self._known[path] = _Known(task.result(), now)


class _Count:
    """One count.  By descriptors, and never through a symbolic link or into another mount: a pod may be at work there.

    What comes and goes meanwhile may be in it or not.  So may what is nested deeper than a path can name (4 KiB).
    """

    def __init__(self, path: str, most: int, end: threading.Event) -> None:
        self._path = path
        self._most = most
        self._end = end
        self._bytes = self._inodes = self._looked_at = 0
        self._device = 0
        self._linked: set[int] = set()
        """Inodes that have been met and have other names."""
        self._rested = time.monotonic()

    @property
    def so_far(self) -> TreeSize:
        return TreeSize(self._bytes, self._inodes)

    def run(self) -> None:
        """To be called in a worker thread.  Raises VolumeFailed."""
        self._rested = time.monotonic()
        with explained(f"count what is in {self._path}"), syscalls.owned(os.open(self._path, _FLAGS)) as top:
            found = os.fstat(top)
            self._device = found.st_dev
            self._add(found)
            pending = ["."]
            while pending and not self._enough():
                self._directory(top, pending.pop(), pending)

    def _enough(self) -> bool:
        return self._inodes >= self._most or self._end.is_set()

    def _directory(self, top: int, inside: str, pending: list[str]) -> None:
        try:
            opened = syscalls.openat2(top, inside, _FLAGS, _CONFINED)
        except OSError:  # it has gone, or become something else
            return
        with syscalls.owned(opened) as directory, os.scandir(directory) as entries:
            for entry in entries:
                self._pace()
                if self._enough():
                    return
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if found.st_dev == self._device:
                    self._add(found)
                    if stat.S_ISDIR(found.st_mode):
                        pending.append(f"{inside}/{entry.name}")

    def _add(self, found: os.stat_result) -> None:
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            if found.st_ino in self._linked:
                return
            self._linked.add(found.st_ino)
        self._bytes += found.st_blocks * _BLOCK
        self._inodes += 1

    def _pace(self) -> None:
        self._looked_at += 1
        if self._looked_at % _BATCH == 0:
            worked = time.monotonic() - self._rested
            self._end.wait(min(_REST * worked, _MOST_SECONDS_OF_REST))
            self._rested = time.monotonic()
