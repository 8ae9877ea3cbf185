"""Publishing and unpublishing, in the order that keeps an RPC, its retries and its negation from harming each other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from cknix_csi import logs
from cknix_csi.api.errors import CacheUnavailable, CknixError, InProgress, NotFound, OutOfSpace
from cknix_csi.api.limits import ANY_SIZE, SizePolicy
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.flights import Flights
from cknix_csi.csi.lifecycle import shutting_down
from cknix_csi.csi.measured import Publishing, one_publish
from cknix_csi.csi.pods import VOLUME_COPIED, PodEvents, Pods, host_users
from cknix_csi.csi.publications import require_only, require_same
from cknix_csi.csi.records import Records
from cknix_csi.csi.requests import PublishCall, UnpublishCall
from cknix_csi.csi.resolve import Resolver, nowhere
from cknix_csi.csi.room import NO_MATTER, Room
from cknix_csi.csi.storepaths import StorePathRule
from cknix_csi.csi.waiting import Waits
from cknix_csi.metrics.ports import NodeMetrics
from cknix_csi.metrics.timing import timed
from cknix_csi.nix.database import PathNotValid
from cknix_csi.volumes.choose import Wish
from cknix_csi.volumes.failures import LimitReached, NotUndone, StoreDamaged
from cknix_csi.volumes.ledger import Mounted
from cknix_csi.volumes.locks import KeyedLocks
from cknix_csi.volumes.volumes import Made, Publication, PublishRequest, wish

log = logging.getLogger(__name__)

_COLLECTED_TIMES = 5
"""How often a publish fetches what an administrator's collection took between the fetch and the volume's GC root."""
_GRACE_SECONDS = 10.0
"""For what a publish waits for: it keeps to the budget by itself, and says more than that time is up."""
_MOST_UNHEARD = 1000


class Volumes(Protocol):
    """Mounts of this node; satisfied by ``volumes.volumes.Volumes``."""

    async def require(self, wanted: Wish) -> None:
        """Raises what :meth:`publish` would raise because no volume can be made like that here."""

    async def publish(self, request: PublishRequest) -> Made | None:
        """Mount; idempotent, undoes itself on failure and on cancellation.  None: it was there already."""

    def copying(self, volume_id: str, target: Path) -> str | None:
        """How far the private copy for *target* has come; None while none is being made."""

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
        room: Room = NO_MATTER,
        store_paths: StorePathRule | None = None,
        metrics: NodeMetrics | None = None,
    ) -> None:
        """*pods* and *events*: None where there is no Kubernetes.  *room* is told when the disk is full."""
        self._volumes = volumes
        self._closures = closures
        self._resolver = resolver
        self._budget = budget
        self._sizes = sizes
        self._pods = pods
        self._events = events
        self._records = Records(None) if records is None else records
        self._room = room
        self._store_paths = StorePathRule() if store_paths is None else store_paths
        self._metrics = NodeMetrics() if metrics is None else metrics
        self._waits = Waits(events)
        self._publishing: Flights[PublishCall] = Flights()
        self._unpublishing: Flights[UnpublishCall] = Flights()
        self._listening: Counter[PublishCall] = Counter()
        """How many wait for the end of each publish."""
        self._unheard: dict[PublishCall, CknixError] = {}
        """Failures of publishes for whose end nobody waited."""
        self._untidy: set[tuple[str, Path]] = set()
        """Volumes and targets of which a publish has left something."""
        self._volume_locks = KeyedLocks()
        self._remembered: dict[Path, PublishCall] = {}
        self._waiting: set[asyncio.Timeout] = set()
        self._unwanted: dict[asyncio.Future[None], str] = {}
        """Of each call that waits for the end of its publish: done when its pod, by uid, is being deleted."""
        self._draining = False
        if pods is not None:
            pods.on_ending(self._pod_ends)

    async def publish(self, call: PublishCall) -> None:
        """Mount what *call* asks for.

        Raises :class:`InProgress` when that takes longer than the budget, and goes on.  How it ends is told to the next
        call of the same words, if nobody waits for it.
        """
        # Whichever of two calls about one target had to wait for the other, its answer would be out of date.
        for other in self._publishing.running():
            if other.target == call.target and other != call:
                words = "with other arguments" if other.volume_id == call.volume_id else f"as volume {other.volume_id}"
                raise InProgress(f"volume {call.volume_id} is being published at {call.target} {words}; retry")
        if any(ending.target == call.target for ending in self._unpublishing.running()):
            raise InProgress(f"a volume is being unpublished at {call.target}; retry")
        if (unheard := self._unheard.pop(call, None)) is not None:
            raise unheard
        flight = self._publishing.join(call, lambda: self._publish_for(call))
        await self._within_budget(call, flight)
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

    async def _within_budget(self, call: PublishCall, flight: asyncio.Task[None]) -> None:
        """Return when *flight* has ended.

        Raises :class:`InProgress` after the budget, and as soon as the pod is being deleted: kubelet does not unpublish
        while it waits for our answer.
        """
        self._listening[call] += 1
        try:
            with self._until_unwanted(call) as unwanted:
                ends = {flight, unwanted}
                done, _ = await asyncio.wait(ends, timeout=self._budget, return_when=asyncio.FIRST_COMPLETED)
                if not done and self._volumes.copying(call.volume_id, call.target) is None:
                    # What it may wait for keeps to the budget from when it began to, and has better words.
                    done, _ = await asyncio.wait(ends, timeout=_GRACE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if flight in done:
                return
        finally:
            self._listening[call] -= 1
            self._listening += Counter()
        if done:
            pod = f"pod {call.pod.namespace}/{call.pod.name}"
            raise InProgress(f"{pod} is being deleted: volume {call.volume_id} is not waited for", Situation.POD_ENDING)
        if (words := self._volumes.copying(call.volume_id, call.target)) is not None:
            raise InProgress(f"{words}; kubelet will retry", Situation.COPYING)
        raise InProgress(f"volume {call.volume_id} is still being published at {call.target}; kubelet will retry")

    @contextmanager
    def _until_unwanted(self, call: PublishCall) -> Iterator[asyncio.Future[None]]:
        """A future that is done when the pod of *call* is being deleted."""
        unwanted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unwanted[unwanted] = call.pod.uid
        try:
            if self._pods is not None and self._pods.ending(call.pod):
                unwanted.set_result(None)
            yield unwanted
        finally:
            del self._unwanted[unwanted]

    def _pod_ends(self, uid: str) -> None:
        for unwanted, pod in self._unwanted.items():
            if pod == uid and not unwanted.done():
                unwanted.set_result(None)

    async def _publish_for(self, call: PublishCall) -> None:
        try:
            await self._publish_tidily(call)
        except InProgress:
            raise
        except CknixError as error:
            if call not in self._listening:
                self._unheard[call] = error
                if len(self._unheard) > _MOST_UNHEARD:  # of pods that have gone without an unpublish
                    del self._unheard[next(iter(self._unheard))]
            raise

    async def _publish_tidily(self, call: PublishCall) -> None:
        """As :meth:`_publish`; before kubelet forgets the volume for a final failure, what an earlier try left goes."""
        untidy = (call.volume_id, call.target)
        try:
            await self._publish(call)
        except NotUndone:
            self._untidy.add(untidy)
            raise
        except CknixError as error:
            if untidy in self._untidy and not error.code.transient:
                try:
                    async with self._volume_locks.hold(call.volume_id):
                        await self._volumes.unpublish(call.volume_id, call.target)
                except CknixError as failure:
                    raise NotUndone(f"{error}; and what an earlier try left could not be undone: {failure}") from error
                self._untidy.discard(untidy)
            raise
        self._untidy.discard(untidy)

    async def _publish(self, call: PublishCall) -> None:
        with one_publish(self._metrics) as found:
            await self._publish_measured(call, found)

    async def _publish_measured(self, call: PublishCall, found: Publishing) -> None:
        started = time.monotonic()
        # Before anything is fetched: a republish of a running pod's volume must cost no more than a look.
        if self._settled(call):
            found.is_mounted()
            log.info("mounted already")
            return
        # Only now: what is mounted already may have been made when the node's rules were others.
        self._store_paths.require(call.source, call.pod)
        limit = self._sizes.limit(call.options.limit) if call.writable else None
        users = await host_users(self._pods, call.pod)
        asked = call.options.presentation
        if asked is not None or not users:  # what may be refused is refused before anything is waited for
            await self._volumes.require(wish(writable=call.writable, limit=limit, asked=asked, host_users=users))
        deadline = asyncio.get_running_loop().time() + self._budget  # a silent API server costs nothing of it
        root = await self._root(call, deadline, found)
        waited = time.monotonic() - started
        most = self._sizes.maximum
        wanted = PublishRequest(call.volume_id, call.target, root, call.writable, limit, asked, users, most)
        made = await self._mount_found(call, wanted, deadline, found)
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

    async def _mount_found(
        self, call: PublishCall, wanted: PublishRequest, deadline: float, found: Publishing
    ) -> Made | None:
        """Mount what was on this node a moment ago and may have been collected since, or lost files."""
        for attempt in range(_COLLECTED_TIMES + 1):
            try:
                return await self._mount(call, wanted)
            except PathNotValid:
                if attempt == _COLLECTED_TIMES:
                    raise
                await self._root(call, deadline, found)
            except StoreDamaged as damage:
                found.is_missing()
                await self._restore(call, wanted.root, damage, deadline)
                return await self._mount(call, wanted)
        raise AssertionError("the last attempt returns or raises")

    async def _mount(self, call: PublishCall, wanted: PublishRequest) -> Made | None:
        async with self._volume_locks.hold(call.volume_id):
            if self._settled(call):
                return None
            try:
                with self._waits.of(call) as waiting:
                    if wanted.presentation is Presentation.COPY:
                        waiting(Situation.COPYING, partial(self._copying, wanted))
                    made = await self._volumes.publish(wanted)
            except LimitReached:
                raise
            except OutOfSpace as full:
                self._room.out_of_space(wanted.root, needed=full.needed)
                raise
            self._room.had(wanted.root)
            self._remembered[call.target] = call
            self._records.published(call, wanted.root.basename, made.presentation if made else None)
            return made

    def _copying(self, wanted: PublishRequest) -> str:
        words = self._volumes.copying(wanted.volume_id, wanted.target)
        return words or f"a private copy of {wanted.root} is being made"

    async def _unpublish(self, call: UnpublishCall) -> None:
        with timed(self._metrics.unpublish):
            await self._unpublish_measured(call)

    async def _unpublish_measured(self, call: UnpublishCall) -> None:
        started = time.monotonic()
        for publishing in self._publishing_at(call.volume_id, call.target):
            await self._publishing.cancel(publishing)
        self._closures.unwanted((call.volume_id, call.target))
        for unheard in [publish for publish in self._unheard if publish.target == call.target]:
            del self._unheard[unheard]
        async with self._volume_locks.hold(call.volume_id):
            there = self._volumes.published(call.target)
            if there is not None:
                logs.note(closure=there.closure_id)
            name = self._records.name(call.target)
            await self._volumes.unpublish(call.volume_id, call.target)
            self._waits.over(call.volume_id, call.target)
            self._untidy.discard((call.volume_id, call.target))
            self._remembered.pop(call.target, None)
            self._records.unpublished(name)
        what = f"unmounted {there}" if there is not None else "nothing was mounted, nothing is left"
        log.info("%s in %.3fs", what, time.monotonic() - started)

    async def _root(self, call: PublishCall, deadline: float, found: Publishing) -> StorePath:
        clock = asyncio.get_running_loop().time
        async with self._until_draining(call):
            with self._waits.of(call) as waiting:
                root = await self._resolver.resolve(call.source, budget=deadline - clock(), waiting=waiting)
                logs.note(closure=root.basename)
                budget = deadline - clock()
                wants = (call.volume_id, call.target)
                try:
                    await self._closures.ensure(
                        root, budget=budget, waiting=waiting, missing=found.is_missing, who=wants
                    )
                except (CacheUnavailable, NotFound) as error:
                    raise nowhere(call.source, root, error) from error
        found.is_here()
        return root

    async def _restore(self, call: PublishCall, root: StorePath, damage: StoreDamaged, deadline: float) -> None:
        """Fetch *root* again, once for this publish, since its files have been lost."""
        log.warning("%s; fetching it again", damage)
        try:
            async with self._until_draining(call):
                with self._waits.of(call) as waiting:
                    budget = deadline - asyncio.get_running_loop().time()
                    await self._closures.restore(root, budget=budget, waiting=waiting)
        except InProgress:
            raise
        except CknixError as failure:
            raise CknixError(f"{damage}; fetching it again did not help: {failure}", failure.situation) from failure

    def _settled(self, call: PublishCall) -> bool:
        """True when *call* is fulfilled already.  Raises when it may not be fulfilled."""
        there = self._volumes.published(call.target)
        if there is not None:
            remembered = self._remembered.get(call.target)
            noted = "" if remembered is not None else self._records.volume_at(call.target)
            require_same(call, there, remembered, noted)
            self._remembered.setdefault(call.target, call)
            self._records.published(call, there.closure_id, there.presentation)
            logs.note(closure=there.closure_id)
            return True
        if call.access_mode.one_target:
            require_only(call, self._targets(call.volume_id))
        return False

    def _targets(self, volume_id: str) -> list[Path]:
        own = {target for target, call in self._remembered.items() if call.volume_id == volume_id}
        known = own | self._records.targets(volume_id)
        return [target for target in known if self._volumes.published(target) is not None]

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
