"""Claims of a StorageClass, with upstream's external-provisioner: from a claim to a volume, and back to nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import driver
from tests.cluster.harness import Cluster

SYSTEM = "jsonpath={.metadata.labels.cknix\\.cool/system}"


@pytest.fixture
def classes(installed: Cluster) -> Iterator[Cluster]:
    """The cluster with the classes of yaml/test; afterwards nothing may be left of any claim."""
    installed.apply(driver.EXAMPLES / "storageclass.yaml")
    yield installed
    assert installed.get("pvc")["items"] == []
    installed.wait("no volume is left", lambda: not volumes(installed) and not records(installed), timeout=60)
    installed.delete(driver.EXAMPLES / "storageclass.yaml")


def volumes(cluster: Cluster) -> list[str]:
    """PersistentVolumes that were made for claims."""
    listed = cluster.get("pv")["items"]
    made = "pv.kubernetes.io/provisioned-by"
    return [item["metadata"]["name"] for item in listed if made in (item["metadata"].get("annotations") or {})]


def records(cluster: Cluster) -> list[str]:
    return cluster.kubectl(
        *("get", "configmap", "-n", "cknix-volumes", "-l", "cknix.cool/volume", "-o", "name"),
    ).split()


def test_claims_of_the_examples_become_volumes_and_go_with_them(classes: Cluster) -> None:
    cluster = classes
    examples = [driver.EXAMPLES / name for name in ("expression.yaml", "pvc.yaml", "ephemeral.yaml")]
    # In no order that helps: the claims are there before their Expression.
    for example in reversed(examples):
        cluster.apply(example)
    path = driver.built(cluster, "hello")
    for pod in ("hello-claim", "hello-ephemeral"):
        assert driver.printed(cluster, pod).startswith(f"Hello from {path}")
    assert len(volumes(cluster)) == len(records(cluster)) == 2

    # The claim of a generic ephemeral volume belongs to its pod.
    for example in examples:
        cluster.delete(example)
    cluster.wait("the pod's claim is gone", lambda: cluster.get("pvc")["items"] == [], timeout=60)
    driver.assert_nothing_left(cluster)


def test_two_pods_on_one_claim_each_get_the_latest_result(classes: Cluster, applied: driver.Apply) -> None:
    cluster = classes
    applied(driver.expression("shared", driver.demo('greet "first"')))
    first = driver.built(cluster, "shared")
    # What the claim says comes before what the class says.
    applied(driver.claim("shared", "cknix-hello", expression="shared"))
    applied(driver.claim_pod("old", "shared", node="node-0", read_only=False))
    driver.running(cluster, "old")

    cluster.apply(driver.expression("shared", driver.demo('greet "second"')))
    second = cluster.wait(
        "the result changes", lambda: (path := driver.result(cluster, "shared")) != first and path, timeout=60
    )
    for number, node in enumerate(cluster.nodes):
        applied(driver.claim_pod(f"new-{number}", "shared", node=node.name, read_only=False))
    for number in range(len(cluster.nodes)):
        driver.running(cluster, f"new-{number}")
        assert driver.in_pod(cluster, f"new-{number}", "readlink", "/nix/var/result").strip() == second
    assert driver.in_pod(cluster, "old", "readlink", "/nix/var/result").strip() == first

    # ReadWriteMany: everyone may write, each for itself.
    driver.in_pod(cluster, "old", "touch", "/nix/mine")
    assert "mine" not in driver.in_pod(cluster, "new-0", "ls", "/nix").split()


def test_volumes_are_for_nodes_of_the_systems_of_their_content(classes: Cluster, applied: driver.Apply) -> None:
    cluster = classes
    systems = {cluster.kubectl("get", "node", node.name, "-o", SYSTEM) for node in cluster.nodes}
    assert len(systems) == 1
    here = systems.pop()
    other = "riscv64-linux"
    assert here.endswith("-linux")
    assert here != other
    applied(driver.expression("here", driver.demo("hello")))
    driver.built(cluster, "here")
    applied(driver.claim("here", "cknix", expression="here"))
    applied(driver.claim_pod("here", "here", "/nix/var/result/bin/hello"))
    driver.printed(cluster, "here")
    (volume,) = volumes(cluster)
    affinity = cluster.get("pv", volume)["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    assert affinity == [{"matchExpressions": [{"key": "cknix.cool/system", "operator": "In", "values": [here]}]}]

    applied(foreign_class(other))
    applied(driver.claim("foreign", "foreign"))
    said = cluster.wait(
        "the claim's Events say why",
        lambda: (
            text if "ProvisioningFailed" in (text := driver.events(cluster, "foreign", "PersistentVolumeClaim")) else ""
        ),
        timeout=60,
    )
    assert f"the volume can run on {other} only, and the nodes that are allowed for it are {here}" in said


def foreign_class(system: str) -> str:
    return f"""\
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: foreign}}
provisioner: csi.cknix.cool
parameters:
  {system}: /nix/store/{"0" * 32}-foreign
"""
