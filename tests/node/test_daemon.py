"""Start, registration and stop of the node daemon, in the order that kubelet needs."""

import asyncio
import dataclasses

import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi.api.errors import Invalid
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.daemon import NodeDependencies
from cknix_csi.proto.csi_pb2 import NodeGetInfoRequest, ProbeRequest
from cknix_csi.proto.pluginregistration_grpc import RegistrationStub
from cknix_csi.proto.pluginregistration_pb2 import InfoRequest, PluginInfo, RegistrationStatus
from cknix_csi.volumes.volumes import Publication
from tests.node.conftest import LIMIT, NodeUnderTest, exists, gone
from tests.node.fakes import HELLO, OTHER


async def register(node: NodeUnderTest) -> PluginInfo:
    """What kubelet does when the registration socket appears: ask, call NodeGetInfo, say how it went."""
    await exists(node.registration)
    async with Channel(path=str(node.registration)) as channel:
        kubelet = RegistrationStub(channel)
        info = await kubelet.GetInfo(InfoRequest(), timeout=1)
        async with node.client() as client:
            assert (await client.NodeGetInfo(NodeGetInfoRequest())).node_id == "node-1"
        await kubelet.NotifyRegistrationStatus(RegistrationStatus(plugin_registered=True))
    return info


async def test_kubelet_registers_the_driver_as_soon_as_its_socket_appears(node: NodeUnderTest) -> None:
    async with node.started() as daemon:
        info = await register(node)
        assert (info.type, info.name, info.endpoint) == ("CSIPlugin", "csi.cknix.cool", str(node.endpoint))
        assert list(info.supported_versions) == ["1.0.0"]
    await daemon


async def test_a_kubelet_that_restarts_registers_the_driver_again(node: NodeUnderTest) -> None:
    async with node.running():
        assert await register(node) == await register(node)


async def test_nothing_is_served_or_released_before_volumes_are_reconciled(node: NodeUnderTest) -> None:
    node.volumes.reconciling.clear()
    node.fetcher.held = {OTHER}
    async with node.started():
        async with asyncio.timeout(LIMIT):
            while node.volumes.calls != ["reconcile"]:
                await asyncio.sleep(0)
        assert not list(node.directory.glob("*.sock"))
        # Until the data root is this daemon's, what is held there may be another's.
        assert node.fetcher.held == {OTHER}
        node.volumes.reconciling.set()
        async with asyncio.timeout(LIMIT):
            await exists(node.endpoint)
        assert node.fetcher.held == set()
        assert node.volumes.calls == ["reconcile"]


async def test_a_daemon_without_a_kubelet_needs_no_registration(node: NodeUnderTest) -> None:
    registration, node.registration = node.registration, None  # type: ignore[assignment]
    async with node.started() as daemon:
        await exists(node.endpoint)
        async with node.identity() as identity:
            assert (await identity.Probe(ProbeRequest())).ready.value is True
        assert not registration.exists()
    await daemon


async def test_stopping_deregisters_first_and_lets_a_running_mount_finish(node: NodeUnderTest) -> None:
    node.volumes.open.clear()
    async with node.running(), node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(node.publish_request()))
        await node.volumes.entered.wait()
        node.stop.set()
        await gone(node.registration)
        await gone(node.endpoint)
        with pytest.raises(GRPCError) as raised:
            await client.NodeUnpublishVolume(node.unpublish_request())
        assert raised.value.status is Status.UNAVAILABLE
        node.volumes.open.set()
        await call
    assert node.volumes.mounted == {node.target: Publication(HELLO.basename, writable=False)}


async def test_stopping_answers_those_who_wait_for_a_fetch_at_once(node: NodeUnderTest) -> None:
    node.fetcher.open.clear()
    async with node.running() as daemon, node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(node.publish_request(storePath=str(OTHER))))
        await node.fetcher.started.wait()
        node.stop.set()
        async with asyncio.timeout(LIMIT / 2):
            with pytest.raises(GRPCError) as raised:
                await call
            await daemon
    assert raised.value.status is Status.UNAVAILABLE
    assert raised.value.message == (
        "publishing volume v1 was interrupted: the node daemon is shutting down; kubelet will retry"
    )
    assert node.fetcher.cancelled.is_set()
    assert node.fetcher.held == set()


async def test_a_mount_that_hangs_does_not_keep_the_daemon_from_stopping(node: NodeUnderTest) -> None:
    node.grace = 0.05
    node.volumes.open.clear()
    async with node.running() as daemon, node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(node.publish_request()))
        await node.volumes.entered.wait()
        node.stop.set()
        async with asyncio.timeout(LIMIT / 2):
            await daemon
        call.cancel()
        await asyncio.wait({call})
    assert node.volumes.calls == ["reconcile", "publish v1", "undone v1"]


async def test_stopping_leaves_published_volumes_alone(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request())
    assert node.volumes.mounted
    assert "unpublish v1" not in node.volumes.calls


async def test_no_task_is_left_behind(node: NodeUnderTest) -> None:
    before = asyncio.all_tasks()
    node.fetcher.open.clear()
    async with node.running(), node.client() as client:
        with pytest.raises((GRPCError, asyncio.TimeoutError)):
            await client.NodePublishVolume(node.publish_request(storePath=str(OTHER)), timeout=0.1)
    await asyncio.sleep(0)
    assert {task for task in asyncio.all_tasks() - before if not task.done()} == set()


@pytest.mark.parametrize("node_id", ["", "n" * 257])
async def test_a_node_without_a_usable_name_is_refused(node: NodeUnderTest, node_id: str) -> None:
    dependencies = NodeDependencies(
        node_id="node-1",
        system="x86_64-linux",
        endpoint=node.endpoint,
        registration=None,
        volumes=node.volumes,
        closures=ClosureService(node.fetcher),
        expressions=None,
        budget=1,
    )
    with pytest.raises(Invalid, match="KUBE_NODE_NAME"):
        dataclasses.replace(dependencies, node_id=node_id)
