"""The Nix systems of the cluster's nodes: what an Expression without ``systems`` is built for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cknix_csi.api.systems import KNOWN_SYSTEMS, system_of_machine
from cknix_csi.kube.api import Api, core, list_all

# Set by every kubelet on its node (Kubernetes, "Well-Known Labels").
ARCH_LABEL = "kubernetes.io/arch"
OS_LABEL = "kubernetes.io/os"
FRESH_SECONDS = 60.0


class ClusterSystems:
    """Asks the API server at most once a minute."""

    def __init__(self, api: Api, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._lock = asyncio.Lock()
        self._asked: float | None = None
        self._systems: tuple[str, ...] = ()

    async def systems(self) -> tuple[str, ...]:
        """In the order of ``KNOWN_SYSTEMS``; empty when the cluster has no (Linux) node.  Raises ``ApiError``."""
        async with self._lock:
            if self._asked is None or self._clock() - self._asked >= FRESH_SECONDS:
                nodes = await list_all(self._api, core("nodes"), metadata_only=True)
                self._systems = systems_of(nodes.items)
                self._asked = self._clock()
            return self._systems


def systems_of(nodes: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The systems of *nodes* (objects, or only their metadata); nodes of other kinds are left out."""
    found = set()
    for node in nodes:
        labels = (node.get("metadata") or {}).get("labels") or {}
        if labels.get(OS_LABEL, "linux") == "linux":
            found.add(system_of_machine(str(labels.get(ARCH_LABEL))))
    return tuple(system for system in KNOWN_SYSTEMS if system in found)
