"""The binary cache between controller and nodes is away, slow, or not itself."""

from __future__ import annotations

import time

from tests.chaos import cache
from tests.chaos.scenario import scenario
from tests.chaos.stage import Stage


@scenario("cache-down")
def cache_down(stage: Stage) -> None:
    """The cache is down"""
    known = known_closure(stage)
    cold = stage.new(stage.built(), 2)
    with cache.gone(stage.cluster):
        stage.create(cold)
        stage.told(cold, "http://cknix-cache.cknix-system.svc could not deliver it", timeout=90)
        as_if_nothing_had_happened(stage, known)
        time.sleep(stage.choose(short=0, full=60))
    stage.started(cold, timeout=200)


@scenario("cache-slow")
def cache_slow(stage: Stage) -> None:
    """The cache is slow"""
    known = known_closure(stage)
    # 20 kB/s: in full longer than one call of kubelet's may take.
    large = stage.new(stage.built(kibibytes=stage.choose(short=200, full=3000)), 3)
    with cache.treated(stage.cluster, "slow"):
        stage.create(large)
        as_if_nothing_had_happened(stage, known)
        small = stage.new(stage.built())
        stage.create(small)
        stage.started(small)
        stage.started(large, timeout=300)


@scenario("cache-garbage")
def cache_serving_garbage(stage: Stage) -> None:
    """The cache serves garbage: other bytes, pages of HTML, half of what it says, or nothing at all"""
    known = known_closure(stage)
    waiting = []
    for mode in ("garbage", "page", "cut", "silent"):
        cold = stage.new(stage.built(kibibytes=8))
        waiting += cold
        with cache.treated(stage.cluster, mode):
            stage.create(cold)
            if mode != "silent":
                stage.told(cold, "FailedMount", timeout=90)
            as_if_nothing_had_happened(stage, known)
            time.sleep(stage.choose(short=0, full=30))
            assert [stage.cluster.phase(pod.name) for pod in cold] == ["Pending"], mode
    stage.started(waiting, timeout=250)


def known_closure(stage: Stage) -> str:
    """An Expression whose closure the victim has."""
    expression = stage.built()
    pods = stage.new(expression)
    stage.create(pods)
    stage.started(pods)
    stage.delete(pods)
    return expression


def as_if_nothing_had_happened(stage: Stage, expression: str) -> None:
    """New pods of what the node has start."""
    pods = [*stage.new(expression), *stage.new(expression, read_only=False)]
    stage.create(pods)
    stage.started(pods, timeout=30)
    stage.delete(pods)
