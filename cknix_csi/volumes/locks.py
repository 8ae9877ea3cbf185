"""Locks by name, and a lock against other processes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator


class _Lock(asyncio.Lock):
    users = 0
    """How many hold or await it."""


class KeyedLocks:
    """One asyncio lock per name, kept only while somebody holds or awaits it."""

    def __init__(self) -> None:
        self._locks: dict[str, _Lock] = {}

    def taken(self, key: str) -> bool:
        """True while somebody holds or awaits *key*."""
        return key in self._locks

    @contextlib.asynccontextmanager
    async def hold(self, *keys: str) -> AsyncIterator[None]:
        """Hold all *keys*, taken in the order given; callers keep one order everywhere, or they wait for each other."""
        async with contextlib.AsyncExitStack() as held:
            for key in keys:
                await held.enter_async_context(self._one(key))
            yield

    @contextlib.asynccontextmanager
    async def _one(self, key: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(key, _Lock())
        lock.users += 1
        try:
            async with lock:
                yield
        finally:
            lock.users -= 1
            if not lock.users:
                del self._locks[key]


class ProcessLock:
    """A lock on the directory *path*, which other processes respect that take it the same way (flock(2))."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self) -> bool:
        """True when this object has the lock, False while another one has it; it ends with the process at the latest.

        Raises OSError when the directory cannot be opened.
        """
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def is_moot(self) -> bool:
        """True when this object has the lock of a directory that is not at the path any more.  Raises OSError."""
        if self._descriptor is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return True

    def release(self) -> None:
        """Let go of it; fine when it was not taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
