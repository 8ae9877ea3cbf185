"""What holds for every RPC of every service: translation of errors, and what the log tells of a call."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from grpclib.server import Stream

from cknix_csi import logs
from cknix_csi.api.attributes import PodInfo
from cknix_csi.api.errors import CknixError, InProgress
from cknix_csi.api.progress import humanise
from cknix_csi.api.situations import Situation
from cknix_csi.csi.errors import grpc_error
from cknix_csi.repeats import Repeated, Repeats

log = logging.getLogger(__name__)

# Where kubelet mounts a CSI volume (pkg/volume/csi, getTargetPath); the volume's name is the pod's, or the
# PersistentVolume's.
_KUBELETS_TARGET = re.compile(r".*/pods/(?P<uid>[^/]+)/volumes/kubernetes\.io~csi/(?P<volume>[^/]+)/mount/*")

_Reply = TypeVar("_Reply")
_Request = TypeVar("_Request")


class Service:
    """What the services of this driver have in common: they remember which calls fail at the moment."""

    def __init__(self) -> None:
        self.refusals = Repeats()


_Service = TypeVar("_Service", bound=Service)


def rpc(
    handler: Callable[[_Service, _Request], Awaitable[_Reply]],
) -> Callable[[_Service, Stream[_Request, _Reply]], Coroutine[Any, Any, None]]:
    """Turn ``async def Method(self, request) -> reply`` into a grpclib handler.

    A :class:`CknixError` is answered with its own code; anything unexpected with INTERNAL, the exception's type and a
    logged traceback.  grpclib's own answer, UNKNOWN without words, never leaves.  A failure that kubelet's retries
    repeat unchanged is a WARNING the first time and DEBUG from then on.  Of the request only names are logged
    (:func:`names_in`): every other field may hold secrets, tokens or sensitive mount flags (CSI spec, "Secrets
    Requirements").
    """
    name = handler.__name__

    @functools.wraps(handler)
    async def method(self: _Service, stream: Stream[_Request, _Reply]) -> None:
        started = time.monotonic()
        try:
            request = await stream.recv_message()
        except Exception as error:
            log.exception("%s: request cannot be read", name)
            words = f"{name}: the request cannot be read: {type(error).__name__}"
            raise grpc_error(CknixError(words, Situation.UNREADABLE_REQUEST)) from error
        if request is None:  # the client left before it had sent its message
            return
        _tell_idle(self.refusals)
        with logs.about(names_in(request)):
            call = _Call(name, request, started, self.refusals)
            try:
                reply = await handler(self, request)
            except asyncio.CancelledError:
                call.log(logging.INFO, "abandoned by the client")
                raise
            except CknixError as error:
                refusal = grpc_error(error)
                call.refused(error, refusal.status.name)
                raise refusal from error
            except Exception as error:
                call.broke(error)
                words = f"{name}: unexpected {type(error).__name__}; the driver's log has the traceback"
                raise grpc_error(CknixError(words)) from error
            call.succeeded()
        await stream.send_message(reply)

    return method


def names_in(request: object) -> dict[str, str]:
    """Which pod and volume *request* is about, as far as it tells, however malformed it is."""
    pod = PodInfo.parse(getattr(request, "volume_context", {}))
    place = _KUBELETS_TARGET.fullmatch(_path_in(request))
    return {
        "pod": f"{pod.namespace}/{pod.name}" if pod.name else "",
        "pod_uid": pod.uid or (place["uid"] if place else ""),
        # CreateVolume names the PersistentVolume, as kubelet's path does.
        "volume": place["volume"] if place else str(getattr(request, "name", "")),
        "volume_id": str(getattr(request, "volume_id", "")),
    }


def _path_in(request: object) -> str:
    """Where the volume is that *request* is about."""
    return str(getattr(request, "target_path", "") or getattr(request, "volume_path", ""))


class _Call:
    """One call, as it stands in the log."""

    def __init__(self, method: str, request: object, started: float, refusals: Repeats) -> None:
        self._method = method
        self._volume = (str(getattr(request, "volume_id", "") or getattr(request, "name", "")), _path_in(request))
        self._started = started
        self._refusals = refusals

    def log(self, level: int, outcome: str, *, traceback: bool = False) -> None:
        seconds = time.monotonic() - self._started
        log.log(level, "%s after %.3fs: %s", self._method, seconds, outcome, exc_info=traceback)

    def refused(self, error: CknixError, status: str) -> None:
        """*error* is an answer that the caller may expect."""
        waiting = isinstance(error, InProgress)
        # How far the work has come is no other failure.
        repeated = self._repeated(error.reason if waiting else f"{status}: {error.message}")
        level = logging.INFO if waiting else logging.WARNING
        self.log(level if repeated.aloud else logging.DEBUG, f"{status}: {error.message}{_times(repeated)}")

    def broke(self, error: Exception) -> None:
        """*error* is a bug or the machine's; to be called where it is handled."""
        repeated = self._repeated(repr(error))
        level = logging.ERROR if repeated.aloud else logging.DEBUG
        self.log(level, f"unexpected {type(error).__name__}{_times(repeated)}", traceback=True)

    def succeeded(self) -> None:
        # What was done is told by whoever did it.
        self.log(logging.DEBUG, "OK")
        ended = self._refusals.over((self._method, *self._volume))
        if ended is not None:
            log.info("%s succeeded after %s", self._method, _failures(ended))
        if self._method == "NodeUnpublishVolume":
            given_up = self._refusals.over(("NodePublishVolume", *self._volume))
            if given_up is not None:
                log.info("the volume was unpublished after its publish had met %s", _failures(given_up))

    def _repeated(self, words: str) -> Repeated:
        return self._refusals.failed((self._method, *self._volume), words, logs.fields())


def _tell_idle(refusals: Repeats) -> None:
    """Failures that ended because the pod did, of which nobody tells a CSI driver."""
    for idle in refusals.idle():
        with logs.about(idle.fields):
            log.info("nobody has asked again after %s: %s", _failures(idle), idle.words)


def _times(repeated: Repeated) -> str:
    return f" ({repeated.count} times in {humanise(repeated.seconds)})" if repeated.count > 1 else ""


def _failures(ended: Repeated) -> str:
    many = f"{ended.count} failures in {humanise(ended.seconds)}"
    return many if ended.count > 1 else "one failure"
