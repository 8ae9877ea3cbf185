"""gRPC services on a unix socket that is whole as soon as it can be seen, and taken from nobody."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty
from grpclib.const import Cardinality, Handler, Status
from grpclib.events import RecvRequest, listen
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.csi.errors import Refusal, grpc_error
from cknix_csi.csi.sockets import Place
from cknix_csi.metrics.ports import CANCELLED, OK, UNEXPECTED

log = logging.getLogger(__name__)

# grpclib waits for connections that clients keep open; after this long they are left to the end of the process.
_CLOSE_SECONDS = 1.0
_UNKNOWN_METHOD = "unknown"


Observer = Callable[[str, str, str, float], None]
"""Told of each call that has ended, as ``NodeMetrics.rpc`` is."""


class Service(Protocol):
    """What grpclib's generated base classes provide."""

    def __mapping__(self) -> Mapping[str, Handler]: ...


class Served:
    """A server and its socket."""

    def __init__(self, server: _AnsweringServer, path: Path) -> None:
        self._server = server
        self._place = Place(path)

    @property
    def path(self) -> Path:
        return self._place.path

    @property
    def there(self) -> bool:
        """Whether who connects to the path reaches this server."""
        return self._place.held

    async def appear(self) -> None:
        """Listen at the path, anew if the socket there has been lost; connections that are open go on.

        Raises :class:`SocketUnavailable`, and OSError.
        """
        await self._place.take(self._server.accept)

    async def show_again(self) -> None:
        """Have who watches the directory see the socket appear; raises as :meth:`appear` does."""
        await self._place.show_again()

    async def vanish(self) -> None:
        """Give the path back."""
        await self._place.leave()


@asynccontextmanager
async def serve(
    services: Sequence[Service], path: Path, *, grace: float, observe: Observer = lambda *call: None
) -> AsyncIterator[Served]:
    """Serve *services* at *path* (mode 0600) while the block runs, and up to *grace* seconds more for running calls.

    The socket listens before it gets its name, replaces that of a dead process, and never that of a live one: raises
    :class:`SocketUnavailable`.  At the end the name goes first, new calls are answered UNAVAILABLE, and calls that are
    still running after *grace* are cancelled.
    """
    server = _AnsweringServer(services)
    calls = _Calls([name for service in services for name in service.__mapping__()], observe)
    listen(server, RecvRequest, calls.admit)
    served = Served(server, path)
    await served.appear()
    log.info("serving at %s", path)
    try:
        yield served
    finally:
        await served.vanish()
        await calls.drain(grace)
        server.close()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await server.wait_closed()
        except TimeoutError:
            log.info("left connections to %s open", path)


class _AnsweringServer(Server):
    """Answers methods that nobody serves in a way that every client understands.

    grpclib refuses them with a reply that has no content-type, from which grpc-go (kubelet) makes UNKNOWN.
    """

    def __init__(self, services: Sequence[Service]) -> None:
        super().__init__(services)
        self._mapping = _Methods(self._mapping)

    async def accept(self, listener: socket.socket) -> None:
        """Accept what connects to *listener*, and to none before it; connections that are open go on."""
        previous, self._server = self._server, None
        try:
            await self.start(sock=listener)
        except BaseException:
            self._server = previous
            raise
        if previous is not None:
            previous.close()


class _Methods(dict[str, Handler]):
    def get(self, name: str, default: Any = None) -> Handler:
        async def refuse(stream: Stream[Any, Any]) -> None:
            raise grpc_error(CknixError(f"{name} is not a method of this driver", Situation.NOT_SUPPORTED))

        return super().get(name) or Handler(refuse, Cardinality.UNARY_UNARY, Empty, Empty)


class _Calls:
    """Counts running calls, which grpclib would cancel when it closes, and has each observed."""

    def __init__(self, methods: Collection[str], observe: Observer) -> None:
        self._methods = frozenset(methods)
        self._observe = observe
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    async def admit(self, event: RecvRequest) -> None:
        if self._draining:
            raise grpc_error(CknixError("this process is shutting down; retry", Situation.SHUTTING_DOWN))
        method = event.method_func
        # Clients may ask for any name; there are not to be as many series.
        name = event.method_name if event.method_name in self._methods else _UNKNOWN_METHOD

        async def counted(stream: Stream[Any, Any]) -> None:
            self._running += 1
            self._idle.clear()
            started = time.monotonic()
            ended: BaseException | None = None
            try:
                await method(stream)
            except BaseException as error:
                ended = error
                raise
            finally:
                self._observe(name, *_told(ended), time.monotonic() - started)
                self._running -= 1
                if not self._running:
                    self._idle.set()

        event.method_func = counted

    async def drain(self, grace: float) -> None:
        self._draining = True
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d calls are still running after %.0fs and are cancelled", self._running, grace)


def _told(ended: BaseException | None) -> tuple[str, str]:
    """Code and reason that a call has been answered with."""
    match ended:
        case None:
            return Status.OK.name, OK
        case Refusal():
            return ended.status.name, ended.reason
        case GRPCError():  # grpclib's own, such as for a request that is none
            return ended.status.name, UNEXPECTED
        case asyncio.CancelledError():
            return Status.CANCELLED.name, CANCELLED
        case _:
            return Status.UNKNOWN.name, UNEXPECTED
