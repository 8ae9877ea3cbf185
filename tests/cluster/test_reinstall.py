"""cknix is removed from a cluster and installed again: as documented, and all at once, which takes one more step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import driver
from tests.cluster.harness import Cluster, CommandFailed

CRD = driver.MANIFESTS / "10-crd.yaml"


@pytest.fixture
def reinstalled(installed: Cluster) -> Iterator[Cluster]:
    """The cluster with cknix on it, and again afterwards, whatever the test has left of it."""
    yield installed
    install(installed)
    if terminating(installed):
        no_definition(installed)
        install(installed)


def install(cluster: Cluster) -> None:
    cluster.wait("the namespace is not on its way out", lambda: not namespace_goes(cluster))
    cluster.apply(driver.MANIFESTS)
    driver.rolled_out(cluster)


def namespace_goes(cluster: Cluster) -> bool:
    found = cluster.kubectl("get", "ns", driver.SYSTEM, "--ignore-not-found", "-o", "jsonpath={.status.phase}")
    return found == "Terminating"


def terminating(cluster: Cluster) -> bool:
    """The definition of Expressions is being deleted."""
    stamp = "jsonpath={.metadata.deletionTimestamp}"
    return bool(cluster.kubectl("get", "crd", "expressions.cknix.cool", "--ignore-not-found", "-o", stamp))


def no_definition(cluster: Cluster) -> None:
    def gone() -> bool:
        return not cluster.kubectl("get", "crd", "expressions.cknix.cool", "--ignore-not-found")

    cluster.wait("the definition is gone", gone, timeout=60)


def roots(cluster: Cluster) -> list[str]:
    """GC roots of controllers and nodes, on all nodes."""
    return [root for node in cluster.nodes for root in driver.left_on(node).roots]


def use(cluster: Cluster, name: str) -> None:
    """An Expression and a pod that runs it, to its end; the pod is deleted afterwards."""
    cluster.apply(driver.expression(name, driver.demo(f'greet "{name}"')))
    path = driver.built(cluster, name)
    manifest = driver.pod(name, {"expression": name}, "/nix/var/result/bin/hello")
    cluster.apply(manifest)
    assert driver.printed(cluster, name).startswith(f"Hello from {path}")
    cluster.delete(manifest)


def test_a_removal_as_documented_ends_leaves_nothing_and_can_be_followed_by_an_installation(
    reinstalled: Cluster,
) -> None:
    cluster = reinstalled
    use(cluster, "before")
    cluster.apply(driver.expression("broken", "let x = 1; in y"))
    cluster.wait("the broken one fails", lambda: driver.phase(cluster, "broken") == "Failed")
    assert roots(cluster)

    # First what the controller has to release, while it lives; then the rest.
    cluster.kubectl("delete", "-f", str(CRD), "--timeout=50s")
    # The nodes hear of it, and drop the views that they have kept, within a second or two.
    cluster.wait("no root is left", lambda: not roots(cluster), timeout=15)
    cluster.kubectl("delete", "--ignore-not-found", "-f", str(driver.MANIFESTS), "--timeout=100s", timeout=110)

    for node in cluster.nodes:
        assert not driver.left_on(node)
        assert driver.volume_directories(node) == []
    assert cluster.kubectl("get", "--ignore-not-found", "-f", str(driver.MANIFESTS)) == ""

    install(cluster)
    use(cluster, "after")
    cluster.kubectl("delete", "expr", "after")
    driver.assert_nothing_left(cluster)


def test_a_removal_all_at_once_waits_for_the_next_installation_which_releases_everything(reinstalled: Cluster) -> None:
    cluster = reinstalled
    (controller,) = ready(cluster)
    home = driver.node_of(cluster, controller, driver.SYSTEM)
    use(cluster, "forgotten")
    # Else it is a race: the controller loses its rights in the same moment, but may be faster.
    cluster.kubectl("scale", "-n", driver.SYSTEM, "deployment/cknix-controller", "--replicas=0")
    cluster.wait("no controller is there", lambda: not ready(cluster))
    with pytest.raises(CommandFailed):  # kubectl waits for Expressions that nobody releases
        cluster.kubectl("delete", "-f", str(driver.MANIFESTS), "--timeout=15s")
    cluster.wait("the namespace is gone", lambda: not cluster.kubectl("get", "ns", driver.SYSTEM, "--ignore-not-found"))
    assert terminating(cluster)

    # A store is its node's: a controller elsewhere would leave this one to the time after which it is abandoned.
    others = [node.name for node in cluster.nodes if node.name != home.name]
    cluster.kubectl("cordon", *others)
    try:
        install(cluster)
        no_definition(cluster)
        assert roots(cluster) == []
    finally:
        cluster.kubectl("uncordon", *others)
    install(cluster)
    use(cluster, "found")
    cluster.kubectl("delete", "expr", "found")
    driver.assert_nothing_left(cluster)


def ready(cluster: Cluster) -> dict[str, bool]:
    """The controllers by the names of their pods, and whether they take part in the Service."""
    pods = cluster.get("pods", "-n", driver.SYSTEM, "-l", "app.kubernetes.io/component=controller")["items"]
    return {
        pod["metadata"]["name"]: any(
            condition["type"] == "Ready" and condition["status"] == "True"
            for condition in pod["status"].get("conditions", [])
        )
        for pod in pods
    }


def test_a_second_controller_waits_and_takes_over(reinstalled: Cluster) -> None:
    cluster = reinstalled
    (first,) = ready(cluster)
    where = driver.node_of(cluster, first, driver.SYSTEM).name
    # The second is to be on the other node: a node's store is one controller's.
    cluster.kubectl("cordon", where)
    try:
        cluster.kubectl("scale", "-n", driver.SYSTEM, "deployment/cknix-controller", "--replicas=2")
        second = cluster.wait("there are two", lambda: next((name for name in ready(cluster) if name != first), ""))
        waits = "this process waits"
        cluster.wait("the second waits", lambda: waits in cluster.logs(second, driver.SYSTEM, "--tail=-1"))
        use(cluster, "with-two")
        assert ready(cluster) == {first: True, second: False}
        cluster.kubectl("delete", "pod", first, "-n", driver.SYSTEM)
        cluster.wait("the second works", lambda: ready(cluster).get(second), timeout=30)
        use(cluster, "with-the-other")
        assert "Succeeded" in cluster.logs(second, driver.SYSTEM, "--tail=-1")
    finally:
        cluster.kubectl("uncordon", where)
        cluster.kubectl("scale", "-n", driver.SYSTEM, "deployment/cknix-controller", "--replicas=1")
        driver.rolled_out(cluster)
        cluster.kubectl("delete", "expr", "--all", "--ignore-not-found")
    driver.assert_nothing_left(cluster)
