"""One scenario after the other: the same acts for each, and a table of what came of them."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.chaos import leaks
from tests.chaos.scenario import Scenario
from tests.chaos.stage import Stage
from tests.cluster.harness import Cluster, WaitTimeout
from tests.cluster.harness.diagnosis import describe

ACTS = ("setting", "fault", "already running", "new pod", "leaks")
OK, FAILED, NOT_REACHED = "ok", "FAILED", "-"


@dataclass(slots=True)
class Outcome:
    scenario: str
    acts: dict[str, str] = field(default_factory=lambda: dict.fromkeys(ACTS, NOT_REACHED))
    took: dict[str, float] = field(default_factory=dict)
    """Seconds of each act."""

    @property
    def seconds(self) -> float:
        return sum(self.took.values())

    @property
    def good(self) -> bool:
        return all(verdict == OK for verdict in self.acts.values())


def play(cluster: Cluster, scenario: Scenario, *, short: bool) -> Outcome:
    """Never raises for what a scenario finds; says on standard error what it was, and what there is to see."""
    outcome = Outcome(scenario.name)
    stage = Stage(cluster, short=short)

    def setting() -> None:
        stage.start_bystanders()

    def fault() -> None:
        scenario.fault(stage)

    def already_running() -> None:
        if scenario.reboots:
            stage.before.require_again(stage.victim)
        else:
            stage.before.require_untouched()

    def new_pod() -> None:
        new_pods(stage)
        stage.well()

    def nothing_left() -> None:
        stage.clear()
        leaks.require_none(cluster)

    acts: Sequence[Callable[[], None]] = (setting, fault, already_running, new_pod, nothing_left)
    for act, perform in zip(ACTS, acts, strict=True):
        began = time.monotonic()
        try:
            perform()
        except Exception as error:
            outcome.acts[act] = FAILED
            _explain(cluster, scenario, act, error)
            break
        finally:
            outcome.took[act] = time.monotonic() - began
        outcome.acts[act] = OK
    return outcome


def new_pods(stage: Stage) -> None:
    """Pods of a closure that the node knows and of one that nobody has seen, read-only and writable, start."""
    known, unknown = stage.before.pods[0].expression, stage.built()
    pods = [
        *stage.new(known),
        *stage.new(known, read_only=False),
        *stage.new(unknown),
        *stage.new(unknown, read_only=False, node=stage.cluster.nodes[0]),
    ]
    stage.create(pods)
    stage.started(pods)


def table(outcomes: Sequence[Outcome]) -> str:
    """What came of each scenario, a line each."""
    shown = ACTS[1:]
    width = max(len(outcome.scenario) for outcome in outcomes)
    lines = [f"{'scenario':<{width}}" + "".join(f"{act:>17}" for act in shown) + f"{'seconds':>10}"]
    for outcome in outcomes:
        # What fails before anything was broken is the first column's matter.
        verdicts = {**outcome.acts, "fault": FAILED if outcome.acts["setting"] == FAILED else outcome.acts["fault"]}
        columns = "".join(f"{verdicts[act]:>17}" for act in shown)
        lines.append(f"{outcome.scenario:<{width}}{columns}{outcome.seconds:>10.0f}")
    return "\n".join(lines)


def _explain(cluster: Cluster, scenario: Scenario, act: str, error: Exception) -> None:
    seen = "" if isinstance(error, WaitTimeout) else f"\n{describe(cluster)}"
    told = "".join(traceback.format_exception(error))
    print(f"\n=== {scenario.name} ({scenario.summary}) fails at: {act}\n{told}{seen}\n", file=sys.stderr, flush=True)
