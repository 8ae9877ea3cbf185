"""How long a pod takes to start, with a volume and with an emptyDir: a figure, not a test."""

from __future__ import annotations

import json
import statistics
import sys
from datetime import datetime
from pathlib import Path

from tests.chaos.stage import Stage
from tests.chaos.workload import SLEEP, printed
from tests.cluster import driver
from tests.cluster.harness import Cluster
from tests.cluster.harness.command import run

NAME = "pod-start"
SUMMARY = (
    "The time from a pod's creation to its first line, with a volume of 2,443 paths and with an emptyDir (a figure)"
)
PATHS = 2443
POST = Path(__file__).with_name("post.py")
COMMAND = f"echo started; {SLEEP}"
EMPTY, IN_USE, KNOWN = "an emptyDir", "a closure in use", "a closure in no use"


def measure(cluster: Cluster, *, short: bool) -> str:
    """What was measured, as text.  One pod at a time, the kinds by turns, all on the second node."""
    stage = Stage(cluster, short=short)
    stage.well()
    others = count_paths(stage, stage.built())
    expressions = {EMPTY: "", IN_USE: stage.built(paths=PATHS - others), KNOWN: stage.built(paths=PATHS - others)}
    found = {expression: count_paths(stage, expression) for expression in expressions.values() if expression}
    assert set(found.values()) == {PATHS}, found
    warm = stage.new(expressions[IN_USE])
    stage.create(warm)
    stage.started(warm)

    seconds: dict[str, list[float]] = {kind: [] for kind in expressions}
    for _ in range(stage.choose(short=4, full=25)):
        for kind, expression in expressions.items():
            seconds[kind].append(start(stage, expression))
    stage.clear()
    medians = {kind: statistics.median(values) * 1000 for kind, values in seconds.items()}
    lines = [f"pod start, medians of {len(seconds[EMPTY])} each, {PATHS} store paths:"]
    for kind, median in medians.items():
        spread = f"{min(seconds[kind]) * 1000:.0f} to {max(seconds[kind]) * 1000:.0f}"
        more = "" if kind == EMPTY else f", {median - medians[EMPTY]:+.0f} ms"
        lines.append(f"  {kind:<20} {median:>6.0f} ms  ({spread}){more}")
    return "\n".join(lines)


def count_paths(stage: Stage, expression: str) -> int:
    """How many store paths a closure has, once the second node has it, as Nix there says."""
    pods = stage.new(expression)
    stage.create(pods)
    stage.started(pods, timeout=180)
    count = len(driver.closure(stage.cluster, stage.victim, stage.result(expression)))
    stage.delete(pods)
    return count


def start(stage: Stage, expression: str) -> float:
    """Seconds from the request that makes a pod to the first line it prints, by containerd's clock and ours: one."""
    (pod,) = stage.new(expression, command=COMMAND)
    stage.pods[pod.name] = pod
    config = json.loads(stage.cluster.kubeconfig.read_text())
    server = config["clusters"][0]["cluster"]
    request = {
        "url": f"{server['server']}/api/v1/namespaces/default/pods",
        "authority": server["certificate-authority"],
        "token": config["users"][0]["user"]["token"],
        "object": pod.object(),
    }
    began = float(run(stage.cluster.network_command([sys.executable, POST]), stdin=json.dumps(request)))
    line = stage.cluster.wait(f"{pod.name} prints", lambda: printed(stage.victim, pod.name), timeout=60)
    stamp = line.split()[0]
    stage.delete([pod])
    # Nanoseconds and a "Z"; datetime takes microseconds.
    return datetime.fromisoformat(f"{stamp[:26]}+00:00").timestamp() - began
