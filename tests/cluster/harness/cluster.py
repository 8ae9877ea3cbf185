"""A real Kubernetes on this machine, for tests: made in seconds, taken down without a trace.

    with Cluster(nodes=2) as cluster:
        cluster.apply("...")
        cluster.wait("the pod runs", lambda: cluster.phase("hello") == "Running")
        cluster.node(0).exec(["findmnt", "/var/lib/cknix"])

A node is a set of namespaces (see `node`), so nothing of the machine's own is changed: its mounts, networks, process
list and /var/lib stay as they are.  What is not in a namespace, one scratch directory and the control groups of its
name, is removed by `stop`, or by the next start if the test run was killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from . import controlplane, network
from .command import Argument, run
from .components import GO_SETTINGS, KUBERNETES, build_components, program_path
from .credentials import ADMIN, Credentials
from .diagnosis import describe
from .imagestore import furnish, imported
from .node import Node
from .reading import Reader
from .scratch import Scratch
from .waiting import wait

T = TypeVar("T")


class Cluster:
    """A cluster of *nodes* nodes, with *images* (docker-archives) on each of them."""

    def __init__(
        self,
        nodes: int = 2,
        images: Sequence[Path] = (),
        scratch: Path | None = None,
        *,
        disks: Mapping[str, int] | None = None,
        kubelet: Mapping[str, object] | None = None,
    ) -> None:
        """*disks* and *kubelet* are for every node: see `Node`."""
        self._scratch = Scratch(scratch)
        self._images = images
        self._credentials: Credentials | None = None
        self._reader: Reader | None = None
        self.nodes = [
            Node(self._scratch.name, index, self._scratch.directory, disks=disks, kubelet=kubelet)
            for index in range(nodes)
        ]

    @property
    def name(self) -> str:
        """Unique on this machine; prefix of everything that the cluster owns."""
        return self._scratch.name

    @property
    def directory(self) -> Path:
        """Everything that the cluster writes, its logs among it."""
        return self._scratch.directory

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig: for use within the first node's network."""
        assert self._credentials is not None, "the cluster is not running"
        return self._credentials.kubeconfig(ADMIN)

    def node(self, which: int | str) -> Node:
        """A node by its number or its name."""
        return next(node for node in self.nodes if which in {node.index, node.name})

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Bring the cluster up; returns when its nodes are Ready and pods can be made.  Cleans up after a failure."""
        build_components()
        store = imported(self._images) if self._images else None
        try:
            self._scratch.create()
            self._start(store)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Take everything down; returns when nothing is left.  May be called at any time, and twice."""
        if self._reader is not None:
            self._reader.close()
        try:
            each(self.nodes, Node.halt)
        finally:
            self._scratch.remove()

    def reboot(self, node: Node, *, meanwhile: Callable[[], object] = lambda: None) -> None:
        """End everything that runs on *node*, and start it again; *meanwhile* is called while it is off.

        Not the first one, on which the cluster's own programs are.  What it has on disk stays.  Returns when its
        programs are started.
        """
        assert node is not self.nodes[0], "the API server would be gone too"
        assert self._credentials is not None, "the cluster is not running"
        node.halt()
        network.part(self.nodes[0].machine, node.index)
        meanwhile()
        node.boot()
        network.join([other.machine for other in self.nodes], node.index)
        node.start_runtime()
        node.start_agents(self._credentials)

    def kubectl(self, *args: str, stdin: str | None = None, timeout: float = 60) -> str:
        """Run kubectl as administrator and return what it printed; raises `CommandFailed`."""
        kubectl = self.network_command([KUBERNETES.programs / "kubectl", *args])
        return run(kubectl, stdin=stdin, env=self.environment(), timeout=timeout)

    def environment(self) -> dict[str, str]:
        """What a program in the first node's network needs to talk to the cluster."""
        return {
            "KUBECONFIG": str(self.kubeconfig),
            "KUBECACHEDIR": str(self.directory / "kubectl-cache"),
            "PATH": program_path(),
            **GO_SETTINGS,
            "NO_PROXY": "*",
            "no_proxy": "*",
        }

    def network_command(self, argv: Sequence[Argument]) -> list[Argument]:
        """*argv* as a command of this machine in the first node's network, where the API server and services are."""
        return self.nodes[0].machine.network_command(argv)

    def read(self, path: str) -> Any:
        """What is at *path* of the API, parsed; as administrator, and many times cheaper than `kubectl`."""
        return json.loads(self._answer(path))

    def get(self, *args: str) -> Any:
        """`kubectl get … --output json`, parsed."""
        return json.loads(self.kubectl("get", *args, "--output", "json"))

    def apply(self, manifest: str | Path) -> None:
        """`kubectl apply` of YAML text, or of a file or directory."""
        if isinstance(manifest, Path):
            self.kubectl("apply", "--filename", str(manifest))
        else:
            self.kubectl("apply", "--filename", "-", stdin=manifest)

    def delete(self, manifest: str | Path) -> None:
        """`kubectl delete` of what `apply` made; returns when it is gone."""
        if isinstance(manifest, Path):
            self.kubectl("delete", "--ignore-not-found", "--filename", str(manifest), timeout=120)
        else:
            self.kubectl("delete", "--ignore-not-found", "--filename", "-", stdin=manifest, timeout=120)

    def phase(self, pod: str, namespace: str = "default") -> str:
        """Phase of a pod: Pending, Running, Succeeded, Failed."""
        return str(self.read(f"/api/v1/namespaces/{namespace}/pods/{pod}")["status"].get("phase", ""))

    def logs(self, pod: str, namespace: str = "default", *args: str) -> str:
        """What a pod printed."""
        return self.kubectl("logs", pod, "--namespace", namespace, *args)

    def import_image(self, archive: Path, node: Node | None = None) -> None:
        """Load a docker-archive onto one node, or onto all of them."""
        each([node] if node else self.nodes, lambda node: node.import_image(archive))

    def wait(self, description: str, predicate: Callable[[], T], timeout: float = 60) -> T:
        """The first true value of *predicate*; after *timeout* seconds, an error with all that can be seen."""
        return wait(description, predicate, timeout=timeout, seen=lambda: describe(self))

    def _start(self, store: Path | None) -> None:
        first = self.nodes[0]
        each(self.nodes, Node.boot)
        network.connect([node.machine for node in self.nodes])
        users = {**controlplane.USERS, **{node.user: ("system:nodes",) for node in self.nodes}}
        credentials = self._credentials = Credentials(self.directory / "credentials", first.address, users)
        self._reader = Reader(self.kubeconfig)
        first.launch(controlplane.storage(self.directory / "etcd"))
        first.launch(controlplane.api_server(credentials, first.address))
        with ThreadPoolExecutor() as pool:
            runtimes = [pool.submit(self._start_runtime, node, store) for node in self.nodes]
            try:
                self._start_kubernetes(credentials, runtimes)
            except BaseException:
                each(self.nodes, Node.halt)  # so that no thread waits in vain
                raise
        self.wait("all nodes are Ready", self._nodes_ready, timeout=90)
        self.wait("names are resolved", self._dns_ready, timeout=60)
        self.wait("the cluster can run pods", self._has_account, timeout=60)

    def _start_kubernetes(self, credentials: Credentials, runtimes: Sequence[Future[None]]) -> None:
        first = self.nodes[0]
        self.wait("the API server is ready", lambda: self._answer("/readyz"), timeout=60)
        for program in controlplane.controllers(credentials):
            first.launch(program)
        for node, runtime in zip(self.nodes, runtimes, strict=True):
            runtime.result()
            node.start_agents(credentials)
        self.apply(controlplane.dns_objects(first.address))
        first.launch(controlplane.dns(credentials, first.address, self.directory / "Corefile"))

    def _start_runtime(self, node: Node, store: Path | None) -> None:
        if store:
            furnish(node, store)
        node.start_runtime()

    def _nodes_ready(self) -> bool:
        found = [
            condition for node in self.read("/api/v1/nodes")["items"] for condition in node["status"]["conditions"]
        ]
        ready = [condition["status"] for condition in found if condition["type"] == "Ready"]
        return ready == ["True"] * len(self.nodes)

    def _has_account(self) -> Any:
        return self.read("/api/v1/namespaces/default/serviceaccounts/default")

    def _answer(self, path: str) -> str:
        assert self._reader is not None, "the cluster was not started"
        return self._reader.get(path, self.nodes[0].pid)

    def _dns_ready(self) -> str:
        return self.kubectl("--server", f"http://{controlplane.DNS_READY}", "get", "--raw", "/ready")


def each(nodes: Sequence[Node], action: Callable[[Node], object]) -> None:
    """Do something with all nodes at once; raises the first failure after all are done."""
    with ThreadPoolExecutor() as pool:
        for result in [pool.submit(action, node) for node in nodes]:
            result.result()
