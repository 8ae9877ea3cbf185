"""Publishing and unpublishing, in the order that keeps an RPC, its retries and its negation from harming each other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from cknix_csi import logs
from cknix_csi.api.errors import CknixError, InProgress, OutOfSpace
from cknix_csi.api.limits import ANY_SIZE, SizePolicy
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.flights import Flights
from cknix_csi.csi.lifecycle import shutting_down
from cknix_csi.csi.pods import VOLUME_COPIED, PodEvents, Pods, host_users
from cknix_csi.csi.publications import require_only, require_same
from cknix_csi.csi.records import Records
from cknix_csi.csi.requests import PublishCall, UnpublishCall
from cknix_csi.csi.resolve import Resolver
from cknix_csi.nix.database import PathNotValid
from cknix_csi.volumes.choose import Wish
from cknix_csi.volumes.failures import StoreDamaged
from cknix_csi.volumes.ledger import Mounted
from cknix_csi.volumes.locks import KeyedLocks
from cknix_csi.volumes.volumes import Made, Publication, PublishRequest, wish

log = logging.getLogger(__name__)

_COLLECTED_TIMES = 5
"""How often a publish fetches what an administrator's collection took between the fetch and the volume's GC root."""


class Volumes(Protocol):
    """Mounts of this node; satisfied by ``volumes.volumes.Volumes``."""

    async def require(self, wanted: Wish) -> None:
        """Raises what :meth:`publish` would raise because no volume can be made like that here."""

    async def publish(self, request: PublishRequest) -> Made | None:
        """Mount; idempotent, undoes itself on failure and on cancellation.  None: it was there already."""

    async def unpublish(self, volume_id: str, target: Path) -> None:
        """Unmount; idempotent, leaves nothing."""

    def published(self, target: Path) -> Publication | None:
        """What is mounted at *target*, from the kernel's mount table."""

    def publications(self) -> Mapping[str, Mounted]:
        """What is mounted where, by target, from one reading of the kernel's mount table.  Raises CknixError."""

    async def reconcile(self) -> object:
        """At start: make directories and GC roots agree with the mount table."""


class Publisher:
    """Runs every publish and unpublish as a task of its own.

    A client that goes away ends neither (CSI spec, "Timeouts": only the negation cancels), its retry joins the task,
    and an unpublish ends the publish of the same volume and target before it undoes it.
    """

    def __init__(
        self,
        *,
        volumes: Volumes,
        closures: ClosureService,
        resolver: Resolver,
        budget: float,
        sizes: SizePolicy = ANY_SIZE,
        pods: Pods | None = None,
        events: PodEvents | None = None,
        records: Records | None = None,
        out_of_space: Callable[[], None] = lambda: None,
    ) -> None:
        """*pods* and *events*: None where there is no Kubernetes.  *out_of_space* is told when the disk is full."""
        self._volumes = volumes
        self._closures = closures
        self._resolver = resolver
        self._budget = budget
        self._sizes = sizes
        self._pods = pods
        self._events = events
        self._records = Records(None) if records is None else records
        self._out_of_space = out_of_space
        self._publishing: Flights[PublishCall] = Flights()
        self._unpublishing: Flights[UnpublishCall] = Flights()
        self._volume_locks = KeyedLocks()
        self._remembered: dict[Path, PublishCall] = {}
        self._waiting: set[asyncio.Timeout] = set()
        self._draining = False

    async def publish(self, call: PublishCall) -> None:
        """Mount what *call* asks for.  Raises :class:`InProgress` when that takes longer than the budget."""
        for other in self._publishing_at(call.volume_id, call.target):
            if other != call:
                raise InProgress(
                    f"volume {call.volume_id} is being published at {call.target} with other arguments; retry"
                )
        flight = self._publishing.join(call, lambda: self._publish(call))
        await asyncio.wait({flight})
        if flight.cancelled():
            if self._draining:
                raise shutting_down(f"publishing volume {call.volume_id}")
            raise InProgress(f"publishing volume {call.volume_id} at {call.target} was cancelled by its unpublish")
        flight.result()

    async def unpublish(self, call: UnpublishCall) -> None:
        """Undo :meth:`publish`, also one in flight, until nothing is left.  A volume that is not there is no error."""
        published = self._remembered.get(call.target)
        if published is not None and published.pod.name:
            logs.note(pod=f"{published.pod.namespace}/{published.pod.name}")
        flight = self._unpublishing.join(call, lambda: self._unpublish(call))
        await asyncio.wait({flight})
        if flight.cancelled():
            raise shutting_down(f"unpublishing volume {call.volume_id}")
        flight.result()

    def drain(self) -> None:
        """Answer UNAVAILABLE to all that wait for a closure or an Expression; what mounts or unmounts may finish."""
        self._draining = True
        now = asyncio.get_running_loop().time()
        for scope in self._waiting:
            scope.reschedule(now)

    async def close(self) -> None:
        """End every task.  Volumes that are mounted stay so."""
        self._draining = True
        await self._publishing.close()
        await self._unpublishing.close()

    async def _publish(self, call: PublishCall) -> None:
        started = time.monotonic()
        # Before anything is fetched: a republish of a running pod's volume must cost no more than a look.
        if self._settled(call):
            log.info("mounted already")
            return
        # Only now: what is mounted already may have been made when the node's rules were others.
        limit = self._sizes.limit(call.options.limit) if call.writable else None
        users = await host_users(self._pods, call.pod)
        asked = call.options.presentation
        if asked is not None or not users:  # what may be refused is refused before anything is waited for
            await self._volumes.require(wish(writable=call.writable, limit=limit, asked=asked, host_users=users))
        deadline = asyncio.get_running_loop().time() + self._budget  # a silent API server costs nothing of it
        root = await self._root(call, deadline)
        waited = time.monotonic() - started
        wanted = PublishRequest(call.volume_id, call.target, root, call.writable, limit, asked, users)
        made = await self._mount_found(call, wanted, deadline)
        log.info(
            "mounted %s %s%s in %.3fs, having waited %.3fs for it to be on this node",
            root,
            "writable" if call.writable else "read-only",
            "" if made is None or made.ordinary else f" as {made.presentation.value} ({made.reason})",
            time.monotonic() - started - waited,
            waited,
        )
        if made is not None and made.cost is not None and self._events is not None:
            volume = logs.fields().get("volume") or call.volume_id
            message = f'volume "{volume}" is a private copy of {root}, as it asks for; {made.cost}'
            self._events.post(call.pod, VOLUME_COPIED, message)

    async def _mount_found(self, call: PublishCall, wanted: PublishRequest, deadline: float) -> Made | None:
        """Mount what was on this node a moment ago and may have been collected since, or lost files."""
        for attempt in range(_COLLECTED_TIMES + 1):
            try:
                return await self._mount(call, wanted)
            except PathNotValid:
                if attempt == _COLLECTED_TIMES:
                    raise
                await self._root(call, deadline)
            except StoreDamaged as damage:
                await self._restore(call, wanted.root, damage, deadline)
                return await self._mount(call, wanted)
        raise AssertionError("the last attempt returns or raises")

    async def _mount(self, call: PublishCall, wanted: PublishRequest) -> Made | None:
        async with self._volume_locks.hold(call.volume_id):
            if self._settled(call):
                return None
            try:
                made = await self._volumes.publish(wanted)
            except OutOfSpace:
                if wanted.limit is None:  # else it is that which is reached
                    self._out_of_space()
                raise
            self._remembered[call.target] = call
            self._records.published(call, wanted.root.basename, made.presentation if made else None)
            return made

    async def _unpublish(self, call: UnpublishCall) -> None:
        started = time.monotonic()
        for publishing in self._publishing_at(call.volume_id, call.target):
            await self._publishing.cancel(publishing)
        async with self._volume_locks.hold(call.volume_id):
            there = self._volumes.published(call.target)
            if there is not None:
                logs.note(closure=there.closure_id)
            name = self._records.name(call.target)
            await self._volumes.unpublish(call.volume_id, call.target)
            self._remembered.pop(call.target, None)
            self._records.unpublished(name)
        what = f"unmounted {there}" if there is not None else "nothing was mounted, nothing is left"
        log.info("%s in %.3fs", what, time.monotonic() - started)

    async def _root(self, call: PublishCall, deadline: float) -> StorePath:
        clock = asyncio.get_running_loop().time
        async with self._until_draining(call):
            root = await self._resolver.resolve(call.source, budget=deadline - clock())
            logs.note(closure=root.basename)
            await self._closures.ensure(root, budget=deadline - clock())
        return root

    async def _restore(self, call: PublishCall, root: StorePath, damage: StoreDamaged, deadline: float) -> None:
        """Fetch *root* again, once for this publish, since its files have been lost."""
        log.warning("%s; fetching it again", damage)
        try:
            async with self._until_draining(call):
                await self._closures.restore(root, budget=deadline - asyncio.get_running_loop().time())
        except InProgress:
            raise
        except CknixError as failure:
            raise CknixError(
                f"{damage}; fetching it again did not help: {failure}", code=failure.code, reason=damage.reason
            ) from failure

    def _settled(self, call: PublishCall) -> bool:
        """True when *call* is fulfilled already.  Raises when it may not be fulfilled."""
        there = self._volumes.published(call.target)
        if there is not None:
            require_same(call, there, self._remembered.get(call.target))
            self._remembered.setdefault(call.target, call)
            self._records.published(call, there.closure_id, there.presentation)
            logs.note(closure=there.closure_id)
            return True
        require_only(call, self._targets(call.volume_id))
        return False

    def _targets(self, volume_id: str) -> list[Path]:
        return [
            target
            for target, call in self._remembered.items()
            if call.volume_id == volume_id and self._volumes.published(target) is not None
        ]

    def _publishing_at(self, volume_id: str, target: Path) -> list[PublishCall]:
        return [call for call in self._publishing.running() if (call.volume_id, call.target) == (volume_id, target)]

    @asynccontextmanager
    async def _until_draining(self, call: PublishCall) -> AsyncIterator[None]:
        if self._draining:
            raise shutting_down(f"publishing volume {call.volume_id}")
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._waiting.add(scope)
                try:
                    yield
                finally:
                    self._waiting.discard(scope)
        except TimeoutError:
            if not scope.expired():
                raise
            raise shutting_down(f"publishing volume {call.volume_id}") from None
