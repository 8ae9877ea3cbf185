"""Parts of Kubernetes stop and start; pods go on, and whatever was asked for meanwhile comes true."""

from __future__ import annotations

import random
import signal
import time

from tests.chaos import room
from tests.chaos.parts import DAEMON, parts, process
from tests.chaos.scenario import scenario
from tests.chaos.stage import Stage
from tests.chaos.workload import Pod, printed

REFUSED = 12
"""Seconds in which kubelet refuses a daemon more than once."""
SOON = 60
"""Seconds in which a pod starts that a daemon's restart would not keep waiting (CrashLoopBackOff)."""


@scenario("kubelet-restarted")
def kubelet_restarted(stage: Stage) -> None:
    """kubelet is restarted while pods start and stop"""
    restarted_under_load(stage, "kubelet")


@scenario("containerd-restarted")
def containerd_restarted(stage: Stage) -> None:
    """containerd is restarted while pods start and stop"""
    restarted_under_load(stage, "containerd")


def restarted_under_load(stage: Stage, program: str) -> None:
    """Ends *program* on the victim, by turns politely and not, at random moments."""
    known = stage.built()
    previous: list[Pod] = []
    for number in range(stage.choose(short=2, full=12)):
        pods = [*stage.new(known), *stage.new(known, read_only=False), *stage.new(stage.built())]
        stage.delete(previous, wait=False)
        stage.create(pods)
        time.sleep(random.uniform(0, 1.5))
        stage.victim.restart(program, signal.SIGKILL if number % 2 else signal.SIGTERM)
        stage.started(pods)
        previous = pods


@scenario("api-server-down")
def api_server_down(stage: Stage) -> None:
    """The API server is down for two minutes; a pod that only its node knows of starts, then the daemon is killed"""
    first = stage.cluster.nodes[0]
    expression = stage.built()
    known = stage.new(expression)
    stage.create(known)
    stage.started(known)
    path = stage.result(expression)
    (pod,) = stage.new(expression)
    mirror = f"{pod.name}-{stage.victim.name}"  # what kubelet calls it
    manifest = stage.victim.path(room.STATIC_PODS) / "pod.json"
    pods = parts(stage.cluster)
    first.kill("kube-apiserver")
    ends = time.monotonic() + stage.choose(short=15, full=120)
    try:
        manifest.write_text(pod.manifest())
        stage.poll("the pod runs", lambda: f"Hello from {path}" in printed(stage.victim, mirror), timeout=60)
        # kubelet refuses to register the one that follows as long as it cannot write to the API server.
        stage.kill(killed := process(pods, DAEMON, stage.victim))
        successor = stage.successor(lambda: process(pods, DAEMON, stage.victim), killed)
        stage.before.require_readable()
        time.sleep(max(REFUSED, ends - time.monotonic()))
    finally:
        first.start("kube-apiserver")
        manifest.unlink(missing_ok=True)
    back(stage)
    again = stage.new(expression)
    stage.create(again)
    stage.started(again, timeout=SOON)
    assert stage.daemon() == successor, "a daemon that kubelet refused goes on"
    stage.cluster.wait("the pod is gone", lambda: not pods_called(stage, mirror))
    fresh = stage.new(stage.built())
    stage.create(fresh)
    stage.started(fresh)


def pods_called(stage: Stage, name: str) -> str:
    return stage.cluster.kubectl("get", "pod", name, "--ignore-not-found", "-o", "name")


def back(stage: Stage) -> None:
    """The API server answers, and both nodes are well."""
    stage.cluster.wait("the API server is ready", lambda: stage.cluster.kubectl("get", "--raw", "/readyz"), timeout=90)
    query = '{.items[*].status.conditions[?(@.type=="Ready")].status}'
    stage.cluster.wait(
        "the nodes are Ready",
        lambda: stage.cluster.kubectl("get", "nodes", "-o", f"jsonpath={query}").split() == ["True", "True"],
        timeout=90,
    )


@scenario("etcd-restarted")
def etcd_restarted(stage: Stage) -> None:
    """etcd is killed and started again while pods start and stop"""
    first = stage.cluster.nodes[0]
    known = stage.built()
    for _ in range(stage.choose(short=1, full=5)):
        pods = [*stage.new(known, 2), *stage.new(stage.built(), read_only=False)]
        stage.create(pods)
        first.kill("etcd")
        time.sleep(stage.choose(short=3, full=10))
        first.start("etcd")
        back(stage)
        stage.started(pods)
        stage.delete(pods)
