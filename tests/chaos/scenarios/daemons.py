"""The driver's own processes are killed, at the moments that count."""

from __future__ import annotations

import os
import random
import time

from tests.chaos import cache, expressions
from tests.chaos.leaks import DATA_ROOT
from tests.chaos.parts import helpers, parts
from tests.chaos.scenario import scenario
from tests.chaos.stage import Stage
from tests.chaos.workload import Pod
from tests.cluster import driver

ATTEMPTS = 8
MANY_PATHS = 2443
CSI_SOCKET = "/var/lib/kubelet/plugins/csi.cknix.cool/csi.sock"
REGISTRATION_SOCKET = "/var/lib/kubelet/plugins_registry/csi.cknix.cool-reg.sock"


@scenario("daemon-killed")
def killed_in_a_loop(stage: Stage) -> None:
    """The node daemon is killed in a loop while pods start and stop"""
    known = stage.built()
    previous: list[Pod] = []
    for _ in range(stage.choose(short=3, full=25)):
        pods = [*stage.new(known), *stage.new(known, read_only=False), *stage.new(stage.built())]
        stage.delete(previous, wait=False)
        stage.create(pods)
        for _ in range(2):
            time.sleep(random.uniform(0, 1.5))
            stage.kill(killed := stage.daemon())
            stage.successor(stage.daemon, killed)
        stage.started(pods)
        previous = pods


@scenario("sockets-removed")
def sockets_removed(stage: Stage) -> None:
    """The node daemon's sockets are removed while pods start and stop"""
    known, running = stage.built(), stage.daemon()
    previous: list[Pod] = []
    for removed in ([REGISTRATION_SOCKET], [CSI_SOCKET], [REGISTRATION_SOCKET, CSI_SOCKET]):
        pods = [*stage.new(known), *stage.new(known, read_only=False), *stage.new(stage.built())]
        for socket in removed:
            stage.victim.inside(socket).unlink()
        stage.delete(previous, wait=False)
        stage.create(pods)
        stage.started(pods)
        stage.well()
        previous = pods
    assert stage.daemon() == running, "no restart is needed"


@scenario("daemon-killed-fetching")
def killed_during_a_fetch(stage: Stage) -> None:
    """The node daemon is killed during a fetch"""
    with cache.treated(stage.cluster, "slow"):
        pods = stage.new(stage.built(kibibytes=400), 3)
        stage.create(pods)
        for _ in range(stage.choose(short=2, full=5)):
            stage.cluster.wait("a fetch is going on", lambda: fetches(stage), timeout=90)
            stage.kill(killed := stage.daemon())
            stage.successor(stage.daemon, killed)
    stage.started(pods, timeout=150)


def fetches(stage: Stage) -> bool:
    """Nix is writing a store path on the victim: it runs, and beside the path's lock there is a part of the path."""
    store = stage.victim.inside(DATA_ROOT) / "nix/store"
    locks = [name for name in os.listdir(store) if name.endswith(".lock")]
    begun = any((store / name.removesuffix(".lock")).exists() for name in locks)
    return begun and bool(helpers(parts(stage.cluster), stage.victim))


@scenario("daemon-killed-building-a-view")
def killed_during_a_view_build(stage: Stage) -> None:
    """The node daemon is killed while it builds a view"""
    views = stage.victim.inside(DATA_ROOT) / "views"
    expression = stage.built(paths=stage.choose(short=MANY_PATHS // 3, full=MANY_PATHS))
    warm = stage.new(expression)
    stage.create(warm)
    stage.started(warm, timeout=150)
    caught = 0
    for _ in range(ATTEMPTS):
        # A daemon that begins drops views without pods, so that the next one finds the closure and no view.
        stage.delete(warm)
        stage.kill(kept := stage.daemon())
        stage.successor(stage.daemon, kept)
        stage.cluster.wait("its view is gone", lambda: len(list(views.iterdir())) == 1)  # that of the bystanders
        killed = stage.daemon()
        warm = stage.new(expression)
        stage.create(warm)
        stage.poll("a view is being built", lambda: half_built(stage) or len(list(views.iterdir())) > 1)
        stage.kill(killed)
        caught += half_built(stage)
        stage.successor(stage.daemon, killed)
        stage.started(warm)
        if caught == stage.choose(short=1, full=4):
            return
    raise AssertionError(f"killed {caught} times in the middle of a view in {ATTEMPTS} attempts")


def half_built(stage: Stage) -> bool:
    """There is a part of a view on the victim."""
    return any(name.startswith(".building") for name in os.listdir(stage.victim.inside(DATA_ROOT) / "views"))


@scenario("daemon-killed-unpublishing")
def killed_during_an_unpublish(stage: Stage) -> None:
    """The node daemon is killed in the middle of unpublishing"""
    expression = stage.built()
    for _ in range(stage.choose(short=1, full=8)):
        pods = [*stage.new(expression, 4), *stage.new(expression, 4, read_only=False)]
        stage.create(pods)
        stage.started(pods)
        all_of_them = mounts(stage)
        killed = stage.daemon()
        stage.delete(pods, wait=False)
        stage.poll("the first volumes are unpublished", lambda: mounts(stage) < all_of_them)  # noqa: B023
        stage.kill(killed)
        stage.successor(stage.daemon, killed)
        stage.delete(pods)


def mounts(stage: Stage) -> int:
    """How many volumes of ours are mounted in pods of the victim."""
    return sum("kubernetes.io~csi" in line for line in stage.victim.mountinfo().splitlines())


@scenario("controller-killed")
def controller_killed_in_a_build(stage: Stage) -> None:
    """The controller is killed during a build"""
    for _ in range(stage.choose(short=1, full=4)):
        tag = stage.tag("slow")
        stage.apply(expressions.slow(tag, stage.choose(short=5, full=20)), tag)
        pods = stage.new(tag)
        stage.create(pods)
        stage.cluster.wait("the build goes on", lambda: driver.phase(stage.cluster, tag) == "Running")  # noqa: B023
        time.sleep(random.uniform(0.5, 3))
        stage.kill(killed := stage.controller())
        stage.successor(stage.controller, killed)
        driver.built(stage.cluster, tag, timeout=120)
        stage.started(pods, timeout=150)
