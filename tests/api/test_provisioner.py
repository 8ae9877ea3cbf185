"""The Controller service over a real API server, with the rights of yaml/: volumes are made once, and end for good."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
from grpclib.client import Channel
from grpclib.exceptions import GRPCError

from cknix_csi.csi.provisioner import run_provisioner
from cknix_csi.kube.api import MERGE_PATCH, ApiError, Json, core, expressions
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.proto.csi_grpc import ControllerStub
from cknix_csi.proto.csi_pb2 import (
    CapacityRange,
    ControllerExpandVolumeRequest,
    ControllerGetVolumeRequest,
    CreateSnapshotRequest,
    CreateVolumeRequest,
    DeleteVolumeRequest,
    GetCapacityRequest,
    ListVolumesRequest,
    Topology,
    TopologyRequirement,
    ValidateVolumeCapabilitiesRequest,
    Volume,
    VolumeCapability,
)
from tests.api import rbac
from tests.api.conftest import Expressions, connected
from tests.api.server import VOLUMES_NAMESPACE, Server

PATH = "/nix/store/" + "1" * 32 + "-hello"
X86, ARM = "x86_64-linux", "aarch64-linux"
Mode = VolumeCapability.AccessMode
MOUNT = VolumeCapability(mount=VolumeCapability.MountVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER))

T = TypeVar("T")

_numbers = count(1)


@asynccontextmanager
async def serving(api: KubernetesApi, directory: Path) -> AsyncIterator[ControllerStub]:
    """The service at a socket of its own, and a client of it."""
    stop = asyncio.Event()
    endpoint = directory / f"{next(_numbers)}.sock"
    task = asyncio.create_task(run_provisioner(api, namespace=VOLUMES_NAMESPACE, endpoint=endpoint, stop=stop))
    try:
        while not endpoint.exists():
            if task.done():
                await task
            await asyncio.sleep(0.002)
        async with Channel(path=str(endpoint)) as channel:
            yield ControllerStub(channel)
    finally:
        stop.set()
        await task


@pytest.fixture
def sockets() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="cknix-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
async def controller(server: Server, sockets: Path) -> AsyncIterator[ControllerStub]:
    """The provisioner with its own rights; what a test leaves of volumes is deleted through it."""
    token = rbac.token(server, rbac.PROVISIONER)
    async with connected(server.kubeconfig("provisioner", token)) as api, serving(api, sockets) as stub:
        yield stub
        for entry in (await stub.ListVolumes(ListVolumesRequest())).entries:
            await stub.DeleteVolume(DeleteVolumeRequest(volume_id=entry.volume.volume_id))
        assert (
            server.ask("GET", core("configmaps", VOLUMES_NAMESPACE) + "?labelSelector=cknix.cool/volume")["items"] == []
        )


def request(name: str = "", **changes: Any) -> CreateVolumeRequest:
    fields = {
        "name": name or f"pvc-{os.getpid()}-{next(_numbers)}",
        "volume_capabilities": [MOUNT],
        "parameters": {"storePath": PATH},
        "capacity_range": CapacityRange(required_bytes=1 << 30),
        **changes,
    }
    return CreateVolumeRequest(**fields)


def of(namespace: str, claim: str, **parameters: str) -> dict[str, str]:
    """Parameters of a class, with what the provisioner adds for *claim*."""
    added = {"csi.storage.k8s.io/pvc/namespace": namespace, "csi.storage.k8s.io/pvc/name": claim}
    return {**parameters, **added}


def at(*systems: str) -> TopologyRequirement:
    places = [Topology(segments={"cknix.cool/system": system}) for system in systems]
    return TopologyRequirement(requisite=places, preferred=places)


async def create(stub: ControllerStub, asked: CreateVolumeRequest) -> Volume:
    return (await stub.CreateVolume(asked)).volume


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(GRPCError) as raised:
        await call
    assert raised.value.details is None
    return raised.value.status.name, raised.value.message or ""


async def claim(expr: Expressions, name: str, **annotations: str) -> Json:
    body = {
        "metadata": {"name": name, "annotations": {f"cknix.cool/{key}": text for key, text in annotations.items()}},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    return await expr.api.create(core("persistentvolumeclaims", expr.namespace), body)


async def test_a_volume_is_one_configmap_and_nothing_else(controller: ControllerStub, server: Server) -> None:
    volume = await create(controller, request("pvc-1"))
    digest = hashlib.sha256(b"pvc-1").hexdigest()
    assert (volume.volume_id, volume.capacity_bytes) == (f"volume-pvc-1-{digest[:16]}", 1 << 30)
    assert dict(volume.volume_context) == {"storePath": PATH}
    shown = json.loads(server.kubectl("get", "cm", volume.volume_id, "-n", VOLUMES_NAMESPACE, "-o", "json"))
    assert shown["immutable"] is True
    assert shown["data"]["name"] == "pvc-1"

    await controller.DeleteVolume(DeleteVolumeRequest(volume_id=volume.volume_id))
    await controller.DeleteVolume(DeleteVolumeRequest(volume_id=volume.volume_id))
    assert not (await controller.ListVolumes(ListVolumesRequest())).entries


async def test_ten_processes_that_make_one_volume_make_one(controller: ControllerStub, server: Server) -> None:
    asked = request(parameters={"storePath": PATH}, secrets={"password": "hunter2"})
    made = await asyncio.gather(*(create(controller, asked) for _ in range(10)))
    assert {volume.volume_id for volume in made} == {made[0].volume_id}
    assert len((await controller.ListVolumes(ListVolumesRequest())).entries) == 1
    assert "hunter2" not in server.kubectl("get", "cm", "-n", VOLUMES_NAMESPACE, "-o", "yaml")
    other = request(asked.name, parameters={"storePath": PATH.replace("1", "2")})
    code, words = await refused(controller.CreateVolume(other))
    assert (code, "it was made with another storePath" in words) == ("ALREADY_EXISTS", True)


@pytest.mark.parametrize("size", [1_200_000, 3_300_000], ids=["422", "413"])
async def test_parameters_that_no_record_can_hold_are_refused_for_good(controller: ControllerStub, size: int) -> None:
    parameters = {"storePath": PATH, "csi.storage.k8s.io/pv/name": "x" * size}
    code, words = await refused(controller.CreateVolume(request(parameters=parameters)))
    assert code == "INVALID_ARGUMENT"
    assert words.startswith("parameters: cannot be kept in a ConfigMap, which holds less than 1 MiB; shorten them")
    assert len(words) < 1000


async def test_a_repeated_creation_gets_what_the_first_one_decided(
    controller: ControllerStub, expr: Expressions, server: Server
) -> None:
    await claim(expr, "data", expression="first")
    asked = request(parameters=of(expr.namespace, "data", expression="of-the-class", presentation="copy"))
    first = await create(controller, asked)
    assert dict(first.volume_context) == {"expression": "first", "presentation": "copy"}

    path = core("persistentvolumeclaims", expr.namespace, "data")
    patch = {"metadata": {"annotations": {"cknix.cool/expression": "second"}}}
    await expr.api.patch(path, patch, kind=MERGE_PATCH)
    assert await create(controller, asked) == first
    # Elsewhere the controller manager, which does not run here, lets it go.
    await expr.api.patch(path, {"metadata": {"finalizers": None}}, kind=MERGE_PATCH)
    server.kubectl("delete", "pvc", "data", "-n", expr.namespace)
    assert await create(controller, asked) == first

    asked.name += "-late"
    code, words = await refused(controller.CreateVolume(asked))
    assert (code, words) == ("NOT_FOUND", f"PersistentVolumeClaim {expr.namespace}/data does not exist any more")


async def test_a_volume_is_bound_to_the_systems_of_its_expression(
    controller: ControllerStub, expr: Expressions
) -> None:
    await claim(expr, "data")
    parameters = of(expr.namespace, "data", expression="tool")

    def systems(volume: Volume) -> list[str]:
        return [place.segments["cknix.cool/system"] for place in volume.accessible_topology]

    # Nobody knows yet where an Expression will run that does not exist.
    assert systems(await create(controller, request(parameters=parameters, accessibility_requirements=at(X86)))) == []

    await expr.create("tool", {"data": {"expr": "1"}, "systems": [X86, ARM]})
    both = request(parameters=parameters, accessibility_requirements=at(ARM, X86))
    assert systems(await create(controller, both)) == [ARM, X86]
    one = request(parameters=parameters, accessibility_requirements=at(X86))
    assert systems(await create(controller, one)) == [X86]
    code, words = await refused(
        controller.CreateVolume(request(parameters=parameters, accessibility_requirements=at("riscv64-linux")))
    )
    assert code == "RESOURCE_EXHAUSTED"
    assert "x86_64-linux, aarch64-linux only" in words

    await expr.create("built", "1")
    status = {"status": {"results": [{"system": ARM, "path": PATH}]}}
    await expr.api.patch(expressions(expr.namespace, "built", status=True), status, kind=MERGE_PATCH)
    anywhere = request(parameters=of(expr.namespace, "data", expression="built"))
    assert systems(await create(controller, anywhere)) == [ARM]


class LosesAnAnswer(KubernetesApi):
    """The API server does what it is asked, and the answer to request *number* never arrives."""

    def __init__(self, api: KubernetesApi, number: int) -> None:
        self._true = api
        self._number = number

    async def get(self, path: str, **options: Any) -> Json:
        return await self._lose(self._true.get(path, **options))

    async def create(self, path: str, body: Json, **options: Any) -> Json:
        return await self._lose(self._true.create(path, body, **options))

    async def delete(self, path: str, *, uid: str) -> None:
        await self._lose(self._true.delete(path, uid=uid))

    async def _lose(self, request: Awaitable[T]) -> T:
        self._number -= 1
        try:
            return await request
        finally:
            if self._number == 0:
                raise ApiError("the connection is gone", status=None)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
async def test_a_call_that_ends_after_any_step_is_finished_by_the_next_one(
    controller: ControllerStub, expr: Expressions, api: KubernetesApi, sockets: Path, number: int
) -> None:
    await claim(expr, "data", expression="first")
    asked = request(parameters=of(expr.namespace, "data"))
    async with serving(LosesAnAnswer(api, number), sockets) as ends:
        assert (await refused(ends.CreateVolume(asked)))[0] == "UNAVAILABLE"
    made = await create(controller, asked)
    assert [entry.volume for entry in (await controller.ListVolumes(ListVolumesRequest())).entries] == [made]

    if number <= 2:
        async with serving(LosesAnAnswer(api, number), sockets) as ends:
            gone = ends.DeleteVolume(DeleteVolumeRequest(volume_id=made.volume_id))
            assert (await refused(gone))[0] == "UNAVAILABLE"
    await controller.DeleteVolume(DeleteVolumeRequest(volume_id=made.volume_id))
    assert not (await controller.ListVolumes(ListVolumesRequest())).entries


async def test_volumes_are_listed_page_by_page(controller: ControllerStub) -> None:
    made = {(await create(controller, request())).volume_id for _ in range(5)}
    found: list[str] = []
    token = ""
    while True:
        page = await controller.ListVolumes(ListVolumesRequest(max_entries=2, starting_token=token))
        assert len(page.entries) <= 2
        found += [entry.volume.volume_id for entry in page.entries]
        token = page.next_token
        if not token:
            break
    assert sorted(found) == sorted(made)
    assert (await refused(controller.ListVolumes(ListVolumesRequest(max_entries=-1))))[0] == "INVALID_ARGUMENT"
    code, words = await refused(controller.ListVolumes(ListVolumesRequest(starting_token="nonsense")))
    assert (code, "list from the beginning" in words) == ("ABORTED", True)


async def test_only_volumes_are_ever_deleted(controller: ControllerStub, api: KubernetesApi, server: Server) -> None:
    lookalike = f"volume-x-{'0' * 16}"
    for name in ("precious", lookalike):
        await api.create(core("configmaps", VOLUMES_NAMESPACE), {"metadata": {"name": name}})
        await controller.DeleteVolume(DeleteVolumeRequest(volume_id=name))
        server.kubectl("delete", "cm", name, "-n", VOLUMES_NAMESPACE)  # it was still there
    await controller.DeleteVolume(DeleteVolumeRequest(volume_id="../../secrets/x"))
    assert (await refused(controller.DeleteVolume(DeleteVolumeRequest())))[0] == "INVALID_ARGUMENT"


async def test_capabilities_are_confirmed_or_told_why_not(controller: ControllerStub) -> None:
    volume = await create(controller, request())
    block = VolumeCapability(block=VolumeCapability.BlockVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER))

    async def asked(*capabilities: VolumeCapability) -> Any:
        return await controller.ValidateVolumeCapabilities(
            ValidateVolumeCapabilitiesRequest(
                volume_id=volume.volume_id,
                volume_capabilities=capabilities,
                volume_context=volume.volume_context,
                parameters={"storePath": PATH},
            )
        )

    good = await asked(MOUNT)
    assert list(good.confirmed.volume_capabilities) == [MOUNT]
    assert good.confirmed.volume_context == volume.volume_context
    bad = await asked(MOUNT, block)
    assert not bad.HasField("confirmed")
    assert "use volumeMode: Filesystem" in bad.message
    assert (await refused(controller.CreateVolume(request(volume_capabilities=[block]))))[0] == "INVALID_ARGUMENT"

    one = await controller.ControllerGetVolume(ControllerGetVolumeRequest(volume_id=volume.volume_id))
    assert one.volume == volume
    unknown = ControllerGetVolumeRequest(volume_id="volume-0123456789abcdef")
    assert (await refused(controller.ControllerGetVolume(unknown)))[0] == "NOT_FOUND"


async def test_capacity_is_unlimited_where_a_volume_can_be_and_none_elsewhere(controller: ControllerStub) -> None:
    async def capacity(**fields: Any) -> int:
        return int((await controller.GetCapacity(GetCapacityRequest(**fields))).available_capacity)

    here = Topology(segments={"cknix.cool/system": ARM})
    assert await capacity() > 1 << 60
    assert await capacity(parameters={ARM: PATH}, accessible_topology=here) > 1 << 60
    assert await capacity(parameters={X86: PATH}, accessible_topology=here) == 0
    assert await capacity(volume_capabilities=[VolumeCapability(mount=VolumeCapability.MountVolume())]) == 0


async def test_what_is_not_offered_is_refused_with_words(controller: ControllerStub) -> None:
    for call in (
        controller.CreateSnapshot(CreateSnapshotRequest(name="s", source_volume_id="v")),
        controller.ControllerExpandVolume(ControllerExpandVolumeRequest(volume_id="v")),
    ):
        code, words = await refused(call)
        assert code == "UNIMPLEMENTED"
        assert "this driver does not have" in words


async def test_without_an_api_server_volumes_wait(server: Server, sockets: Path) -> None:
    config = json.loads(server.kubeconfig("nobody", "x").read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"  # the discard port: nobody listens
    file = sockets / "kubeconfig"
    file.write_text(json.dumps(config))
    async with connected(file) as api, serving(api, sockets) as stub:
        for call in (
            stub.CreateVolume(request()),
            stub.DeleteVolume(DeleteVolumeRequest(volume_id="volume-0123456789abcdef")),
            stub.ListVolumes(ListVolumesRequest()),
        ):
            code, words = await refused(call)
            assert code == "UNAVAILABLE"
            assert words.startswith("the API server did not answer")
