"""From an Expression to published results: what one task does for one generation.

Level-triggered: everything is decided from the object as it is and the store as it is, so that a restart at any moment,
a missed event or a lost disk ends in the same state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from typing import Any

from cknix_csi.api.errors import (
    BuildFailed,
    CknixError,
    DeadlineExceeded,
    EvaluationFailed,
    Invalid,
    NotFound,
    PathUntrusted,
)
from cknix_csi.api.expression import BUILT, EVALUATED, GROUP, PUBLISHED, SUCCEEDED, Spec
from cknix_csi.api.progress import Progress, humanise
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.controller import status as states
from cknix_csi.controller.nodes import ClusterSystems
from cknix_csi.controller.ports import Closures, Nix, Options, Roots
from cknix_csi.controller.queue import BuildQueue
from cknix_csi.controller.roots import add_all, keep_only, root_name
from cknix_csi.controller.status import ExpressionStatus, Result
from cknix_csi.controller.writer import StatusWriter, Superseded
from cknix_csi.kube.api import Api
from cknix_csi.kube.backoff import Backoff
from cknix_csi.kube.events import EventRecorder, Subject
from cknix_csi.metrics.ports import ControllerMetrics
from cknix_csi.nix.fetcherrors import PathCollected
from cknix_csi.nix.nix import Evaluation

REBUILD_ANNOTATION = f"{GROUP}/rebuild"
_MAX_REBUILD = 128
_MAX_LOGGED = 500

# Trying again would end the same way: the user has something to change.
FINAL = (Invalid, EvaluationFailed, BuildFailed, DeadlineExceeded, PathUntrusted, NotFound)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """What every reconciliation shares."""

    api: Api
    nix: Nix
    closures: Closures
    roots: Roots
    queue: BuildQueue
    cluster: ClusterSystems
    events: EventRecorder
    options: Options
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    metrics: ControllerMetrics = field(default_factory=ControllerMetrics)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an Expression object asks for."""

    subject: Subject
    generation: int
    rebuild: str
    spec: Mapping[str, Any]

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Wanted:
        metadata = body.get("metadata") or {}
        rebuild = str((metadata.get("annotations") or {}).get(REBUILD_ANNOTATION, ""))
        return cls(
            subject=Subject(str(metadata.get("namespace")), str(metadata.get("name")), str(metadata.get("uid"))),
            generation=int(metadata.get("generation") or 0),
            # It is kept in the status, which is no place for a novel.
            rebuild=rebuild if len(rebuild) <= _MAX_REBUILD else sha256(rebuild.encode()).hexdigest(),
            spec=body.get("spec") or {},
        )

    @property
    def trigger(self) -> tuple[int, str]:
        """What must change for work to begin anew; labels, and our own status, do not."""
        return (self.generation, self.rebuild)


@dataclass(slots=True)
class Memory:
    """The newest status of one Expression, handed from each reconciliation of it to the next.

    It may be ahead of the object: a status that nobody could write any more still tells what has been built.
    """

    status: ExpressionStatus


class Reconciliation:
    """Brings one :class:`Wanted` to an end, again after each ``refresh``; *memory* is its own while it runs."""

    def __init__(self, services: Services, wanted: Wanted, memory: Memory) -> None:
        self.wanted = wanted
        self._memory = memory
        self._services = services
        self._writer = StatusWriter(services.api, wanted.subject, wanted.generation)
        self._step = EVALUATED

    @property
    def status(self) -> ExpressionStatus:
        return self._memory.status

    async def run(self) -> None:
        """Returns when there is nothing left to do, or when another object or generation has taken its place."""
        try:
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(self._writer.run())
                await self._follow()
                writing.cancel()
        except* Superseded:
            _log.debug("%s is gone or has changed", self.wanted.subject)

    async def _follow(self) -> None:
        await self._until_settled(only_if_needed=True)
        while (delay := self._until_refresh()) is not None:
            await asyncio.sleep(delay)
            await self._until_settled()

    def _until_refresh(self) -> float | None:
        try:
            spec = Spec.parse(self.wanted.spec)
        except Invalid:
            return None
        return states.until_refresh(self.status, spec, self._services.now())

    async def _until_settled(self, *, only_if_needed: bool = False) -> None:
        """Try until it has worked or failed for good."""
        options = self._services.options
        backoff = Backoff(first=options.retry_first, cap=options.retry_cap)
        while True:
            self._step = EVALUATED
            try:
                if only_if_needed and await self._is_done():
                    return
                only_if_needed = False
                await self._attempt()
                return
            except Exception as error:  # a bug, too, must neither end the controller nor be retried in a hurry
                delay = backoff.next()
                self._retrying(error, delay)
                await asyncio.sleep(delay)

    async def _is_done(self) -> bool:
        """True when the object's status says so and the store agrees; roots that are missing are made again."""
        if not states.is_settled(self.status, *self.wanted.trigger):
            return False
        await self._sync_roots()
        if self.status.phase != SUCCEEDED:
            return True
        return all([await self._services.closures.is_valid(result.path) for result in self.status.results])

    async def _attempt(self) -> None:
        """One try, to success or to a failure that only a change can mend."""
        try:
            await self._make()
        except FINAL as error:
            await self._failed(error)

    async def _make(self) -> None:
        self._show(self.status.begun(self.wanted.generation, self.wanted.rebuild, self._services.now()), message="")
        spec = Spec.parse(self.wanted.spec)
        async with self._services.queue.slot(self.wanted.subject.namespace, self._queued):
            systems, note = await self._systems(spec)
            evaluations = await self._evaluate(spec, systems)
            await self._build(evaluations)
            results = await self._publish(evaluations)
        before = self.status.result
        status = self.status.with_results(
            results, primary=systems[0], history_limit=spec.history_limit, now=self._services.now()
        )
        status = status.with_step(PUBLISHED, "True", "Published", "", self._services.now())
        self._show(replace(status, progress=None), message=_summary(results) + note)
        await self._writer.flush()
        # Only now: a status that was read meanwhile never names a result without a root.
        await self._sync_roots()
        self._tell_success(before, self.status.result)

    async def _systems(self, spec: Spec) -> tuple[tuple[str, ...], str]:
        """What to build for, the primary system first, and a note about what is left out."""
        own = self._services.options.systems
        wanted = spec.systems or await self._services.cluster.systems() or own[:1]
        if spec.data.kind == "storePath":
            return _primary_first(wanted, own[0], explicit=bool(spec.systems)), ""
        possible = tuple(system for system in wanted if system in own)
        left_out = ", ".join(system for system in wanted if system not in own)
        if not possible:
            raise EvaluationFailed(
                f"this controller builds for {', '.join(own)}, but not for {left_out}; change spec.systems",
                Situation.NO_BUILDABLE_SYSTEM,
            )
        note = f"; not built for {left_out}: this controller builds for {', '.join(own)}" if left_out else ""
        return _primary_first(possible, own[0], explicit=bool(spec.systems)), note

    async def _evaluate(self, spec: Spec, systems: Sequence[str]) -> dict[str, Evaluation]:
        evaluations = {}
        for system in systems:
            self._show(
                self.status.with_step(EVALUATED, "Unknown", states.EVALUATING, "", self._services.now()),
                message=f"evaluating for {system}",
            )
            evaluations[system] = await self._services.nix.evaluate(spec.data, system)
        self._show(self.status.with_step(EVALUATED, "True", "Evaluated", "", self._services.now()))
        return evaluations

    async def _build(self, evaluations: Mapping[str, Evaluation]) -> None:
        self._step = BUILT
        # Rooted before they exist, so that no collection comes between a build's end and its root.
        await add_all(
            self._services.roots,
            {self._root(system, evaluation.result): evaluation.result for system, evaluation in evaluations.items()},
        )
        status = self.status.with_step(BUILT, "Unknown", states.BUILDING, "", self._services.now())
        self._show(replace(status, progress=Progress()), message="building")
        for system, evaluation in evaluations.items():
            if evaluation.derivations and not await self._services.closures.is_valid(evaluation.result):
                self._event("Normal", "BuildStarted", f"building {evaluation.result}")
            prefix = f"building for {system}: " if len(evaluations) > 1 else "building: "
            await self._services.nix.build(evaluation, progress=partial(self._progress, prefix))
        status = self.status.with_step(BUILT, "True", "Built", "", self._services.now())
        self._show(replace(status, progress=None))

    async def _publish(self, evaluations: Mapping[str, Evaluation]) -> list[Result]:
        self._step = PUBLISHED
        self._show(
            self.status.with_step(PUBLISHED, "Unknown", states.PUBLISHING, "", self._services.now()),
            message="publishing",
        )
        results = []
        for system, evaluation in evaluations.items():
            closure = await self._services.closures.query(evaluation.result)
            if not await self._services.closures.is_valid(evaluation.result):
                raise PathCollected(evaluation.result)
            results.append(Result(system, evaluation.result, closure.nar_size, len(closure.paths)))
        return results

    async def _failed(self, error: CknixError) -> None:
        status = self.status.with_step(self._step, "False", error.reason, error.message, self._services.now())
        self._show(replace(status, progress=None), message=states.told(error.message, reason=error.reason))
        # One line: the log is in the status, which is shown beside it.
        self._event("Warning", error.reason, states.headline(error.message))
        self._services.metrics.failure(error.reason)
        await self._writer.flush()
        await self._sync_roots()

    def _retrying(self, error: Exception, delay: float) -> None:
        if isinstance(error, CknixError):
            said = error.message
            _log.warning("%s: %s; trying again in %.0f s", self.wanted.subject, said, delay)
        else:
            said = f"internal error: {type(error).__name__}: {error}"
            _log.error("%s failed unexpectedly; trying again in %.0f s", self.wanted.subject, delay, exc_info=error)
        status = self.status
        if status.observed_generation != self.wanted.generation:
            status = status.begun(self.wanted.generation, self.wanted.rebuild, self._services.now())
        status = status.with_step(self._step, "Unknown", states.RETRYING, said, self._services.now())
        message = states.told(said, then=f"trying again in {humanise(delay)}")
        self._show(replace(status, progress=None), message=message)
        reason = error.reason if isinstance(error, CknixError) else Situation.INTERNAL_ERROR.reason
        self._event("Warning", reason, states.headline(said))
        self._services.metrics.failure(reason)

    def _queued(self, ahead: int) -> None:
        others = "" if not ahead else f", {ahead} ahead" if ahead < 10 else f", more than {ahead} ahead"
        self._show(self.status, message=f"waiting for a build slot{others}")

    def _progress(self, prefix: str, progress: Progress) -> None:
        status = replace(self.status, progress=progress)
        self._show(status, message=f"{prefix}{progress}", urgent=False)

    def _show(self, status: ExpressionStatus, *, message: str | None = None, urgent: bool = True) -> None:
        if message is not None:
            status = replace(status, message=message)
        now = self._services.now()
        self._memory.status = status.settled(now)
        self._writer.put(self.status.render(now), urgent=urgent)

    async def _sync_roots(self) -> None:
        """The roots in the store become those of the status: missing ones are made, others removed."""
        wanted = {self._root(root.system, root.path): root.path for root in self.status.roots}
        await add_all(self._services.roots, wanted)
        await keep_only(self._services.roots, self.wanted.subject.uid, wanted)

    def _root(self, system: str, path: StorePath) -> str:
        return root_name(self.wanted.subject, system, path)

    def _tell_success(self, before: StorePath | None, after: StorePath | None) -> None:
        if before is None or before == after:
            self._event("Normal", SUCCEEDED, f"{after} is published")
        else:
            self._event("Normal", "ResultChanged", f"{after} is published; before it was {before}")

    def _event(self, type_: Any, reason: str, message: str) -> None:
        _log.info("%s: %s: %s", self.wanted.subject, reason, " ".join(message.split())[:_MAX_LOGGED])
        self._services.events.post(self.wanted.subject, type_, reason, message)


def _primary_first(systems: Sequence[str], own: str, *, explicit: bool) -> tuple[str, ...]:
    """The order people gave; without one, the controller's own system first."""
    return tuple(systems) if explicit else tuple(sorted(systems, key=lambda system: system != own))


def _summary(results: Sequence[Result]) -> str:
    if len(results) == 1:
        return f"{results[0].paths} paths, {size(results[0].closure_size)}"
    return ", ".join(f"{result.system}: {result.paths} paths, {size(result.closure_size)}" for result in results)


def size(count: int) -> str:
    """*count* bytes for people."""
    amount = float(count)
    for unit in _UNITS:
        if amount < 1024 or unit == _UNITS[-1]:
            break
        amount /= 1024
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
