"""Looking at a disk that may have stopped to answer, without ever waiting for it for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Looking(Generic[T]):
    """Calls a blocking function in a thread, one call at a time however many ask.

    A disk that hangs keeps that one thread, and not one more for each question.
    """

    def __init__(self, look: Callable[[], T]) -> None:
        self._look = look
        self._task: asyncio.Task[T] | None = None

    async def within(self, seconds: float) -> T:
        """What the function returns or raises; raises TimeoutError when that takes longer, while it goes on."""
        task = self._task
        if task is None:
            task = self._task = asyncio.create_task(asyncio.to_thread(self._look), name="look")
            task.add_done_callback(self._forget)
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise TimeoutError
        return task.result()

    def _forget(self, task: asyncio.Task[T]) -> None:
        self._task = None
        if not task.cancelled():
            task.exception()  # retrieved: nobody may be waiting any more
