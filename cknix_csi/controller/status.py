"""The status of an Expression: what is known, what is shown, which results are kept.  Pure.

Three steps lead to a result, each with a condition: Evaluated, Built, Published.  Everything else is derived:

* ``phase`` from the steps of the newest generation;
* ``Ready`` from the results: True as long as there is one in the store, whatever the newest generation does.  Its
  ``observedGeneration`` is the generation that the *result* is from, so that ``kubectl wait --for=condition=Ready``
  after a change waits for the changed result, while pods go on using the last good one.

A result that the store has lost, as when the controller moved to another node, stays in ``result`` and ``results``:
nodes that have it go on publishing it.  It is in ``lostResults`` instead of ``gcRoots``, so that it comes back with its
generation and age when the store does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cknix_csi.api import conditions
from cknix_csi.api.conditions import Condition, Status
from cknix_csi.api.expression import (
    BUILT,
    EVALUATED,
    FAILED,
    GROUP,
    PENDING,
    PUBLISHED,
    READY,
    RUNNING,
    SUCCEEDED,
    Spec,
)
from cknix_csi.api.progress import Progress
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.nix import log

STEPS = (EVALUATED, BUILT, PUBLISHED)

# Reasons of steps.  Failures use the reason of their error (EvaluationFailed, BuildFailed, …).
QUEUED = "Queued"
EVALUATING = "Evaluating"
BUILDING = "Building"
PUBLISHING = "Publishing"
WAITING = "Waiting"
RETRYING = "Retrying"
# Reasons of Ready.
LAST_GOOD_RESULT = "LastGoodResult"
NO_RESULT = "NoResult"

REBUILD_ANNOTATION = f"{GROUP}/rebuild"

MAX_MESSAGE_BYTES = 4096
MAX_HEADLINE_BYTES = 512
# Bounds of the CRD.
MAX_BUILDING = 16
MAX_NAME = 255


@dataclass(frozen=True, slots=True)
class Result:
    """A published store path."""

    system: str
    path: StorePath
    closure_size: int
    """Bytes of all NARs of the closure."""
    paths: int


@dataclass(frozen=True, slots=True)
class Loss:
    """That a result is in the store no more."""

    node: str = ""
    """Where the store that had it was left; empty when it was not left behind, or nobody knows."""

    def __str__(self) -> str:
        return f"the controller's store was left on node {self.node}" if self.node else "the controller's store lost it"


@dataclass(frozen=True, slots=True)
class Root:
    """A result that is kept: by its GC root, unless it is lost."""

    system: str
    path: StorePath
    generation: int
    """The newest generation that had this result."""
    created_at: str
    lost: Loss | None = None
    """Not None: it should be in this controller's store, and is not."""


@dataclass(frozen=True, slots=True)
class ExpressionStatus:
    observed_generation: int = 0
    steps: tuple[Condition, ...] = ()
    """The conditions Evaluated, Built and Published, as far as they have been set."""
    ready: Mapping[str, Any] | None = None
    """The condition Ready as last shown: its transition time is kept."""
    results: tuple[Result, ...] = ()
    result: StorePath | None = None
    roots: tuple[Root, ...] = ()
    """Newest first, lost ones among them."""
    progress: Progress | None = None
    message: str = ""
    rebuild: str = ""
    """The value of the annotation ``cknix.cool/rebuild`` that has been acted on."""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> ExpressionStatus:
        """The status of an Expression object; entries that are malformed count as absent."""
        status = body.get("status") or {}
        found = [condition for condition in status.get("conditions") or [] if isinstance(condition, dict)]
        results: list[Result] = []
        for entry in status.get("results") or []:
            try:
                path = StorePath.parse(entry["path"])
                results.append(
                    Result(entry["system"], path, int(entry.get("closureSize", 0)), int(entry.get("paths", 0)))
                )
            except (KeyError, TypeError, ValueError):
                continue
        roots = [*_roots(status.get("gcRoots")), *_roots(status.get("lostResults"), lost=True)]
        if any(root.lost for root in roots):
            # Both lists are newest first; a stable sort leaves each as it is.
            roots.sort(key=lambda root: (root.generation, root.created_at), reverse=True)
        try:
            result = StorePath.parse(str(status.get("result", "")))
        except InvalidStorePath:
            result = None
        return cls(
            observed_generation=int(status.get("observedGeneration") or 0),
            steps=tuple(condition for kind in STEPS if (condition := _copy(conditions.find(found, kind))) is not None),
            ready=conditions.find(found, READY),
            results=tuple(results),
            result=result,
            roots=tuple(roots),
            message=str(status.get("message") or ""),
            rebuild=str(status.get("lastHandledRebuild") or ""),
        )

    @property
    def phase(self) -> str:
        return phase(self.steps, self.observed_generation)

    @property
    def result_generation(self) -> int:
        """The newest generation that the results are from; 0 when there are none."""
        current = {(result.system, result.path) for result in self.results}
        return max((root.generation for root in self.roots if (root.system, root.path) in current), default=0)

    @property
    def lost(self) -> tuple[Root, ...]:
        return tuple(root for root in self.roots if root.lost is not None)

    @property
    def lost_results(self) -> tuple[Root, ...]:
        """Those of :attr:`lost` that pods are given."""
        current = {(result.system, result.path) for result in self.results}
        return tuple(root for root in self.lost if (root.system, root.path) in current)

    def with_losses(self, losses: Mapping[StorePath, Loss]) -> ExpressionStatus:
        """Exactly the paths of *losses* are lost; one that was already keeps its own."""

        def told(root: Root) -> Root:
            if root.path not in losses:
                return replace(root, lost=None)
            return root if root.lost is not None else replace(root, lost=losses[root.path])

        return replace(self, roots=tuple(told(root) for root in self.roots))

    def with_all_rooted(self, now: datetime) -> ExpressionStatus:
        """Every result has its entry among the roots, whatever somebody did to the status."""
        rooted = {(root.system, root.path) for root in self.roots}
        missing = [result for result in self.results if (result.system, result.path) not in rooted]
        generation = int((self.ready or {}).get("observedGeneration") or self.observed_generation)
        made = tuple(Root(each.system, each.path, generation, conditions.timestamp(now)) for each in missing)
        return replace(self, roots=(*made, *self.roots)) if made else self

    def begun(self, generation: int, rebuild: str, now: datetime) -> ExpressionStatus:
        """Work on *generation* begins (anew): no step is done, results stay."""
        status = replace(self, observed_generation=generation, rebuild=rebuild, progress=None)
        for kind in STEPS:
            status = status.with_step(kind, "Unknown", QUEUED if kind == EVALUATED else WAITING, "", now)
        return status

    def with_step(self, kind: str, state: Status, reason: str, message: str, now: datetime) -> ExpressionStatus:
        steps = conditions.with_condition(
            self.steps,
            kind,
            state,
            reason=reason,
            message=headline(message),
            generation=self.observed_generation,
            now=now,
        )
        return replace(self, steps=tuple(steps))

    def with_results(
        self, results: Sequence[Result], *, primary: str, history_limit: int, now: datetime
    ) -> ExpressionStatus:
        """New *results* of the observed generation; the oldest roots beyond *history_limit* per system are dropped."""
        roots = self.roots
        for result in results:
            roots = kept(roots, result, self.observed_generation, history_limit, conditions.timestamp(now))
        # A system that is no longer built for has no result to keep.
        systems = {result.system for result in results}
        by_system = {result.system: result.path for result in results}
        return replace(
            self,
            results=tuple(results),
            result=by_system.get(primary, results[0].path if results else None),
            roots=tuple(root for root in roots if root.system in systems),
        )

    def render(self, now: datetime) -> dict[str, Any]:
        """The whole ``.status`` as it is written."""
        status: dict[str, Any] = {
            "phase": self.phase,
            "observedGeneration": self.observed_generation,
            "conditions": [*self.steps, self._ready(now)],
            "message": bounded(self.message),
        }
        if self.result is not None:
            status["result"] = str(self.result)
        if self.results:
            status["results"] = [
                {
                    "system": result.system,
                    "path": str(result.path),
                    "closureSize": result.closure_size,
                    "paths": result.paths,
                }
                for result in self.results
            ]
        if held := [_entry(root) for root in self.roots if root.lost is None]:
            status["gcRoots"] = held
        if lost := [_entry(root) for root in self.lost]:
            status["lostResults"] = lost
        if self.progress is not None:
            status["progress"] = {
                "done": self.progress.done,
                "expected": self.progress.expected,
                "building": [name[:MAX_NAME] for name in self.progress.building[:MAX_BUILDING]],
            }
        if self.rebuild:
            status["lastHandledRebuild"] = self.rebuild
        return status

    def settled(self, now: datetime) -> ExpressionStatus:
        """This status with Ready brought up to date, so that later renderings keep its transition time."""
        return replace(self, ready=self._ready(now))

    def _ready(self, now: datetime) -> Condition:
        before = [self.ready] if self.ready is not None else []
        state: Status
        if self.results:
            state, generation = "True", self.result_generation or self.observed_generation
            reason, message = self._ready_result(generation)
            if lost := self.lost_results:
                state, reason = "False", Situation.RESULT_LOST.reason
                paths = ", ".join(str(path) for path in dict.fromkeys(root.path for root in lost))
                message = f"{paths} of generation {generation}: {lost[0].lost}; {remedy(lost[0].lost)}"
        else:
            state, generation = "False", self.observed_generation
            reason, message = NO_RESULT, self.message.partition("\n")[0]
            failed = next((step for step in self.steps if step["status"] == "False"), None)
            if failed is not None:
                reason, message = str(failed["reason"]), str(failed["message"])
        return conditions.with_condition(
            before, READY, state, reason=reason, message=message, generation=generation, now=now
        )[0]

    def _ready_result(self, generation: int) -> tuple[str, str]:
        if self.phase == SUCCEEDED:
            return SUCCEEDED, f"result of generation {generation}"
        failed = next((step for step in self.steps if step["status"] == "False"), None)
        newest = "" if generation == self.observed_generation else f"generation {self.observed_generation} "
        if failed is not None:
            said = f"{newest or 'its newest evaluation or build '}failed: {failed['message']}"
        else:
            said = f"{newest}is being worked on" if newest else "it is being looked at anew"
        return LAST_GOOD_RESULT, f"result of generation {generation}; {said}"


def remedy(lost: Loss | None) -> str:
    """What brings a lost result back, for the reader of Ready and of the Event."""
    back = f"move the controller back to node {lost.node}, " if lost is not None and lost.node else ""
    return (
        f"{back}correct the Expression, or have it built anew with the annotation {REBUILD_ANNOTATION}; "
        "nodes that have it go on using it"
    )


def phase(steps: Sequence[Mapping[str, Any]], generation: int) -> str:
    """The summary of the steps of *generation*; steps of an older one say nothing about it."""
    current = [
        step
        for kind in STEPS
        if (step := conditions.find(steps, kind)) is not None and step.get("observedGeneration") == generation
    ]
    if any(step["status"] == "False" for step in current):
        return FAILED
    if len(current) == len(STEPS) and all(step["status"] == "True" for step in current):
        return SUCCEEDED
    pending = next((step for step in current if step["status"] != "True"), None)
    if pending is None or pending["reason"] in {QUEUED, RETRYING}:
        return PENDING
    return RUNNING


def kept(
    roots: Sequence[Root], result: Result, generation: int, history_limit: int, created_at: str
) -> tuple[Root, ...]:
    """*roots* with *result* as the newest of its system, at most *history_limit* of that system.

    A result that is the newest already keeps its age and gets the new generation; an older one comes to the front.
    """
    own = [root for root in roots if root.system == result.system]
    others = [root for root in roots if root.system != result.system]
    if own and own[0].path == result.path:
        newest = replace(own[0], generation=generation, lost=None)
    else:
        newest = Root(result.system, result.path, generation, created_at)
    older = [root for root in own if root.path != result.path]
    return (*([newest, *older][:history_limit]), *others)


def is_settled(status: ExpressionStatus, generation: int, rebuild: str) -> bool:
    """True when this generation has been worked on to its end, good or bad, and no rebuild is asked for."""
    return (
        status.observed_generation == generation and status.rebuild == rebuild and status.phase in {SUCCEEDED, FAILED}
    )


def until_refresh(status: ExpressionStatus, spec: Spec, now: datetime) -> float | None:
    """Seconds until the next evaluation is due, 0 when it is; None when it is not evaluated again.

    The last evaluation ended when the condition Evaluated last changed: each one sets it to Unknown first.
    """
    if spec.refresh is None:
        return None
    evaluated = conditions.find(status.steps, EVALUATED)
    if evaluated is None:
        return 0.0
    try:
        last = datetime.strptime(str(evaluated.get("lastTransitionTime")), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return 0.0
    # A clock that was wrong must not put the next evaluation off for ever.
    last = min(last, now)
    return max(0.0, (last + timedelta(seconds=spec.refresh) - now).total_seconds())


def bounded(text: str, limit: int = MAX_MESSAGE_BYTES) -> str:
    """*text* in at most *limit* bytes: its first line and as much of its end as fits.

    Nix's log ends with what went wrong, so the middle is what can be missed.
    """
    data = text.encode()
    if len(data) <= limit:
        return text
    mark = "\n[…]\n".encode()
    first = data.partition(b"\n")[0][: limit // 4]
    last = data[len(data) - (limit - len(first) - len(mark)) :]
    return b"".join((first, mark, last)).decode(errors="ignore")


def headline(text: str) -> str:
    """The one line of *text* that says most, in at most :data:`MAX_HEADLINE_BYTES` bytes: for conditions and lists."""
    line = log.headline(text)
    data = line.encode()
    if len(data) <= MAX_HEADLINE_BYTES:
        return line
    return data[: MAX_HEADLINE_BYTES - len("…".encode())].decode(errors="ignore") + "…"


def told(text: str, *, reason: str = "", then: str = "") -> str:
    """A status' message about the failure *text*: one line that says it all, an empty one, and what there is to read.

    ``kubectl get`` shows the first line: *reason*, what *text* comes to, and what happens *then*.
    """
    line = headline(text)
    first = "; ".join(filter(None, (": ".join(filter(None, (reason, line))), then)))
    rest = text.strip()
    # What is in the first line already is not told twice.
    if rest.partition("\n")[0].strip() == line:
        rest = rest.partition("\n")[2].strip("\n")
    return f"{first}\n\n{rest}" if rest.strip() else first


def _roots(entries: Any, *, lost: bool = False) -> list[Root]:
    """Entries of ``gcRoots`` or, if *lost*, of ``lostResults``; malformed ones are left out."""
    found = []
    for entry in entries or []:
        try:
            loss = Loss(str(entry.get("node") or "")) if lost else None
            path, created_at = StorePath.parse(entry["path"]), str(entry["createdAt"])
            found.append(Root(entry["system"], path, int(entry["generation"]), created_at, loss))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return found


def _entry(root: Root) -> dict[str, Any]:
    entry = {
        "system": root.system,
        "path": str(root.path),
        "generation": root.generation,
        "createdAt": root.created_at,
    }
    return entry if root.lost is None or not root.lost.node else {**entry, "node": root.lost.node}


def _copy(condition: Mapping[str, Any] | None) -> Condition | None:
    return None if condition is None else dict(condition)
