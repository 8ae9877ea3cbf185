"""HTTP answers for kubelet's probes and for Prometheus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web

from cknix_csi.metrics.pages import Page


@asynccontextmanager
async def answering(address: tuple[str, int] | None, pages: Mapping[str, Page]) -> AsyncIterator[int]:
    """Answer ``GET`` of *pages* by path at *address* (host, port) during the block; gives the bound port.

    Without an address nothing is served, and the port is 0.  Raises OSError when it cannot listen there.
    """
    if address is None:
        yield 0
        return
    app = web.Application()
    for path, page in pages.items():
        app.router.add_get(path, _handler(page))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, *address).start()
        port: int = runner.addresses[0][1]
        yield port
    finally:
        await runner.cleanup()


def _handler(page: Page) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        answer = await page(request.headers.get("Accept", ""))
        headers = {"Content-Type": answer.content_type, "Cache-Control": "no-store"}
        return web.Response(body=answer.body, status=answer.status, headers=headers)

    return handle
