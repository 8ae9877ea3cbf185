"""What the driver's own cluster tests say over and over: objects as text, and what is on a node."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cknix_csi.kube.api import core, expressions
from tests.cluster.harness import Cluster, WaitTimeout
from tests.cluster.harness.command import CommandFailed
from tests.cluster.harness.node import Node
from tests.cluster.image.build import PROJECT

MANIFESTS = PROJECT / "yaml"
EXAMPLES = MANIFESTS / "test"
SYSTEM = "cknix-system"
IMAGE = "busybox:1.37"
NODE_STORE = "local?root=/var/lib/cknix"
ABANDONED = ".abandoned"
"""In the data root of a controller that has moved to another node."""

Apply = Callable[[str], None]
"""What the fixture `applied` gives a test."""


def expression(name: str, text: str, *, kind: str = "expr") -> str:
    """An Expression in the default namespace."""
    body = textwrap.indent(text, " " * 6)
    return f"""\
---
apiVersion: cknix.cool/v1
kind: Expression
metadata: {{name: {name}}}
spec:
  data:
    {kind}: |-
{body}
"""


def demo(attribute: str) -> str:
    """The expression of a package of the demo set."""
    return f"(import <cknix-demo> {{}}).{attribute}"


def pod(
    name: str,
    attributes: dict[str, str],
    command: str = "sleep infinity",
    *,
    node: str | None = None,
    read_only: bool = True,
    host_users: bool = True,
    privileged: bool = False,
) -> str:
    """A pod with an inline volume at /nix that runs *command* in a shell of its image."""
    pairs = "".join(f'\n        {key}: "{value}"' for key, value in attributes.items())
    volume = f"""\
  - name: nix
    csi:
      driver: csi.cknix.cool
      readOnly: {str(read_only).lower()}
      volumeAttributes:{pairs or " {}"}"""
    return _pod(name, volume, command, node, host_users=host_users, privileged=privileged)


def claim_pod(
    name: str, claim: str, command: str = "sleep infinity", *, node: str | None = None, read_only: bool = True
) -> str:
    """A pod with a PersistentVolumeClaim at /nix."""
    volume = f"""\
  - name: nix
    persistentVolumeClaim: {{claimName: {claim}, readOnly: {str(read_only).lower()}}}"""
    return _pod(name, volume, command, node)


def claim(name: str, storage_class: str, mode: str = "ReadWriteMany", *, expression: str = "") -> str:
    """A PersistentVolumeClaim, which may choose its Expression itself."""
    chosen = f"\n  annotations: {{cknix.cool/expression: {expression}}}" if expression else ""
    return f"""\
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {name}{chosen}
spec:
  storageClassName: {storage_class}
  accessModes: [{mode}]
  resources: {{requests: {{storage: 1Gi}}}}
"""


def _pod(
    name: str, volume: str, command: str, node: str | None, *, host_users: bool = True, privileged: bool = False
) -> str:
    placed = f"\n  nodeName: {node}" if node else ""
    users = "" if host_users else "\n  hostUsers: false"
    return f"""\
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:{placed}{users}
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: {IMAGE}
    command: [sh, -c, '{command}']
    securityContext: {{privileged: {str(privileged).lower()}}}
    volumeMounts: [{{name: nix, mountPath: /nix}}]
  volumes:
{volume}
"""


def status(cluster: Cluster, name: str) -> dict[str, Any]:
    """The status of an Expression, as far as it has one."""
    found: dict[str, Any] = cluster.read(expressions("default", name)).get("status", {})
    return found


def phase(cluster: Cluster, name: str) -> str:
    """Phase of an Expression."""
    return str(status(cluster, name).get("phase", ""))


def result(cluster: Cluster, name: str) -> str:
    """Result of an Expression."""
    return str(status(cluster, name).get("result", ""))


def built(cluster: Cluster, name: str, timeout: float = 60) -> str:
    """The result of an Expression, once it has succeeded."""
    cluster.wait(f"Expression {name} succeeds", lambda: phase(cluster, name) == "Succeeded", timeout)
    return result(cluster, name)


def running(cluster: Cluster, name: str, timeout: float = 60) -> None:
    cluster.wait(f"pod {name} runs", lambda: cluster.phase(name) == "Running", timeout)


def printed(cluster: Cluster, name: str, timeout: float = 60) -> str:
    """What a pod printed, which is something, once it has succeeded: its log may be whole a moment later."""
    cluster.wait(f"pod {name} succeeds", lambda: cluster.phase(name) == "Succeeded", timeout)
    return cluster.wait(f"what pod {name} printed can be read", lambda: cluster.logs(name))


def in_pod(cluster: Cluster, name: str, *argv: str) -> str:
    return cluster.kubectl("exec", name, "--", *argv)


def events(cluster: Cluster, name: str, kind: str = "Pod") -> str:
    """Reasons and messages of an object's Events, a line each."""
    selector = quote(f"involvedObject.name={name},involvedObject.kind={kind}")
    found = cluster.read(f"{core('events', 'default')}?fieldSelector={selector}")["items"]
    return "".join(f"{event['reason']}: {event.get('message', '')}\n" for event in found)


def node_of(cluster: Cluster, pod_name: str, namespace: str = "default") -> Node:
    return cluster.node(cluster.read(core("pods", namespace, pod_name))["spec"]["nodeName"])


def controller_pod(cluster: Cluster) -> str:
    return _pod_of(cluster, "controller")


def daemon_pod(cluster: Cluster, node: Node) -> str:
    """The node daemon's pod on *node*."""
    return _pod_of(cluster, "node", node.name)


def _pod_of(cluster: Cluster, component: str, node: str | None = None) -> str:
    """The name of a pod of ours, on *node* if one is given; raises CommandFailed while there is none."""
    path = f"{core('pods', SYSTEM)}?labelSelector={quote(f'app.kubernetes.io/component={component}')}"
    for pod in cluster.read(path)["items"]:
        if node in {None, pod["spec"].get("nodeName")}:
            return str(pod["metadata"]["name"])
    raise CommandFailed(["GET", path], "no such pod", "")


def on_daemon(cluster: Cluster, node: Node, *argv: str) -> str:
    """What a command in the node daemon's container prints."""
    return cluster.kubectl("exec", "-n", SYSTEM, daemon_pod(cluster, node), "--", *argv)


def closure(cluster: Cluster, node: Node, path: str) -> set[str]:
    """The closure of *path*, as Nix on *node* says."""
    return set(on_daemon(cluster, node, "nix-store", "--store", NODE_STORE, "-qR", path).split())


def signatures(cluster: Cluster, node: Node, path: str) -> list[str]:
    """Signatures of *path* in the store of *node*, as Nix says."""
    nix = ("nix", "--extra-experimental-features", "nix-command", "--store", NODE_STORE)
    return on_daemon(cluster, node, *nix, "path-info", "--sigs", path).split()[1:]


def rolled_out(cluster: Cluster) -> None:
    """All workloads run what their templates say, and are ready."""
    for workload in ("daemonset/cknix-node", "deployment/cknix-controller", "deployment/cknix-provisioner"):
        cluster.kubectl("rollout", "status", workload, "-n", SYSTEM, "--timeout=90s", timeout=100)


@dataclass(frozen=True, slots=True)
class Left:
    """What of volumes and Expressions can be found on a node."""

    mounts: tuple[str, ...]
    directories: tuple[str, ...]
    roots: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.mounts or self.directories or self.roots)


def left_on(node: Node) -> Left:
    """Mounts of ours, the directories of views, farms, volumes and trash, and GC roots of both roles, on *node* now.

    The store of a controller that has moved to another node is kept with its roots, on purpose.
    """
    mounts = tuple(line.split(" ")[4] for line in node.mountinfo().splitlines() if " cknix:" in line)
    data = node.inside("/var/lib/cknix")
    directories = [path for name in ("views", "farms", "volumes", "trash") for path in _below(data / name)]
    roots = [
        path
        for store in (data, data / "controller")
        if not (store / ABANDONED).exists()
        for path in (store / "nix/var/nix/gcroots/cknix").rglob("*")
        if path.is_symlink()
    ]
    return Left(mounts, tuple(map(str, directories)), tuple(map(str, roots)))


def volume_directories(node: Node) -> list[str]:
    """kubelet's directories of volumes of our driver on *node*."""
    pods = node.path("/var/lib/kubelet/pods")
    return sorted(str(path) for path in pods.glob("*/volumes/kubernetes.io~csi/*"))


def _below(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def assert_nothing_left(cluster: Cluster) -> None:
    """No Expression, mount, directory or GC root is left on any node."""

    found: list[object] = []

    def clean() -> bool:
        found[:] = [thing for node in cluster.nodes for thing in (left_on(node), volume_directories(node)) if thing]
        return not found

    try:
        cluster.wait("nothing is left on any node", clean, timeout=30)
    except WaitTimeout as error:
        raise AssertionError(f"left: {found}\n{error}") from None
    assert cluster.read(expressions())["items"] == []
