"""Tells kubelet that the process lives, also while it waits for its turn and serves no cache."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


@asynccontextmanager
async def alive(address: tuple[str, int] | None) -> AsyncIterator[None]:
    """Answer ``GET /livez`` at *address* (host, port) during the block.  Raises OSError when it cannot listen."""
    if address is None:
        yield
        return

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get("/livez", livez)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, *address).start()
        yield
    finally:
        await runner.cleanup()
