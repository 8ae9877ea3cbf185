"""What is answered over HTTP, whoever serves it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Answer:
    """What ``GET`` of a path gives."""

    body: bytes
    content_type: str = TEXT
    status: int = 200


Page = Callable[[str], Awaitable[Answer]]
"""Answers a request; its argument is the header ``Accept``."""


async def lives(accept: str) -> Answer:
    """Whoever gets this has been answered by the event loop, which is all that a liveness probe should ask: a restart
    brings back no API server, no cache and no disk."""
    return Answer(b"ok\n")
