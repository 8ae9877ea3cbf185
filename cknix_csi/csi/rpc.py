"""What holds for every RPC of every service: translation of errors, and one log line per call."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from cknix_csi.api.errors import CknixError
from cknix_csi.csi.errors import grpc_error

log = logging.getLogger(__name__)

_Service = TypeVar("_Service")
_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


def rpc(
    handler: Callable[[_Service, _Request], Awaitable[_Reply]],
) -> Callable[[_Service, Stream[_Request, _Reply]], Coroutine[Any, Any, None]]:
    """Turn ``async def Method(self, request) -> reply`` into a grpclib handler.

    A :class:`CknixError` is answered with its own code; anything unexpected with INTERNAL, the exception's type and a
    logged traceback.  grpclib's own answer, UNKNOWN without words, never leaves.  Of the request only the volume's id
    is logged: every other field may hold secrets, tokens or sensitive mount flags (CSI spec, "Secrets Requirements").
    """
    name = handler.__name__

    @functools.wraps(handler)
    async def method(self: _Service, stream: Stream[_Request, _Reply]) -> None:
        started = time.monotonic()
        try:
            request = await stream.recv_message()
        except Exception as error:
            log.exception("%s: request cannot be read", name)
            raise GRPCError(Status.INTERNAL, f"{name}: the request cannot be read: {type(error).__name__}") from error
        if request is None:  # the client left before it had sent its message
            return
        call = _Call(name, str(getattr(request, "volume_id", "")), started)
        try:
            reply = await handler(self, request)
        except asyncio.CancelledError:
            call.log(logging.INFO, "abandoned by the client")
            raise
        except GRPCError as error:
            call.log(logging.INFO, f"{error.status.name}: {error.message}")
            raise
        except CknixError as error:
            refusal = grpc_error(error)
            call.log(logging.WARNING, f"{refusal.status.name}: {error.message}")
            raise refusal from error
        except Exception as error:
            log.exception("%s failed", call)
            words = f"{name}: unexpected {type(error).__name__}; the node daemon's log has the traceback"
            raise GRPCError(Status.INTERNAL, words) from error
        call.log(logging.DEBUG if _only_reads(name) else logging.INFO, "OK")
        await stream.send_message(reply)

    return method


class _Call:
    """One call, as it stands in the log."""

    def __init__(self, method: str, volume_id: str, started: float) -> None:
        self._method = method
        self._volume_id = volume_id
        self._started = started

    def log(self, level: int, outcome: str) -> None:
        log.log(level, "%s after %.3fs: %s", self, time.monotonic() - self._started, outcome)

    def __str__(self) -> str:
        return f"{self._method} volume={self._volume_id}" if self._volume_id else self._method


def _only_reads(method: str) -> bool:
    """Calls that come often and change nothing would drown the log."""
    return method == "Probe" or "Get" in method
