"""The driver is restarted under running pods: nothing happens to them, and afterwards everything still works."""

from __future__ import annotations

from tests.cluster import driver
from tests.cluster.harness import Cluster


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


def test_a_controller_that_moves_to_another_node_leaves_nothing_on_the_old_one(
    installed: Cluster, applied: driver.Apply
) -> None:
    cluster = installed
    applied(driver.expression("nomad", driver.demo('greet "from a nomad"')))
    path = driver.built(cluster, "nomad")
    pod = driver.controller_pod(cluster)
    old = driver.node_of(cluster, pod, driver.SYSTEM)
    cluster.kubectl("cordon", old.name)
    try:
        cluster.kubectl("rollout", "restart", "-n", driver.SYSTEM, "deployment/cknix-controller")
        driver.rolled_out(cluster)
        new = driver.node_of(cluster, driver.controller_pod(cluster), driver.SYSTEM)
        assert new.name != old.name
        left = old.path("/var/lib/cknix/controller")
        cluster.wait("the old store is gone", lambda: [entry.name for entry in left.iterdir()] == [".lock"], timeout=60)
        # The result was lost with the old store, stayed in the status, and is built again.
        assert driver.built(cluster, "nomad") == path
        cluster.wait("it is back", (new.path("/var/lib/cknix/controller") / path.lstrip("/")).exists, timeout=60)
    finally:
        cluster.kubectl("uncordon", old.name)
