"""Work, and helpers beside it that it does not need: what befalls them does not end it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from cknix_csi.api.errors import CknixError
from cknix_csi.kube.backoff import Backoff
from cknix_csi.repeats import Repeats

Helper = Callable[[], Coroutine[Any, Any, None]]
"""Begins it; called again when it has failed."""

_FIRST_SECONDS = 1.0
_LONGEST_SECONDS = 60.0

_log = logging.getLogger(__name__)


async def beside(
    helpers: Mapping[str, Helper], work: Coroutine[Any, Any, None], *, first_pause: float = _FIRST_SECONDS
) -> None:
    """Run *work* to its end, and *helpers*, by what they are called in the log, as long.

    A helper that fails as the world may fail (OSError, CknixError) begins again after *first_pause* seconds, and
    later and later; any other exception is a bug, and is raised in a group.  What *work* raises is raised, a CknixError
    alone and not in a group.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            helping = [tasks.create_task(_again_and_again(name, helpers[name], first_pause)) for name in helpers]
            await tasks.create_task(work)
            for task in helping:
                task.cancel()
    except* CknixError as group:
        raise group.exceptions[0] from None


async def _again_and_again(name: str, helper: Helper, first_pause: float) -> None:
    task = asyncio.current_task()
    assert task is not None
    clock = asyncio.get_running_loop().time
    backoff = Backoff(first=first_pause, cap=_LONGEST_SECONDS)
    failures = Repeats()
    while True:
        began = clock()
        try:
            await helper()
        except (CknixError, OSError) as failure:
            why = _words(failure)
        except ExceptionGroup as group:
            if group.split((CknixError, OSError))[1] is not None:
                raise
            why = _words(group)
        else:
            return
        if task.cancelling():  # it has failed at being cancelled
            raise asyncio.CancelledError
        if clock() - began > _LONGEST_SECONDS:
            backoff.reset()
        pause = backoff.next()
        level = logging.WARNING if failures.failed(name, why).aloud else logging.DEBUG
        _log.log(level, "%s failed, and begins again in %.0f s: %s", name, pause, why)
        await asyncio.sleep(pause)


def _words(failure: BaseException) -> str:
    if isinstance(failure, BaseExceptionGroup):
        return "; ".join(map(_words, failure.exceptions))
    return str(failure) or repr(failure)
