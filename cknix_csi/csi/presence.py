"""Sockets stay where kubelet looks for them, whatever others do to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from cknix_csi.api.errors import CknixError
from cknix_csi.repeats import Repeats

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Between two looks at a socket's path, each one lstat(2)."""


class Socket(Protocol):
    """What a server has at its path (``csi.server.Served``)."""

    @property
    def path(self) -> Path: ...
    @property
    def there(self) -> bool: ...
    async def appear(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A socket to be kept, and who is told of it."""

    socket: Socket
    lost: Callable[[str], None]
    """Told why it is away, at each look."""
    served: Callable[[], None] = field(default=lambda: None)
    """Told that it is served anew."""
    found: Callable[[], None] = field(default=lambda: None)
    """Told that the one that was away is there again, as where a directory was."""


async def keep(sockets: Sequence[Kept], *, seconds: float = LOOK_SECONDS) -> NoReturn:
    """Look every *seconds*, and serve anew what has been lost; what follows in *sockets*, only once that is back.

    Who took a path and lives keeps it, until it goes.
    """
    failures = Repeats()
    while True:
        await asyncio.sleep(seconds)
        for kept in sockets:
            if not await _there(kept, failures):
                break


async def _there(kept: Kept, failures: Repeats) -> bool:
    path = kept.socket.path
    if kept.socket.there:
        if failures.over(path):
            log.info("the socket %s is there again", path)
            kept.found()
        return True
    kept.lost(f"the socket {path} was removed or replaced")
    try:
        await kept.socket.appear()
    except (CknixError, OSError) as error:
        words = f"the socket {path} was removed or replaced, and cannot be served anew: {error}"
        kept.lost(words)
        log.log(logging.WARNING if failures.failed(path, words).aloud else logging.DEBUG, "%s", words)
        return False
    failures.over(path)
    log.warning("the socket %s was removed or replaced; it is served anew", path)
    kept.served()
    return True


async def until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Run *work* until *stop* is set, or it fails."""
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(work)
        await stop.wait()
        working.cancel()
