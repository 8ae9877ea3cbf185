"""The main job, with the manifests as they are: from `kubectl apply` to a program run from /nix and back to nothing."""

from __future__ import annotations

import re

from tests.cluster import driver
from tests.cluster.harness import Cluster


def test_the_examples_of_the_readme_work_and_leave_nothing(installed: Cluster) -> None:
    cluster = installed
    cluster.apply(driver.EXAMPLES / "expression.yaml")
    cluster.apply(driver.EXAMPLES / "pod.yaml")
    path = driver.built(cluster, "hello")
    assert driver.printed(cluster, "hello").startswith(f"Hello from {path}")

    shown = cluster.kubectl("get", "expr")
    assert re.search(r"NAME +PHASE +RESULT +AGE\nhello +Succeeded +/nix/store/\S+-hello +\d+s", shown)
    cluster.kubectl("wait", "--for=condition=Ready", "expr/hello", "--timeout=1s")

    cluster.apply(driver.EXAMPLES / "ubuntu.yaml")
    driver.running(cluster, "ubuntu")
    assert driver.in_pod(cluster, "ubuntu", "hello").startswith(f"Hello from {path}")

    cluster.apply(driver.EXAMPLES / "pv.yaml")
    # A scheduler that saw the claim before its volume takes its time to look again.
    assert driver.printed(cluster, "hello-pv", timeout=150).startswith(f"Hello from {path}")

    for example in ("pv.yaml", "ubuntu.yaml", "pod.yaml", "expression.yaml"):
        cluster.delete(driver.EXAMPLES / example)
    driver.assert_nothing_left(cluster)


def test_pods_on_both_nodes_read_and_write_inline_and_through_a_claim(installed: Cluster) -> None:
    cluster = installed
    cluster.apply(driver.EXAMPLES / "expression.yaml")
    path = driver.built(cluster, "hello")
    cluster.apply(driver.EXAMPLES / "pv.yaml")
    pods = []
    for node in cluster.nodes:
        for name, read_only in (("ro", True), ("rw", False)):
            pods.append(
                driver.pod(f"{name}-{node.index}", {"expression": "hello"}, node=node.name, read_only=read_only)
            )
        pods.append(driver.claim_pod(f"pvc-{node.index}", "hello", node=node.name))
    text = "".join(pods)
    cluster.apply(text)
    for node in cluster.nodes:
        for name in ("ro", "rw", "pvc"):
            pod = f"{name}-{node.index}"
            driver.running(cluster, pod)
            assert driver.in_pod(cluster, pod, "/nix/var/result/bin/hello").startswith(f"Hello from {path}")
            listed = driver.in_pod(cluster, pod, "ls", "/nix/store").split()
            assert {f"/nix/store/{name}" for name in listed} == driver.closure(cluster, node, path)
            assert driver.in_pod(cluster, pod, "ls", "/nix/var/nix/db").split() == ["db.sqlite", "schema"]

    for node in cluster.nodes:
        refused = cluster.kubectl("exec", f"ro-{node.index}", "--", "sh", "-c", "touch /nix/store/x 2>&1 || true")
        assert "Read-only file system" in refused
        driver.in_pod(cluster, f"rw-{node.index}", "sh", "-c", "echo mine > /nix/store/x && rm -r /nix/var/result/bin")
    for node in cluster.nodes:
        assert "x" not in driver.in_pod(cluster, f"ro-{node.index}", "ls", "/nix/store").split()
        assert not (node.path("/var/lib/cknix/nix/store") / "x").exists()

        assert driver.in_pod(cluster, f"ro-{node.index}", "/nix/var/result/bin/hello").startswith("Hello")

    # Both nodes have it from the cache: signed by the key that the ConfigMap publishes.
    key = cluster.kubectl("get", "configmap", "cknix-cache", "-n", driver.SYSTEM, "-o", "jsonpath={.data.publicKey}")
    for node in cluster.nodes:
        assert key.split(":")[0] in {signature.split(":")[0] for signature in driver.signatures(cluster, node, path)}

    cluster.delete(text)
    cluster.delete(driver.EXAMPLES / "pv.yaml")
    cluster.delete(driver.EXAMPLES / "expression.yaml")
    driver.assert_nothing_left(cluster)
