"""Events: what ``kubectl describe`` shows of an object's life.

Posting never holds up nor breaks the work that is told of: reports go into a bounded queue, and a failure to post is
logged.  An event that says the same as an earlier one raises that one's count, as kubelet's own do.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NoReturn

from cknix_csi.api.conditions import timestamp
from cknix_csi.api.expression import API_VERSION, KIND
from cknix_csi.kube.api import CONFLICT, MERGE_PATCH, NOT_FOUND, Api, ApiError, Json, core

Type = Literal["Normal", "Warning"]

# core/v1 validation: an Event's note is at most 1 KiB.
MAX_MESSAGE = 1024
MAX_WAITING = 1000
_MAX_NAME = 253
_TRIES = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """The object an Event is about."""

    namespace: str
    name: str
    uid: str
    api_version: str = API_VERSION
    kind: str = KIND

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Event:
    subject: Subject
    type: Type
    reason: str
    """CamelCase and stable: people filter by it."""
    message: str

    @property
    def name(self) -> str:
        """The same for the same news of the same object, so that a repetition finds the first one."""
        said = "\0".join((self.subject.uid, self.type, self.reason, self.message))
        digest = hashlib.sha256(said.encode()).hexdigest()[:16]
        return f"{self.subject.name[: _MAX_NAME - len(digest) - 1].rstrip('-.')}.{digest}"


class EventRecorder:
    """Posts core/v1 Events as *component*.  :meth:`run` must run for anything to arrive."""

    def __init__(
        self, api: Api, *, component: str, instance: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._api = api
        self._component = component
        self._instance = instance
        self._now = now
        self._waiting: asyncio.Queue[Event] = asyncio.Queue(MAX_WAITING)

    def post(self, subject: Subject, type_: Type, reason: str, message: str) -> None:
        """Tell of something that happened to *subject*; returns at once and never fails."""
        event = Event(subject, type_, reason, _bounded(message))
        try:
            self._waiting.put_nowait(event)
        except asyncio.QueueFull:
            _log.warning("event dropped, too many are waiting: %s", event)

    async def run(self) -> NoReturn:
        """Post what :meth:`post` was given, in order, until cancelled."""
        while True:
            event = await self._waiting.get()
            try:
                await self._post(event)
            except ApiError as error:
                _log.warning("event %s of %s is lost: %s", event.reason, event.subject.name, error.message)

    async def _post(self, event: Event) -> None:
        path = core("events", event.subject.namespace, event.name)
        for _ in range(_TRIES):
            now = timestamp(self._now())
            try:
                await self._api.create(core("events", event.subject.namespace), self._body(event, now))
                return
            except ApiError as error:
                if error.status != CONFLICT:
                    raise
            try:
                # A patch answers with the whole object, so that the right to read Events is not needed.
                known = await self._api.patch(path, {"lastTimestamp": now}, kind=MERGE_PATCH)
                count = known.get("count")
                again = {"count": (count if isinstance(count, int) else 1) + 1}
                await self._api.patch(path, again, kind=MERGE_PATCH)
                return
            except ApiError as error:
                # Events expire; it may have gone between the two requests.
                if error.status != NOT_FOUND:
                    raise

    def _body(self, event: Event, now: str) -> Json:
        subject = event.subject
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": event.name, "namespace": subject.namespace},
            "involvedObject": {
                "apiVersion": subject.api_version,
                "kind": subject.kind,
                "namespace": subject.namespace,
                "name": subject.name,
                "uid": subject.uid,
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "reportingInstance": self._instance,
        }


def _bounded(message: str) -> str:
    """At most :data:`MAX_MESSAGE` bytes; of a longer one the end is kept, where Nix says what went wrong."""
    data = message.encode()
    if len(data) <= MAX_MESSAGE:
        return message
    mark = "…"
    return mark + data[len(data) - MAX_MESSAGE + len(mark.encode()) :].decode(errors="ignore")
