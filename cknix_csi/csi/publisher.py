"""Publishing and unpublishing, in the order that keeps an RPC, its retries and its negation from harming each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from cknix_csi.api.errors import InProgress
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.flights import Flights
from cknix_csi.csi.lifecycle import shutting_down
from cknix_csi.csi.publications import require_only, require_same
from cknix_csi.csi.requests import PublishCall, UnpublishCall
from cknix_csi.csi.resolve import Resolver
from cknix_csi.nix.database import PathNotValid
from cknix_csi.volumes.locks import KeyedLocks
from cknix_csi.volumes.volumes import Publication, PublishRequest


class Volumes(Protocol):
    """Mounts of this node; satisfied by ``volumes.volumes.Volumes``."""

    async def publish(self, request: PublishRequest) -> None:
        """Mount; idempotent, undoes itself on failure and on cancellation."""

    async def unpublish(self, volume_id: str, target: Path) -> None:
        """Unmount; idempotent, leaves nothing."""

    def published(self, target: Path) -> Publication | None:
        """What is mounted at *target*, from the kernel's mount table."""

    async def reconcile(self) -> object:
        """At start: make directories and GC roots agree with the mount table."""


class Publisher:
    """Runs every publish and unpublish as a task of its own.

    A client that goes away ends neither (CSI spec, "Timeouts": only the negation cancels), its retry joins the task,
    and an unpublish ends the publish of the same volume and target before it undoes it.
    """

    def __init__(self, *, volumes: Volumes, closures: ClosureService, resolver: Resolver, budget: float) -> None:
        self._volumes = volumes
        self._closures = closures
        self._resolver = resolver
        self._budget = budget
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
        deadline = asyncio.get_running_loop().time() + self._budget
        # Before anything is fetched: a republish of a running pod's volume must cost no more than a look.
        if self._settled(call):
            return
        root = await self._root(call, deadline)
        try:
            await self._mount(call, root)
        except PathNotValid:
            # Collected between the look into the store and the GC root of the volume, which holds it from now on.
            await self._mount(call, await self._root(call, deadline))

    async def _mount(self, call: PublishCall, root: StorePath) -> None:
        async with self._volume_locks.hold(call.volume_id):
            if self._settled(call):
                return
            await self._volumes.publish(PublishRequest(call.volume_id, call.target, root, call.writable))
            self._remembered[call.target] = call

    async def _unpublish(self, call: UnpublishCall) -> None:
        for publishing in self._publishing_at(call.volume_id, call.target):
            await self._publishing.cancel(publishing)
        async with self._volume_locks.hold(call.volume_id):
            await self._volumes.unpublish(call.volume_id, call.target)
            self._remembered.pop(call.target, None)

    async def _root(self, call: PublishCall, deadline: float) -> StorePath:
        clock = asyncio.get_running_loop().time
        async with self._until_draining(call):
            root = await self._resolver.resolve(call.source, budget=deadline - clock())
            await self._closures.ensure(root, budget=deadline - clock())
        return root

    def _settled(self, call: PublishCall) -> bool:
        """True when *call* is fulfilled already.  Raises when it may not be fulfilled."""
        there = self._volumes.published(call.target)
        if there is not None:
            require_same(call, there, self._remembered.get(call.target))
            self._remembered.setdefault(call.target, call)
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
