"""The driver's own pods, as processes on their nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.chaos.workload import main_process
from tests.cluster import driver
from tests.cluster.harness import Cluster, CommandFailed
from tests.cluster.harness.node import Node

DAEMON, CONTROLLER, PROVISIONER = "node", "controller", "provisioner"
#: What runs in the pods of the driver's namespace, by a word of its command line.
PROGRAMS = ("cknix-csi", "/pause", "csi-provisioner", "relay.py")


@dataclass(frozen=True, slots=True)
class Part:
    """A pod of the driver's namespace."""

    name: str
    uid: str
    node: Node
    component: str


def parts(cluster: Cluster) -> list[Part]:
    """All pods of the driver's namespace that have a node."""
    return [
        Part(
            name=pod["metadata"]["name"],
            uid=pod["metadata"]["uid"],
            node=cluster.node(pod["spec"]["nodeName"]),
            component=pod["metadata"].get("labels", {}).get("app.kubernetes.io/component", ""),
        )
        for pod in cluster.get("pods", "-n", driver.SYSTEM)["items"]
        if "nodeName" in pod["spec"]
    ]


def process(found: list[Part], component: str, node: Node | None = None) -> int:
    """The first process of a *component* (on *node*) among *found*; raises `CommandFailed` while it has none."""
    for part in found:
        if part.component == component and node in {None, part.node}:
            return main_process(part.node, part.uid)
    raise CommandFailed(["pod of the", component, "on", node.name if node else "any node"], "there is none", "")


def helpers(found: list[Part], node: Node) -> list[str]:
    """Processes of the parts on *node* besides the programs themselves, Nix for example."""
    extra = []
    for part in found:
        for pid in part.node.pod_processes(part.uid) if part.node is node else ():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has ended
            if not any(program in command for program in PROGRAMS):
                extra.append(f"{pid} of {part.name}: {command or 'a zombie'}")
    return extra
