"""Locks by name, and steps that cancellation does not tear apart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


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


async def finish(step: Coroutine[Any, Any, T]) -> T:
    """Run *step* to its end even when the caller is cancelled; the cancellation is raised afterwards.

    A worker thread cannot be stopped, so whatever undoes a step must not begin before the step has ended.
    """
    task = asyncio.create_task(step)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        raise cancelled from failure
    raise cancelled
