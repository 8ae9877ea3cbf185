"""The driver is restarted under running pods: nothing happens to them, and afterwards everything still works."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.cluster import driver
from tests.cluster.harness import Cluster
from tests.cluster.harness.node import Node

CONTROLLER = "/var/lib/cknix/controller"


def mount_ids(cluster: Cluster, pods: list[str]) -> dict[str, tuple[str, str]]:
    """Per pod: id of the mount at its target on the node, and id of the mount at /nix inside the container."""
    ids = {}
    for pod in pods:
        uid = cluster.kubectl("get", "pod", pod, "-o", "jsonpath={.metadata.uid}")
        lines = driver.node_of(cluster, pod).mountinfo().splitlines()
        outside = next(line.split()[0] for line in lines if f"/pods/{uid}/volumes/kubernetes.io~csi/nix/mount " in line)
        table = driver.in_pod(cluster, pod, "cat", "/proc/self/mountinfo").splitlines()
        inside = next(line.split()[0] for line in table if line.split()[4] == "/nix")
        ids[pod] = (outside, inside)
    return ids


def test_a_rollout_of_both_workloads_disturbs_no_pod(installed: Cluster, applied: driver.Apply) -> None:
    cluster = installed
    applied(driver.expression("steady", driver.demo("hello")))
    path = driver.built(cluster, "steady")
    pods = []
    for node in cluster.nodes:
        for kind, read_only in (("ro", True), ("rw", False)):
            name = f"steady-{kind}-{node.index}"
            applied(driver.pod(name, {"expression": "steady"}, node=node.name, read_only=read_only))
            pods.append(name)
    for pod in pods:
        driver.running(cluster, pod)
    for pod in (name for name in pods if "-rw-" in name):
        driver.in_pod(cluster, pod, "sh", "-c", "echo kept > /nix/var/kept")
    before = mount_ids(cluster, pods)

    cluster.kubectl("rollout", "restart", "-n", driver.SYSTEM, "daemonset/cknix-node", "deployment/cknix-controller")
    driver.rolled_out(cluster)

    assert mount_ids(cluster, pods) == before
    for pod in pods:
        assert driver.in_pod(cluster, pod, "/nix/var/result/bin/hello").startswith(f"Hello from {path}")
    for pod in (name for name in pods if "-rw-" in name):
        assert driver.in_pod(cluster, pod, "cat", "/nix/var/kept").strip() == "kept"

    # The new daemons publish beside what the old ones published, and unpublish it.
    for node in cluster.nodes:
        name = f"after-{node.index}"
        applied(driver.pod(name, {"expression": "steady"}, "/nix/var/result/bin/hello", node=node.name))
        assert driver.printed(cluster, name).startswith(f"Hello from {path}")
    # The new controller builds.
    applied(driver.expression("fresh", driver.demo('greet "after the restart"')))
    driver.built(cluster, "fresh")
    assert driver.phase(cluster, "steady") == "Succeeded"
    assert driver.result(cluster, "steady") == path


def test_after_the_restart_everything_can_be_taken_away(installed: Cluster) -> None:
    # The volumes of the test above were made by daemons that are gone, and deleted under their successors.
    driver.assert_nothing_left(installed)


def moved(cluster: Cluster, away_from: Node) -> Node:
    """The controller is made to move; gives where it is now, while nothing else may go to *away_from*."""
    cluster.kubectl("cordon", away_from.name)
    try:
        cluster.kubectl("rollout", "restart", "-n", driver.SYSTEM, "deployment/cknix-controller")
        driver.rolled_out(cluster)
    finally:
        cluster.kubectl("uncordon", away_from.name)
    new = driver.node_of(cluster, driver.controller_pod(cluster), driver.SYSTEM)
    assert new.name != away_from.name
    return new


def ready(cluster: Cluster, name: str) -> list[str]:
    template = "jsonpath={.status.conditions[?(@.type=='Ready')]['status','reason']}"
    return cluster.kubectl("get", "expr", name, "-o", template).split()


def inodes(store: Path, paths: list[str]) -> list[int]:
    return [(store / path.lstrip("/")).lstat().st_ino for path in paths]


def test_a_controller_that_moves_says_what_is_lost_and_finds_it_when_it_comes_back(
    installed: Cluster, applied: driver.Apply
) -> None:
    cluster = installed
    applied(driver.expression("nomad", driver.demo('greet "from a nomad"')))
    applied(driver.expression("keeper", driver.demo('greet "what is worth keeping"')))
    paths = [driver.built(cluster, name) for name in ("nomad", "keeper")]
    cluster.apply(driver.expression("keeper", 'throw "it does not build any more"'))
    cluster.wait("its new generation fails", lambda: driver.phase(cluster, "keeper") == "Failed")
    assert ready(cluster, "keeper") == ["True", "LastGoodResult"]
    old = driver.node_of(cluster, driver.controller_pod(cluster), driver.SYSTEM)
    store = old.path(CONTROLLER)
    before = inodes(store, paths)

    new = moved(cluster, old)
    cluster.wait("the old store is known to be abandoned", (store / driver.ABANDONED).exists, timeout=60)
    # The result was lost with the old store, stayed in the status, and is built again.
    assert driver.built(cluster, "nomad") == paths[0]
    cluster.wait("it is back", (new.path(CONTROLLER) / paths[0].lstrip("/")).exists, timeout=60)
    # What cannot be built again is not passed off as there.
    cluster.wait("the loss is told", lambda: ready(cluster, "keeper") == ["False", "ResultLost"], timeout=120)
    assert driver.result(cluster, "keeper") == paths[1]
    described = cluster.kubectl("describe", "expr", "keeper")
    assert f"left on node {old.name}" in described
    applied(driver.pod("in-vain", {"expression": "keeper"}, "/nix/var/result/bin/hello"))
    cluster.wait(
        "the pod hears of it",
        lambda: (
            "describe expr keeper` tells whether it is being built again or lost" in driver.events(cluster, "in-vain")
        ),
        timeout=60,
    )

    assert moved(cluster, new).name == old.name
    cluster.wait("it is found", lambda: ready(cluster, "keeper") == ["True", "LastGoodResult"], timeout=60)
    assert inodes(store, paths) == before
    assert not (store / driver.ABANDONED).exists()
    # kubelet pauses for up to two minutes between tries.
    assert driver.printed(cluster, "in-vain", timeout=180).startswith(f"Hello from {paths[1]}")

    left = new.path(CONTROLLER)
    cluster.wait("the other one is abandoned now", (left / driver.ABANDONED).exists, timeout=60)
    long_ago = time.time() - 8 * 86_400
    os.utime(left / driver.ABANDONED, (long_ago, long_ago))
    cluster.wait("after a week it goes", lambda: [entry.name for entry in left.iterdir()] == [".lock"], timeout=60)
