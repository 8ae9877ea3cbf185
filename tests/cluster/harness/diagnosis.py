"""What there is to see of a cluster in which something did not happen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .command import CommandFailed

if TYPE_CHECKING:
    from .cluster import Cluster
    from .node import Node

LOG_LINES = 25
EVENT_LINES = 40
INTERESTING_MOUNTS = ("/var/lib/kubelet", "/var/lib/cknix")


def describe(cluster: Cluster) -> str:
    """Pods and events, logs of pods that are not well, logs and mounts of the nodes; never raises."""
    sections = [
        section("nodes", kubectl(cluster, "get", "nodes", "--output", "wide")),
        section("pods", kubectl(cluster, "get", "pods", "--all-namespaces", "--output", "wide")),
        section("events", tail(kubectl(cluster, "events", "--all-namespaces"), EVENT_LINES)),
        *(text for pod in unwell(cluster) for text in about_pod(cluster, *pod)),
        *(text for node in cluster.nodes for text in about_node(node)),
    ]
    return "\n".join(sections)


def kubectl(cluster: Cluster, *args: str) -> str:
    """What kubectl says, be it an error."""
    try:
        return cluster.kubectl("--request-timeout", "10s", *args)
    except (CommandFailed, AssertionError) as failed:
        return str(failed)


def unwell(cluster: Cluster) -> list[tuple[str, str]]:
    """Namespace and name of every pod that is not ready and has not succeeded."""
    template = '{range .items[*]}{.metadata.namespace} {.metadata.name} {.status.phase} {%s}{"\\n"}{end}'
    states = template % '.status.conditions[?(@.type=="Ready")].status'
    lines = kubectl(cluster, "get", "pods", "--all-namespaces", "--output", f"jsonpath={states}").splitlines()
    pods = [line.split() for line in lines]
    return [(pod[0], pod[1]) for pod in pods if len(pod) > 2 and pod[2] != "Succeeded" and pod[-1] != "True"]


def about_pod(cluster: Cluster, namespace: str, name: str) -> list[str]:
    """Description and logs of one pod."""
    target = (name, "--namespace", namespace)
    everything = ("--all-containers", "--prefix", "--tail", str(LOG_LINES))
    return [
        section(f"describe pod {namespace}/{name}", kubectl(cluster, "describe", "pod", *target)),
        section(f"logs of pod {namespace}/{name}", kubectl(cluster, "logs", *target, *everything)),
    ]


def about_node(node: Node) -> list[str]:
    """Logs of a node's programs, and its mounts that have to do with pods."""
    sections = []
    for program in node.programs:
        status = node.process(program).status
        state = "running" if status is None else f"ended with status {status}"
        sections.append(section(f"{program} on {node.name} ({state})", tail(read(node.log(program)), LOG_LINES)))
    try:
        mounts = [line for line in node.mountinfo().splitlines() if any(path in line for path in INTERESTING_MOUNTS)]
    except (OSError, AssertionError) as failed:
        mounts = [str(failed)]
    return [*sections, section(f"mounts on {node.name}", "\n".join(mounts))]


def read(path: Path) -> str:
    """A log, or why there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError as failed:
        return str(failed)


def tail(text: str, lines: int) -> str:
    """The last *lines* lines."""
    return "\n".join(text.splitlines()[-lines:])


def section(title: str, text: str) -> str:
    """A part of the report under its title."""
    return f"--- {title}\n{text.rstrip()}"
