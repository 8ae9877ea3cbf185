"""One worker at a time: a Lease of coordination.k8s.io, held while working.

The rules are those of client-go's leader election: the holder renews; others take the Lease when they have seen no
change of it for its whole duration, by their own clock.  Nobody compares clocks with anybody.

One thing differs.  A holder that cannot renew goes on with what only it can see, such as builds in its own store, and
holds back what others see, which all goes through the API server (:class:`FencedApi`).  When the API server is away for
everybody, nobody can take the Lease, and work goes on where it was; when it is away only for the holder, the holder
learns that it has lost the Lease before it writes anything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from cknix_csi.kube.api import CONFLICT, MERGE_PATCH, NOT_FOUND, Api, ApiError, Json, WatchEvent
from cknix_csi.kube.backoff import Backoff

_LONGEST_SECONDS = 600.0
_TRIES = 3
_RELEASE_SECONDS = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds; the defaults are those of Kubernetes' own controllers."""

    duration: float = 15.0
    """A Lease that has not changed for so long is anybody's."""
    deadline: float = 10.0
    """A holder writes nothing when its last renewal is longer ago."""
    retry: float = 2.0
    """Between renewals, and between tries to get it."""


def boot_time() -> float:
    """Seconds, counted also while the machine sleeps: a holder that wakes up must know how late it is."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """The Lease *namespace*/*name*; *instance* is the pod's name.

    Each process is a holder of its own.  A new process takes over from one of the same *instance* at once: kubelet
    starts a container again only when the old one has ended.  It does so only before it has first held the Lease, so
    that two processes that share a name by mistake do not take it from each other for ever.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        instance: str,
        *,
        timing: Timing | None = None,
        clock: Callable[[], float] = boot_time,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api = api
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._path = f"{self._collection}/{name}"
        self._name = name
        self._title = f"Lease {namespace}/{name}"
        self._instance = instance
        self._identity = f"{instance}_{uuid4()}"
        self._timing = timing or Timing()
        self._clock = clock
        self._now = now
        self._first = True
        self._version = ""
        self._renewed: float | None = None
        self._renewal = asyncio.Event()

    async def acquire(self) -> None:
        """Wait until the Lease is ours; an API server that is away is waited for."""
        waiting = _Waiting(self._clock)
        backoff = Backoff(first=0.5, cap=self._timing.retry)
        while True:
            try:
                async with asyncio.timeout(self._timing.deadline):
                    if await self._take(waiting):
                        break
                delay = self._timing.retry
            except (ApiError, TimeoutError) as error:
                _log.log(logging.WARNING if backoff.tries == 0 else logging.DEBUG, "%s: %s", self._title, _said(error))
                delay = backoff.next()
            await asyncio.sleep(delay)
        self._first = False
        _log.info("%s is held by this process, %s", self._title, self._identity)

    async def hold(self) -> None:
        """Renew; returns when somebody else has the Lease."""
        failures = 0
        while True:
            await asyncio.sleep(self._timing.retry)
            try:
                async with asyncio.timeout(self._timing.deadline):
                    if not await self._renew():
                        break
                failures = 0
            except (ApiError, TimeoutError) as error:
                failures += 1
                _log.log(
                    logging.WARNING if failures == 1 else logging.DEBUG,
                    "%s is not renewed: %s",
                    self._title,
                    _said(error),
                )
        self._renewed = None

    async def confirmed(self) -> None:
        """Wait until the Lease is certainly ours; at once when it was renewed a short while ago."""
        while self._renewed is None or self._clock() - self._renewed >= self._timing.deadline:
            await self._renewal.wait()

    async def release(self) -> None:
        """Give it back, so that the next one need not wait; without success that is only slower."""
        if self._renewed is None:
            return
        self._renewed = None
        spec = {"holderIdentity": None, "leaseDurationSeconds": 1}
        body = {"metadata": {"resourceVersion": self._version}, "spec": spec}
        with suppress(ApiError, TimeoutError):
            async with asyncio.timeout(_RELEASE_SECONDS):
                await self._api.patch(self._path, body, kind=MERGE_PATCH)

    async def _take(self, waiting: _Waiting) -> bool:
        started = self._clock()
        try:
            found = await self._api.get(self._path)
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            return await self._create(started)
        spec = found.get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        unchanged = waiting.see(_version(found))
        if holder and not self._is_predecessor(holder) and unchanged < _duration(spec, self._timing.duration):
            waiting.tell(f"{self._title} is held by {holder}: this process waits, and works when it is free")
            return False
        transitions = spec.get("leaseTransitions")
        changes = {
            "acquireTime": self._timestamp(),
            "leaseTransitions": (transitions if isinstance(transitions, int) else 0) + 1,
        }
        try:
            await self._patch(_version(found), changes, started)
        except ApiError as error:
            if error.status not in {CONFLICT, NOT_FOUND}:
                raise
            return False
        return True

    async def _renew(self) -> bool:
        """False when somebody else has it.  A Lease that was deleted or edited by hand is made ours again."""
        for _ in range(_TRIES):
            started = self._clock()
            try:
                await self._patch(self._version, {}, started)
                return True
            except ApiError as error:
                if error.status not in {CONFLICT, NOT_FOUND}:
                    raise
            try:
                found = await self._api.get(self._path)
            except ApiError as error:
                if error.status != NOT_FOUND:
                    raise
                if await self._create(started):
                    return True
                continue
            if (found.get("spec") or {}).get("holderIdentity") != self._identity:
                _log.warning("%s was taken by %s", self._title, (found.get("spec") or {}).get("holderIdentity"))
                return False
            self._version = _version(found)
        raise ApiError("it changes faster than it can be renewed", status=CONFLICT)

    async def _create(self, started: float) -> bool:
        body: Json = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name},
            "spec": {**self._held(), "acquireTime": self._timestamp(), "leaseTransitions": 0},
        }
        try:
            made = await self._api.create(self._collection, body)
        except ApiError as error:
            if error.status != CONFLICT:
                raise
            return False
        self._succeeded(made, started)
        return True

    async def _patch(self, version: str, spec: Json, started: float) -> None:
        # With the version in it, the patch is refused (409) when the Lease is not what it was decided on.
        body = {"metadata": {"resourceVersion": version}, "spec": {**self._held(), **spec}}
        self._succeeded(await self._api.patch(self._path, body, kind=MERGE_PATCH), started)

    def _held(self) -> Json:
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(self._timing.duration),
            "renewTime": self._timestamp(),
        }

    def _succeeded(self, answer: Json, started: float) -> None:
        self._version = _version(answer)
        # From when it was asked: others may have seen the renewal before we have heard of it.
        self._renewed = started
        self._renewal.set()
        self._renewal = asyncio.Event()

    def _is_predecessor(self, holder: str) -> bool:
        return self._first and holder.rpartition("_")[0] == self._instance

    def _timestamp(self) -> str:
        return self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class FencedApi(Api):
    """The API server for work that only the holder of *lease* may do: a write waits until it certainly is."""

    def __init__(self, api: Api, lease: Lease) -> None:
        self._api = api
        self._lease = lease

    async def get(self, path: str, *, query: Mapping[str, str] | None = None, metadata_only: bool = False) -> Json:
        return await self._api.get(path, query=query, metadata_only=metadata_only)

    async def create(self, path: str, body: Json, *, query: Mapping[str, str] | None = None) -> Json:
        await self._lease.confirmed()
        return await self._api.create(path, body, query=query)

    async def patch(self, path: str, body: Any, *, kind: str, query: Mapping[str, str] | None = None) -> Json:
        await self._lease.confirmed()
        return await self._api.patch(path, body, kind=kind, query=query)

    def watch(
        self, path: str, *, resource_version: str, timeout: float, query: Mapping[str, str] | None = None
    ) -> AsyncIterator[WatchEvent]:
        return self._api.watch(path, resource_version=resource_version, timeout=timeout, query=query)


class _Waiting:
    """What one who waits has seen of the Lease."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._version: str | None = None
        self._since = 0.0
        self._told = ""

    def see(self, version: str) -> float:
        """Seconds for which the Lease has been seen at *version*."""
        if version != self._version:
            self._version, self._since = version, self._clock()
        return self._clock() - self._since

    def tell(self, text: str) -> None:
        """Log *text*, once."""
        if text != self._told:
            self._told = text
            _log.info("%s", text)


def _duration(spec: Mapping[str, Any], default: float) -> float:
    """The time that the holder itself has named; a nonsensical one counts as *default*."""
    named = spec.get("leaseDurationSeconds")
    return float(named) if isinstance(named, int) and 0 < named <= _LONGEST_SECONDS else default


def _version(body: Json) -> str:
    return str((body.get("metadata") or {}).get("resourceVersion"))


def _said(error: ApiError | TimeoutError) -> str:
    return error.message if isinstance(error, ApiError) else "the API server did not answer in time"
