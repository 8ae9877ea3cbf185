"""Tells kubelet that the process lives, and Prometheus how; also while it waits for its turn and serves no cache."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cknix_csi.metrics.pages import Page, lives
from cknix_csi.metrics.web import answering


@asynccontextmanager
async def alive(address: tuple[str, int] | None, metrics: Page | None = None) -> AsyncIterator[int]:
    """Answer ``GET /livez``, and ``/metrics`` with *metrics*, at *address* (host, port) during the block.

    Gives the bound port.  Raises OSError when it cannot listen.
    """
    pages = {"/livez": lives} | ({} if metrics is None else {"/metrics": metrics})
    async with answering(address, pages) as port:
        yield port
