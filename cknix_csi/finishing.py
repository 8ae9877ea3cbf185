"""Steps that cancellation does not tear apart: a worker thread cannot be stopped, so whatever undoes one waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


async def finish(step: Coroutine[Any, Any, T], *, on_cancel: Callable[[], object] = lambda: None) -> T:
    """Run *step* to its end even when the caller is cancelled; the cancellation is raised afterwards.

    *on_cancel* is called at once at each cancellation, for steps that can be asked to end early.
    """
    task = asyncio.create_task(step)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        raise cancelled from failure
    raise cancelled


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """:func:`finish` of *function* in a worker thread."""
    return await finish(asyncio.to_thread(function, *args, **kwargs))


async def together(*steps: Coroutine[Any, Any, None]) -> None:
    """:func:`finish` of all *steps* at once: when one fails, or the caller is cancelled, the others end first."""

    async def run() -> None:
        for ended in await asyncio.gather(*steps, return_exceptions=True):
            if ended is not None:
                raise ended

    await finish(run())
