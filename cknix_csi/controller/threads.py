"""Blocking calls whose end matters even when nobody waits for their result any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Run *work* in a thread.  A cancellation, also a repeated one, is passed on only when *work* has ended.

    Otherwise a root could be made after the deletion that cancelled its maker has removed all of them.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        running.exception()  # the cancellation is the news
        raise cancelled
    return running.result()
