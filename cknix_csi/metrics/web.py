"""HTTP answers for kubelet's probes and for Prometheus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web

from cknix_csi.listening import Bounds, listening
from cknix_csi.metrics.pages import Page

_BOUNDS = Bounds(connections=256, patience=10.0, drain=2.0)
"""Probes and scrapes are few and quick; Prometheus takes a closed connection for what it is, and makes another."""


@asynccontextmanager
async def answering(
    address: tuple[str, int] | None, pages: Mapping[str, Page], bounds: Bounds = _BOUNDS
) -> AsyncIterator[int]:
    """Answer ``GET`` of *pages* by path at *address* (host, port) during the block; gives the bound port.

    Without an address nothing is served, and the port is 0.  Raises OSError when it cannot listen there.
    """
    if address is None:
        yield 0
        return
    app = web.Application()
    for path, page in pages.items():
        app.router.add_get(path, _handler(page))
    async with listening(app, *address, bounds) as port:
        yield port


def _handler(page: Page) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        answer = await page(request.headers.get("Accept", ""))
        headers = {"Content-Type": answer.content_type, "Cache-Control": "no-store"}
        return web.Response(body=answer.body, status=answer.status, headers=headers)

    return handle
