"""HTTP for whoever comes: no number of clients, and no slowness of them, takes the process's descriptors or its log.

aiohttp by itself takes any number of connections, waits an hour for the headers of a request, and logs a traceback for
each that is none.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

from cknix_csi.settings import ANY

_ANY_4 = "0.0.0.0"  # noqa: S104 - see ANY
_BACKLOG = 128
_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})
_OF_CLIENTS = (HttpProcessingError, web.RequestPayloadError, ConnectionError)
"""What only tells that a client does not speak HTTP, or speaks no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What clients may take."""

    connections: int
    """At once, but at most half of the descriptors that the process may have.

    One more closes another one: of the address that has the most of them the one that has waited longest for a
    request, or the newest when all of them have asked.
    """
    patience: float
    """Seconds from a connection's beginning, or from an answer, until all of the next request's headers are there.

    An answer that has not been taken by then is broken off.  How long an answer is in the making is not limited.
    """
    drain: float
    """Seconds that answers in the making get when it all ends."""


@asynccontextmanager
async def listening(
    app: web.Application, host: str, port: int, bounds: Bounds, *, handler_cancellation: bool = False
) -> AsyncIterator[int]:
    """Serve *app* at *host* (see :data:`~cknix_csi.settings.ANY`) and *port* (0: any) during the block; gives the port.

    *handler_cancellation*: a handler whose client has gone is cancelled.  Raises OSError when it cannot listen there.
    """
    app.middlewares.append(_marking)
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=handler_cancellation, shutdown_timeout=bounds.drain
    )
    await runner.setup()
    try:
        server = runner.server
        assert server is not None
        listener = await _listen(host, port, _Room(server, bounds).connection)
        try:
            bound: int = listener.sockets[0].getsockname()[1]
            yield bound
        finally:
            listener.close()
    finally:
        await runner.cleanup()


async def _listen(host: str, port: int, connection: Callable[[], asyncio.Protocol]) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    if host == ANY:
        try:
            if socket.has_dualstack_ipv6():
                # asyncio would make one that takes IPv6 only.
                both = socket.create_server((ANY, port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
                return await loop.create_server(connection, sock=both, backlog=_BACKLOG)
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
        host = _ANY_4
    return await loop.create_server(connection, host, port, backlog=_BACKLOG)


@web.middleware
async def _marking(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    connection = request.protocol
    assert isinstance(connection, _Connection)
    connection.asked()
    try:
        return await handler(request)
    finally:
        connection.answered()


class _Room:
    """The connections that there are, the oldest first."""

    def __init__(self, server: web.Server, bounds: Bounds) -> None:
        self._server = server
        self.patience = bounds.patience
        self._most = min(bounds.connections, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
        self._connections: dict[_Connection, None] = {}
        self._waiting: dict[_Connection, None] = {}

    def connection(self) -> _Connection:
        return _Connection(self._server, self)

    def enter(self, connection: _Connection) -> None:
        self._connections[connection] = None
        self.wait(connection)
        if len(self._connections) > self._most:
            self._one_too_many().abort()

    def wait(self, connection: _Connection) -> None:
        """It waits for a request from now on."""
        self._waiting[connection] = None

    def work(self, connection: _Connection) -> None:
        self._waiting.pop(connection, None)

    def leave(self, connection: _Connection) -> None:
        self._waiting.pop(connection, None)
        self._connections.pop(connection, None)

    def _one_too_many(self) -> _Connection:
        ((address, _),) = Counter(each.address for each in self._connections).most_common(1)
        waiting = (each for each in self._waiting if each.address == address)
        return next(waiting, None) or [each for each in self._connections if each.address == address][-1]


class _Connection(web.RequestHandler):
    """aiohttp's, within the bounds of a room."""

    def __init__(self, server: web.Server, room: _Room) -> None:
        # None is what AppRunner passes on, too; the type does not know it.
        super().__init__(server, loop=asyncio.get_running_loop(), access_log=None)  # type: ignore[arg-type]
        self.address = ""
        self._room = room
        self._deadline: asyncio.TimerHandle | None = None
        self._underlying: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        # aiohttp forgets its own reference before all that it has written is sent.
        self._underlying = transport
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if peer else ""
        self._deadline = self._loop.call_later(self._room.patience, self.abort)
        self._room.enter(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_waiting()
        self._underlying = None
        self._room.leave(self)
        super().connection_lost(exc)

    def asked(self) -> None:
        """A request is there, and is being answered."""
        self._stop_waiting()
        self._room.work(self)

    def answered(self) -> None:
        """The answer is made, if not sent; the next request is due."""
        if self._underlying is not None:
            self._stop_waiting()
            self._deadline = self._loop.call_later(self._room.patience, self.abort)
            self._room.wait(self)

    def abort(self) -> None:
        """Break it off, whatever goes on."""
        self._room.leave(self)
        if self._underlying is not None:
            self._underlying.abort()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        if isinstance(kw.get("exc_info"), _OF_CLIENTS):
            self.logger.debug(*args, **kw)
        else:
            super().log_exception(*args, **kw)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
