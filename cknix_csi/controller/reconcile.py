"""From an Expression to published results: what one task does for one generation.

Level-triggered: everything is decided from the object as it is and the store as it is, so that a restart at any moment,
a missed event or a lost disk ends in the same state.
"""

from __future__ import annotations

import asyncio
import logging
import random
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
from cknix_csi.api.expression import BUILT, EVALUATED, PUBLISHED, SUCCEEDED, Spec
from cknix_csi.api.progress import Progress, humanise
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.controller import status as states
from cknix_csi.controller.nodes import ClusterSystems
from cknix_csi.controller.ports import Closures, Nix, Options, Roots
from cknix_csi.controller.queue import BuildQueue
from cknix_csi.controller.roots import add_all, make_exactly, root_name
from cknix_csi.controller.status import REBUILD_ANNOTATION, ExpressionStatus, Loss, Result, Root
from cknix_csi.controller.writer import StatusWriter, Superseded
from cknix_csi.kube.api import Api, ApiError
from cknix_csi.kube.backoff import Backoff
from cknix_csi.kube.controllerplace import place_before
from cknix_csi.kube.events import EventRecorder, Subject
from cknix_csi.metrics.ports import ControllerMetrics
from cknix_csi.nix.fetcherrors import PathCollected
from cknix_csi.nix.nix import Evaluation
from cknix_csi.repeats import Repeats

_MAX_REBUILD = 128
_MAX_LOGGED = 500
# How many lost results are looked for at substituters at once.
_SEEKERS = 2

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
    seeking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_SEEKERS))
    """Held while a lost result is looked for at substituters."""


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
        self._being_built: dict[str, StorePath] = {}
        """Roots of what no status names yet."""
        self._failing = Repeats()
        self._cause = ""
        """Why the last try was not the end of it, while another one is made."""
        self._losses: dict[StorePath, Loss] = {}
        """How results were lost, as it looked when they were first missed."""
        self._sought: set[StorePath] = set()
        """Lost results that no substituter need be asked for again."""
        self._to_ask_again: set[StorePath] = set()
        """Those of them for which one could not be asked."""
        self._told: dict[StorePath, str] = {}
        """What was told of them."""

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
        while True:
            self._sought -= self._to_ask_again
            await self._regain()
            refresh = self._until_refresh()
            check = self._services.options.check_seconds * random.uniform(0.9, 1.1)  # noqa: S311 - no secret
            if refresh is not None and refresh <= check:
                await asyncio.sleep(refresh)
                await self._until_settled()
                continue
            await asyncio.sleep(check)
            if not await self._is_still_done():
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
                self._cause = ""
                if failed := self._failing.over(self.wanted.subject):
                    _log.info("%s: ended after %d failed tries", self.wanted.subject, failed.count)
                return
            except Exception as error:  # a bug, too, must neither end the controller nor be retried in a hurry
                delay = backoff.next()
                self._retrying(error, delay)
                # What is not to be had for now is lost for now.
                if await self._is_examined():
                    await self._regain()
                await asyncio.sleep(delay)

    async def _is_done(self) -> bool:
        """True when the object's status says so and the store agrees; roots that are missing are made again."""
        settled = states.is_settled(self.status, *self.wanted.trigger)
        succeeded = settled and self.status.phase == SUCCEEDED
        own = frozenset(result.path for result in self.status.results) if succeeded else frozenset()
        return not await self._examine(rebuilt=own) & own and settled

    async def _is_still_done(self) -> bool:
        """The same, some time later; what cannot be told is no reason to do anything."""
        try:
            return await self._is_done()
        except (CknixError, OSError) as error:
            _log.debug("%s: its results cannot be looked for: %s", self.wanted.subject, error)
            return True

    async def _is_examined(self) -> bool:
        try:
            await self._examine()
        except (CknixError, OSError) as error:
            _log.debug("%s: its results cannot be looked for: %s", self.wanted.subject, error)
            return False
        return True

    async def _attempt(self) -> None:
        """One try, to success or to a failure that only a change can mend."""
        try:
            await self._make()
        except FINAL as error:
            await self._failed(error)

    async def _make(self) -> None:
        status = self.status.begun(self.wanted.generation, self.wanted.rebuild, self._services.now())
        self._show(status.with_step(EVALUATED, "Unknown", states.QUEUED, self._cause, self._services.now()), message="")
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
        # Before the status is written: whoever sees that may change the Expression, and end this.
        self._tell_success(before, self.status.result)
        self._being_built = {}
        await self._writer.flush()
        # Only now: a status that was read meanwhile never names a result without a root.
        await self._examine()

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
                self.status.with_step(EVALUATED, "Unknown", states.EVALUATING, self._cause, self._services.now()),
                message=self._doing(f"evaluating for {system}"),
            )
            evaluations[system] = await self._services.nix.evaluate(spec.data, system)
        self._show(self.status.with_step(EVALUATED, "True", "Evaluated", "", self._services.now()))
        return evaluations

    async def _build(self, evaluations: Mapping[str, Evaluation]) -> None:
        self._step = BUILT
        # Rooted before they exist, so that no collection comes between a build's end and its root.
        self._being_built = {
            self._root(system, evaluation.result): evaluation.result for system, evaluation in evaluations.items()
        }
        await add_all(self._services.roots, self._being_built)
        status = self.status.with_step(BUILT, "Unknown", states.BUILDING, self._cause, self._services.now())
        self._show(replace(status, progress=Progress()), message=self._doing("building"))
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
            self.status.with_step(PUBLISHED, "Unknown", states.PUBLISHING, self._cause, self._services.now()),
            message=self._doing("publishing"),
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
        self._being_built = {}
        await self._writer.flush()
        await self._examine()

    def _retrying(self, error: Exception, delay: float) -> None:
        if isinstance(error, CknixError):
            said, level, bug = error.message, logging.WARNING, None
        else:
            said, level, bug = f"internal error: {type(error).__name__}: {error}", logging.ERROR, error
        level = level if self._failing.failed(self.wanted.subject, said).aloud else logging.DEBUG
        _log.log(level, "%s: %s; trying again in %.0f s", self.wanted.subject, said, delay, exc_info=bug)
        self._cause = f"the last try: {states.headline(said)}"
        status = self.status
        if status.observed_generation != self.wanted.generation:
            status = status.begun(self.wanted.generation, self.wanted.rebuild, self._services.now())
        status = status.with_step(self._step, "Unknown", states.RETRYING, said, self._services.now())
        message = states.told(said, then=f"trying again in {humanise(delay)}")
        self._show(replace(status, progress=None), message=message)
        reason = error.reason if isinstance(error, CknixError) else Situation.INTERNAL_ERROR.reason
        self._services.events.post(self.wanted.subject, "Warning", reason, states.headline(said))
        self._services.metrics.failure(reason)

    def _doing(self, what: str) -> str:
        return f"{what}; {self._cause}" if self._cause else what

    def _queued(self, ahead: int) -> None:
        others = "" if not ahead else f", {ahead} ahead" if ahead < 10 else f", more than {ahead} ahead"
        self._show(self.status, message=self._doing(f"waiting for a build slot{others}"))

    def _progress(self, prefix: str, progress: Progress) -> None:
        status = replace(self.status, progress=progress)
        self._show(status, message=f"{prefix}{progress}", urgent=False)

    def _show(self, status: ExpressionStatus, *, message: str | None = None, urgent: bool = True) -> None:
        if message is not None:
            status = replace(status, message=message)
        now = self._services.now()
        self._memory.status = status.settled(now)
        self._writer.put(self.status.render(now), urgent=urgent)

    async def _examine(self, *, rebuilt: frozenset[StorePath] = frozenset()) -> frozenset[StorePath]:
        """Look for all results that the status claims: hold those that are in the store, and tell of the others.

        Not of those of *rebuilt*, which are about to be built again.  Gives all that are not there.
        """
        status = self.status.with_all_rooted(self._services.now())
        paths = frozenset(root.path for root in status.roots)
        gone = await self._missing(paths)
        made, dropped = await self._sync_roots(status.roots, gone)
        if late := await self._missing(made):  # collected before they had their roots
            gone |= late
            dropped |= (await self._sync_roots(status.roots, gone))[1]
        new = gone - self._losses.keys() - {root.path for root in status.lost}
        # What had a root here was here; the others never were.
        left = new - dropped
        node = await self._place_before() if left else ""
        known = {path: loss for path, loss in self._losses.items() if path in gone}
        self._losses = known | {path: Loss(node if path in left else "") for path in new}
        found = [root for root in status.lost if root.path not in gone]
        status = status.with_losses({path: self._losses.get(path, Loss()) for path in gone - rebuilt})
        if status != self.status:
            self._show(status)
        for root in found:
            self._sought.discard(root.path)
            self._told.pop(root.path, None)
            self._event("Normal", "ResultFound", f"{_named(root)} is in the controller's store again")
        return gone

    async def _missing(self, paths: frozenset[StorePath]) -> frozenset[StorePath]:
        return frozenset([path for path in paths if not await self._services.closures.is_valid(path)])

    async def _place_before(self) -> str:
        options = self._services.options
        try:
            return await place_before(self._services.api, options.namespace, options.node)
        except ApiError as error:
            _log.debug("where the controller was before is not known: %s", error.message)
            return ""

    async def _regain(self) -> None:
        """Have what is lost from a substituter, in one try for each; what cannot be had is told."""
        for root in self.status.lost:
            if root.path not in self._sought:
                await self._seek(root)

    async def _seek(self, root: Root) -> None:
        self._sought.add(root.path)
        self._to_ask_again.discard(root.path)
        try:
            async with self._services.seeking:
                # Rooted before it exists; if it never does, the root goes again at once.
                await add_all(self._services.roots, {self._root(root.system, root.path): root.path})
                await self._services.nix.substitute(root.path)
            await self._examine()
        except (CknixError, OSError) as error:
            why = error.message if isinstance(error, CknixError) else str(error)
            why = why.removeprefix(f"{root.path} is not in the store, and ")
            if isinstance(error, BuildFailed):
                why = "no substituter has it"
            else:
                self._to_ask_again.add(root.path)
            said = f"{_named(root)} is lost: {root.lost}, and {why}; {states.remedy(root.lost)}"
            if self._told.get(root.path) != said:
                self._told[root.path] = said
                _log.warning("%s: %s: %s", self.wanted.subject, Situation.RESULT_LOST.reason, said)
                self._services.events.post(self.wanted.subject, "Warning", Situation.RESULT_LOST.reason, said)
                self._services.metrics.failure(Situation.RESULT_LOST.reason)
            await self._is_examined()

    async def _sync_roots(
        self, roots: Sequence[Root], gone: frozenset[StorePath]
    ) -> tuple[frozenset[StorePath], frozenset[StorePath]]:
        """The roots in the store become those of *roots* that are not *gone*, and of what is being built.

        Gives what had none before, and what has none any more.
        """
        wanted = {self._root(root.system, root.path): root.path for root in roots if root.path not in gone}
        return await make_exactly(self._services.roots, self.wanted.subject.uid, wanted | self._being_built)

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


def _named(root: Root) -> str:
    return f"{root.path} of generation {root.generation}"


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
