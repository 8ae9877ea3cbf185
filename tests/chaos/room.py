"""The cluster that scenarios share, installed as a user installs it, and replaced by a new one when need be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.chaos import cache
from tests.chaos.leaks import DATA_ROOT
from tests.cluster import driver
from tests.cluster.harness import Cluster

DISK = {DATA_ROOT: 1024}
STATIC_PODS = "/var/lib/kubelet/static"
KUBELET = {
    "maxPods": 250,
    "staticPodPath": STATIC_PODS,
    # Only a static pod can be new while no API server answers; later kubelets let none have a CSI volume.
    "featureGates": {"KubeletCrashLoopBackOffMax": True, "PreventStaticPodAPIReferences": False},
    # What is killed often is started again at once: no scenario waits for kubelet's patience.
    "crashLoopBackOff": {"maxContainerRestartPeriod": "1s"},
}


class Room:
    """At most one cluster at a time, made when it is wanted."""

    def __init__(self, images: Sequence[Path]) -> None:
        self._images = images
        self._cluster: Cluster | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def cluster(self) -> Cluster:
        """The cluster, with cknix on it."""
        if self._cluster is None:
            self._cluster = Cluster(nodes=2, images=self._images, disks=DISK, kubelet=KUBELET)
            self._cluster.start()
            install(self._cluster)
        return self._cluster

    def abandon(self) -> None:
        """Take the cluster down; the next one is new."""
        if self._cluster is not None:
            self._cluster.stop()
            self._cluster = None


def install(cluster: Cluster) -> None:
    """Apply the manifests as they are; the controller is held on the first node, which is never rebooted."""
    for node in cluster.nodes:
        node.path(STATIC_PODS).mkdir()
    cluster.kubectl("apply", "-f", str(driver.MANIFESTS))
    place = {"spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": cluster.nodes[0].name}}}}}
    cluster.kubectl(
        *("patch", "deployment", "cknix-controller", "-n", driver.SYSTEM, "--type=strategic"),
        *("-p", json.dumps(place)),
    )
    cache.install(cluster)
    driver.rolled_out(cluster)
    cache.ready(cluster)
