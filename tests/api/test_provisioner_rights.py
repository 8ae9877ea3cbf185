"""Upstream's external-provisioner and our provisioner, as the manifest runs them, need exactly the rights it gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpclib.client import Channel

from cknix_csi.kube.api import MERGE_PATCH, NOT_FOUND, ApiError, Json, core
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.proto.csi_grpc import ControllerStub
from cknix_csi.proto.csi_pb2 import ListVolumesRequest
from tests.api import rbac
from tests.api.conftest import Expressions, eventually
from tests.api.rights import granted, used
from tests.api.server import DRIVER_NAMESPACE, REPOSITORY, VOLUMES_NAMESPACE, Server
from tests.cluster.harness.components import CSI_PROVISIONER

DRIVER = "csi.cknix.cool"
X86, ARM = "x86_64-linux", "aarch64-linux"
PATH = "/nix/store/" + "1" * 32 + "-hello"


class Pod:
    """Both containers of the Deployment, as processes with its ServiceAccount."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.socket = directory / "csi.sock"
        self._log = directory / "log"
        kubeconfig = server.kubeconfig("provisioner", rbac.token(server, rbac.PROVISIONER))
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "KUBECONFIG": str(kubeconfig)}
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        arguments = [each.replace("/run/csi/csi.sock", str(self.socket)) for each in sidecar()["args"]]
        # In a pod it reads its namespace from a file.
        arguments.append(f"--leader-election-namespace={DRIVER_NAMESPACE}")
        ours = {"CSI_ENDPOINT": f"unix://{self.socket}", "CKNIX_METRICS_LISTEN": "off"}
        self._run(sys.executable, "-m", "cknix_csi.cli", "provisioner", **ours)
        # As with an API server that cannot stream lists.
        program = str(CSI_PROVISIONER.programs / "csi-provisioner")
        self._run(program, *arguments, KUBE_FEATURE_WatchListClient="false")

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    def _run(self, *command: str, **environment: str) -> None:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**self._environment, **environment}, cwd=REPOSITORY
            )
        self._processes.append(process)


def sidecar() -> Json:
    """The container of upstream's program."""
    bodies = yaml.safe_load_all((REPOSITORY / "yaml/55-provisioner.yaml").read_text())
    deployment = next(body for body in bodies if body["kind"] == "Deployment")
    containers: list[Json] = deployment["spec"]["template"]["spec"]["containers"]
    return next(each for each in containers if "csi-provisioner" in each["image"])


@pytest.fixture
def pod(server: Server) -> Iterator[Pod]:
    CSI_PROVISIONER.build()
    directory = Path(tempfile.mkdtemp(prefix="cknix-"))
    pod = Pod(server, directory)
    yield pod
    pod.stop()
    print(pod.log())
    shutil.rmtree(directory)


@pytest.fixture
def cluster(server: Server) -> Iterator[Server]:
    """A node with the driver, and classes: what kubelet and administrators make."""
    manifests = [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n-1", "labels": {"cknix.cool/system": X86}}},
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "CSINode",
            "metadata": {"name": "n-1"},
            "spec": {"drivers": [{"name": DRIVER, "nodeID": "n-1", "topologyKeys": ["cknix.cool/system"]}]},
        },
        _class("test-here", "Immediate", expression="tool"),
        _class("test-elsewhere", "WaitForFirstConsumer", **{ARM: PATH}),
    ]
    text = yaml.safe_dump_all(manifests)
    server.kubectl("apply", "-f", "-", stdin=text)
    yield server
    server.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=text)


def _class(name: str, binding: str, **parameters: str) -> Json:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": DRIVER,
        "parameters": parameters,
        "volumeBindingMode": binding,
    }


async def claim(expr: Expressions, name: str, storage_class: str, **annotations: str) -> None:
    """A claim, with what the controller manager and the scheduler write on it elsewhere."""
    body = {
        "metadata": {
            "name": name,
            "annotations": {"volume.kubernetes.io/storage-provisioner": DRIVER, **annotations},
        },
        "spec": {
            "storageClassName": storage_class,
            "accessModes": ["ReadWriteOncePod"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    await expr.api.create(core("persistentvolumeclaims", expr.namespace), body)


async def volumes(api: KubernetesApi) -> list[Json]:
    return list((await api.get("/api/v1/persistentvolumes"))["items"])


async def test_the_provisioner_needs_every_right_it_has_and_asks_for_no_other(
    cluster: Server, pod: Pod, expr: Expressions, api: KubernetesApi
) -> None:
    before = len(cluster.audited())
    await expr.create("tool", {"data": {"expr": "1"}, "systems": [X86, ARM]})
    await claim(expr, "here", "test-here")
    await claim(expr, "elsewhere", "test-elsewhere", **{"volume.kubernetes.io/selected-node": "n-1"})
    pod.start()

    async def log() -> str:
        return pod.log()

    async def made() -> bool:
        return len(await volumes(api)) == 1

    await eventually(made, log)
    (volume,) = await volumes(api)
    name = volume["metadata"]["name"]
    assert volume["spec"]["csi"]["volumeHandle"].startswith(f"volume-{name}-")
    assert volume["spec"]["csi"]["volumeAttributes"]["expression"] == "tool"
    assert volume["spec"]["capacity"] == {"storage": "1Gi"}
    (term,) = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "cknix.cool/system", "operator": "In", "values": [X86]}]

    # external-provisioner never asks for the list.
    async with Channel(path=str(pod.socket)) as channel:
        (entry,) = (await ControllerStub(channel).ListVolumes(ListVolumesRequest())).entries
    assert entry.volume.volume_id == volume["spec"]["csi"]["volumeHandle"]

    # No node can have the other one: the scheduler may choose another node, again and again.
    path = core("persistentvolumeclaims", expr.namespace, "elsewhere")

    async def chosen() -> Any:
        return (await api.get(path))["metadata"]["annotations"].get("volume.kubernetes.io/selected-node")

    async def asks_for_another_node() -> bool:
        return await chosen() is None

    await eventually(asks_for_another_node, log)
    again = {"metadata": {"annotations": {"volume.kubernetes.io/selected-node": "n-1"}}}
    await api.patch(path, again, kind=MERGE_PATCH)
    await eventually(asks_for_another_node, log)

    # What the controller manager does elsewhere, when a claim is deleted that had its volume.
    for each in ("here", "elsewhere"):
        no_finalizers = {"metadata": {"finalizers": None}}
        path = core("persistentvolumeclaims", expr.namespace, each)
        await api.patch(path, no_finalizers, kind=MERGE_PATCH)
        cluster.kubectl("delete", "pvc", each, "-n", expr.namespace)
    status = {"status": {"phase": "Released"}}
    await api.patch(f"/api/v1/persistentvolumes/{name}/status", status, kind=MERGE_PATCH)

    async def gone() -> bool:
        try:
            body = await api.get(f"/api/v1/persistentvolumes/{name}")
        except ApiError as error:
            return error.status == NOT_FOUND
        # Nor does anybody here take the protection away.
        mine = [each for each in body["metadata"]["finalizers"] if each != "kubernetes.io/pv-protection"]
        if body["metadata"].get("deletionTimestamp") and not mine:
            await api.patch(f"/api/v1/persistentvolumes/{name}", {"metadata": {"finalizers": None}}, kind=MERGE_PATCH)
        return False

    await eventually(gone, log)
    assert cluster.kubectl("get", "cm", "-n", VOLUMES_NAMESPACE, "-l", "cknix.cool/volume", "-o", "name") == ""

    async def all_used() -> bool:
        return used(rbac.PROVISIONER, cluster.audited()[before:]) == granted(rbac.PROVISIONER)

    async def unused() -> list[str]:
        return sorted(map(str, granted(rbac.PROVISIONER) - used(rbac.PROVISIONER, cluster.audited()[before:])))

    await eventually(all_used, unused)
