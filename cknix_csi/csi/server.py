"""gRPC services on a unix socket that is whole as soon as it can be seen, and taken from nobody."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
import stat
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
from cknix_csi.metrics.ports import CANCELLED, OK, UNEXPECTED

log = logging.getLogger(__name__)

# sockaddr_un.sun_path holds 108 bytes with the closing NUL (unix(7)).
_MAX_SOCKET_PATH = 107
_LOCK_TRIES = 200
_LOCK_POLL_SECONDS = 0.05
# grpclib waits for connections that clients keep open; after this long they are left to the end of the process.
_CLOSE_SECONDS = 1.0
_UNKNOWN_METHOD = "unknown"


class SocketUnavailable(CknixError):
    """The socket's place cannot be had: somebody lives there, or it is no place for a socket."""

    situation = Situation.SOCKET_UNAVAILABLE


Observer = Callable[[str, str, str, float], None]
"""Told of each call that has ended, as ``NodeMetrics.rpc`` is."""


class Service(Protocol):
    """What grpclib's generated base classes provide."""

    def __mapping__(self) -> Mapping[str, Handler]: ...


@asynccontextmanager
async def serve(
    services: Sequence[Service], path: Path, *, grace: float, observe: Observer = lambda *call: None
) -> AsyncIterator[None]:
    """Serve *services* at *path* (mode 0600) while the block runs, and up to *grace* seconds more for running calls.

    The socket listens before it gets its name, replaces that of a dead process, and never that of a live one: raises
    :class:`SocketUnavailable`.  At the end the name goes first, new calls are answered UNAVAILABLE, and calls that are
    still running after *grace* are cancelled.
    """
    check_socket_path(path)
    server = _AnsweringServer(services)
    calls = _Calls([name for service in services for name in service.__mapping__()], observe)
    listen(server, RecvRequest, calls.admit)
    identity = await _appear(server, path)
    log.info("serving at %s", path)
    try:
        yield
    finally:
        await _vanish(path, identity)
        await calls.drain(grace)
        server.close()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await server.wait_closed()
        except TimeoutError:
            log.info("left connections to %s open", path)


def check_socket_path(path: Path) -> None:
    """Raises :class:`SocketUnavailable` when no socket can have this *path*."""
    size = len(os.fsencode(_aside(path)))
    if size > _MAX_SOCKET_PATH:
        raise SocketUnavailable(
            f"socket path {path} is {size - _MAX_SOCKET_PATH} bytes too long for a unix socket; choose a shorter one"
        )


class _AnsweringServer(Server):
    """Answers methods that nobody serves in a way that every client understands.

    grpclib refuses them with a reply that has no content-type, from which grpc-go (kubelet) makes UNKNOWN.
    """

    def __init__(self, services: Sequence[Service]) -> None:
        super().__init__(services)
        self._mapping = _Methods(self._mapping)


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


async def _appear(server: Server, path: Path) -> tuple[int, int]:
    """Listen under another name in the same directory, then rename; returns the socket's device and inode."""
    aside = _aside(path)
    async with _locked(path.parent):
        _refuse_live(path)
        aside.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(aside))
            aside.chmod(0o600)
            await server.start(sock=listener)
            aside.rename(path)
        except BaseException:
            listener.close()
            aside.unlink(missing_ok=True)
            raise
        return _identity(path)


async def _vanish(path: Path, identity: tuple[int, int]) -> None:
    """Remove the socket, unless another process has put its own there."""
    try:
        async with _locked(path.parent):
            if _identity(path) == identity:
                path.unlink()
    except (FileNotFoundError, SocketUnavailable):
        log.info("socket %s was gone already", path)


def _refuse_live(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketUnavailable(f"{path} exists and is not a socket; remove it or set CSI_ENDPOINT to another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        outcome = probe.connect_ex(str(path))
    if outcome == errno.ECONNREFUSED:
        log.info("socket %s was left by a process that is gone; replacing it", path)
    elif outcome != errno.ENOENT:
        raise SocketUnavailable(
            f"another process serves at {path}; stop it first (two node daemons cannot share a node)"
        )


@asynccontextmanager
async def _locked(directory: Path) -> AsyncIterator[None]:
    """Hold *directory* against other daemons that look whether a socket in it is alive."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SocketUnavailable(f"directory {directory} for a socket: {error.strerror}; create it") from error
    try:
        await _lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


async def _lock(descriptor: int, directory: Path) -> None:
    for _ in range(_LOCK_TRIES):
        if _try_lock(descriptor):
            return
        await asyncio.sleep(_LOCK_POLL_SECONDS)
    raise SocketUnavailable(
        f"directory {directory} has been locked by another process for {_LOCK_TRIES * _LOCK_POLL_SECONDS:.0f}s"
    )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _aside(path: Path) -> Path:
    # kubelet's plugin watcher ignores names that begin with a dot.
    return path.with_name(f".{path.name}")


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
