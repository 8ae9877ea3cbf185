"""Many pods at once, and for long."""

from __future__ import annotations

import itertools
import time

from tests.chaos import workload
from tests.chaos.scenario import scenario
from tests.chaos.stage import Stage
from tests.chaos.workload import Pod


@scenario("sixty-at-once")
def sixty_at_once(stage: Stage) -> None:
    """60 pods are started at once on a node that has none of their closures"""
    cold = [stage.built(kibibytes=500), stage.built(paths=100), stage.built()]
    pods = [pod for number in range(60) for pod in stage.new(cold[number % len(cold)], read_only=number % 4 != 0)]
    stage.create(pods)
    stage.started(pods, timeout=240)
    stage.delete(pods, timeout=240)


@scenario("churn")
def churn(stage: Stage) -> None:
    """200 pods are replaced by others for 10 minutes (short: 20, 30 s)"""
    count, seconds = stage.choose(short=(20, 30), full=(200, 600))
    closures = itertools.cycle([stage.built(), stage.built(paths=50), stage.built(kibibytes=100)])
    nodes = itertools.cycle(stage.cluster.nodes)
    batch = max(5, count // 10)

    def some(number: int) -> list[Pod]:
        return [pod for n in range(number) for pod in stage.new(next(closures), node=next(nodes), read_only=n % 3 != 0)]

    alive = some(count)
    stage.create(alive)
    workload.running(stage.cluster, alive, timeout=300)
    ends = time.monotonic() + seconds
    replaced = 0
    while time.monotonic() < ends:
        going, alive = alive[:batch], alive[batch:]
        fresh = some(batch)
        stage.delete(going, wait=False)
        stage.create(fresh)
        workload.running(stage.cluster, fresh, timeout=120)
        stage.forget(going)
        alive += fresh
        replaced += batch
    stage.started(alive, timeout=120)
    stage.delete(alive, timeout=300)
    assert replaced >= count // 2, f"only {replaced} pods were replaced in {seconds} s"
