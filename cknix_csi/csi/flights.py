"""Work that belongs to the daemon and not to the RPC that asked for it first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Flights(Generic[K]):
    """At most one task per key; callers share it, and may stop waiting without ending it.

    Nothing is remembered of a task that has ended: the next call starts anew.
    """

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[None]] = {}

    def join(self, key: K, start: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """The running task of *key*, or a new one from *start*.

        Wait for it with :func:`asyncio.wait`, which leaves it running when the waiter is cancelled.
        """
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(start(), name=f"flight {key}")
            task.add_done_callback(lambda ended: self._forget(key, ended))
        return task

    def running(self) -> list[K]:
        """Keys of the tasks that run now."""
        return list(self._tasks)

    def end(self, key: K) -> None:
        """Cancel the task of *key*, if there is one; it ends by itself."""
        if (task := self._tasks.get(key)) is not None:
            task.cancel()

    async def cancel(self, key: K) -> None:
        """Cancel the task of *key*, if there is one, and wait until it has undone what it began."""
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def close(self) -> None:
        """Cancel all tasks and wait for them."""
        for task in self._tasks.values():
            task.cancel()
        while self._tasks:
            await asyncio.wait(set(self._tasks.values()))

    def _forget(self, key: K, task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # retrieved: nobody may be waiting any more
