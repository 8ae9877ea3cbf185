"""Pods with volumes, seen from their node: also while no API server, kubelet or container runtime answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cknix_csi.settings import DRIVER_NAME
from tests.cluster import driver
from tests.cluster.harness import Cluster, CommandFailed
from tests.cluster.harness.command import run
from tests.cluster.harness.node import Node

LABELS = {"cknix-chaos": "pod"}
SELECTOR = "cknix-chaos=pod"
RESULT = "/nix/var/result"
HELLO = f"{RESULT}/bin/hello"
#: Ends at once when told to, as a good program does; kubelet then waits for nothing but the volume.
SLEEP = 'trap "exit 0" TERM; sleep 100000 & wait'
#: Prints once and stays, so that what it printed can be read from its node.
SAY = f"{HELLO}; {SLEEP}"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod with one volume at /nix: of the result of *expression*, or an emptyDir where that is empty."""

    name: str
    node: str
    expression: str
    read_only: bool = True
    command: str = SAY
    storage_class: str = ""
    """Of a claim that comes and goes with the pod; none where this is empty."""

    def object(self) -> dict[str, Any]:
        """As the API takes it.  Without a token of the API server, which kubelet would have to ask for."""
        container = {
            "name": "main",
            "image": driver.IMAGE,
            "command": ["sh", "-c", self.command],
            "volumeMounts": [{"name": "nix", "mountPath": "/nix"}],
        }
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "namespace": "default", "labels": LABELS},
            "spec": {
                "nodeName": self.node,
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "terminationGracePeriodSeconds": 2,
                "containers": [container],
                "volumes": [{"name": "nix", **self._volume()}],
            },
        }

    def _volume(self) -> dict[str, Any]:
        if not self.expression:
            return {"emptyDir": {}}
        attributes = {"expression": self.expression}
        if not self.storage_class:
            return {"csi": {"driver": DRIVER_NAME, "readOnly": self.read_only, "volumeAttributes": attributes}}
        template = {
            "metadata": {"annotations": {f"cknix.cool/{name}": value for name, value in attributes.items()}},
            "spec": {
                "storageClassName": self.storage_class,
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "1Gi"}},
            },
        }
        return {"ephemeral": {"volumeClaimTemplate": template}}

    def manifest(self) -> str:
        """JSON."""
        return json.dumps(self.object())


def create(cluster: Cluster, pods: Sequence[Pod]) -> None:
    """One request after the other; returns when the API server has them all."""
    items = {"apiVersion": "v1", "kind": "List", "items": [pod.object() for pod in pods]}
    cluster.kubectl("create", "--filename", "-", stdin=json.dumps(items))


def running(cluster: Cluster, pods: Sequence[Pod], timeout: float = 60) -> None:
    """Wait until every container of *pods* runs."""
    names = {pod.name for pod in pods}

    def missing() -> set[str]:
        template = (
            '{range .items[*]}{.metadata.name} {.status.containerStatuses[*].state.running.startedAt}{"\\n"}{end}'
        )
        listed = cluster.kubectl("get", "pods", "-l", SELECTOR, "-o", f"jsonpath={template}").splitlines()
        return names - {fields[0] for line in listed if len(fields := line.split()) == 2}

    cluster.wait(f"{', '.join(sorted(names))[:200]}: they run", lambda: not missing(), timeout)


def delete(cluster: Cluster, pods: Sequence[Pod], timeout: float = 60, *, wait: bool = True) -> None:
    """Delete *pods*; returns when kubelet has taken their volumes away, unless it is not to *wait*."""
    names = [pod.name for pod in pods]
    if names:
        until = f"--wait={str(wait).lower()}"
        cluster.kubectl("delete", "pod", "--ignore-not-found", until, *names, timeout=timeout)


def printed(node: Node, name: str) -> str:
    """What the containers of a pod have printed, as containerd has written it: each line behind time and stream."""
    logs = node.path("/var/log/pods").glob(f"default_{name}_*/main/*.log")
    return "".join(log.read_text() for log in sorted(logs))


def said(cluster: Cluster, pods: Sequence[Pod], words: str, timeout: float = 30) -> None:
    """Wait until each of *pods* has printed a line that begins with *words*."""
    for pod in pods:
        node = cluster.node(pod.node)
        cluster.wait(f"{pod.name} says {words!r}", lambda: f" F {words}" in printed(node, pod.name), timeout)  # noqa: B023


def main_process(node: Node, uid: str) -> int:
    """The first process of the only container of a pod; raises `CommandFailed` while there is none."""
    first: dict[int, int] = {}
    """Processes that are the first of their PID namespace, and how deep that is: a sandbox of Nix is one level more."""
    for pid in node.pod_processes(uid):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue  # it has ended
        ids = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
        if ids[-1] == "1" and command != b"/pause":
            first[pid] = len(ids)
    if first:
        return min(first, key=first.__getitem__)
    raise CommandFailed(["main process of the pod", uid, "on", node.name], "there is none", "")


def in_container(pid: int, *argv: str, timeout: float = 30) -> str:
    """What a command prints that runs among the files of the container of process *pid*; no Kubernetes takes part."""
    return run(
        ["nsenter", "--target", str(pid), "--mount", "--root", "--", "/bin/busybox", *argv],
        env={"PATH": "/bin"},
        timeout=timeout,
    )


def uids(cluster: Cluster, *names: str, namespace: str = "default") -> dict[str, str]:
    """The uids of pods, by name."""
    template = 'jsonpath={range .items[*]}{.metadata.name} {.metadata.uid}{"\\n"}{end}'
    found = dict(line.split() for line in cluster.kubectl("get", "pods", "-n", namespace, "-o", template).splitlines())
    return {name: found[name] for name in names}
