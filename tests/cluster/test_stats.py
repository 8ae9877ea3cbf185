"""What kubelet tells of volumes, by what the driver tells kubelet."""

from __future__ import annotations

from typing import Any

from tests.cluster import driver
from tests.cluster.harness import Cluster
from tests.cluster.harness.node import Node


def volumes(cluster: Cluster, node: Node) -> dict[str, dict[str, Any]]:
    """The statistics of the volumes "nix" on *node*, by pod."""
    summary = cluster.read(f"/api/v1/nodes/{node.name}/proxy/stats/summary")
    return {
        pod["podRef"]["name"]: volume
        for pod in summary["pods"]
        for volume in pod.get("volume", [])
        if volume["name"] == "nix"
    }


def closure_size(cluster: Cluster, node: Node, path: str) -> int:
    """What Nix on *node* says."""
    nix = ("nix", "--extra-experimental-features", "nix-command", "--store", driver.NODE_STORE)
    return int(driver.on_daemon(cluster, node, *nix, "path-info", "--closure-size", path).split()[1])


def test_kubelets_summary_shows_what_volumes_use(installed: Cluster, applied: driver.Apply) -> None:
    cluster, node = installed, installed.nodes[1]
    applied(driver.expression("measured", driver.demo("hello")))
    path = driver.built(cluster, "measured")
    attributes = {"expression": "measured"}
    write = "head -c 5000000 /dev/urandom > /nix/store/new; sync; sleep infinity"
    applied(
        driver.pod("ro", attributes, node=node.name)
        + driver.pod("rw", attributes, write, node=node.name, read_only=False)
        + driver.pod("limited", {**attributes, "sizeLimit": "64Mi"}, write, node=node.name, read_only=False)
    )
    for name in ("ro", "rw", "limited"):
        driver.running(cluster, name)
    found: dict[str, dict[str, Any]] = {}

    def told() -> bool:
        found.update(volumes(cluster, node))
        return "ro" in found and all(found.get(name, {}).get("usedBytes", 0) > 5_000_000 for name in ("rw", "limited"))

    # A size is counted anew after a minute: the first one may be from before the write.
    cluster.wait("kubelet tells what the volumes use", told, timeout=150)
    size = closure_size(cluster, node, path)
    assert [found["ro"][key] for key in ("usedBytes", "capacityBytes", "availableBytes")] == [size, size, 0]
    assert found["rw"]["usedBytes"] < 6_000_000
    assert 0 < found["rw"]["inodesUsed"] < 100
    assert found["rw"]["availableBytes"] < found["rw"]["capacityBytes"]
    assert 64 << 20 <= found["limited"]["capacityBytes"] < 70 << 20
    assert found["limited"]["availableBytes"] < (65 << 20) - 5_000_000
