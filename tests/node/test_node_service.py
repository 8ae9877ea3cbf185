"""The Node service over a real socket: what kubelet sees."""

import asyncio
import logging
from pathlib import Path

import pytest
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi import __version__
from cknix_csi.api.errors import CacheUnavailable, CknixError, Code
from cknix_csi.api.expression import RUNNING, SUCCEEDED
from cknix_csi.nix.database import PathNotValid
from cknix_csi.nix.store import Store
from cknix_csi.proto.csi_grpc import ControllerStub
from cknix_csi.proto.csi_pb2 import (
    ControllerGetCapabilitiesRequest,
    GetPluginCapabilitiesRequest,
    GetPluginInfoRequest,
    NodeExpandVolumeRequest,
    NodeGetCapabilitiesRequest,
    NodeGetInfoRequest,
    NodeGetVolumeStatsRequest,
    NodePublishVolumeRequest,
    NodePublishVolumeResponse,
    NodeServiceCapability,
    NodeStageVolumeRequest,
    NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse,
    NodeUnstageVolumeRequest,
    ProbeRequest,
    VolumeCapability,
)
from cknix_csi.volumes.volumes import Publication
from tests.node.conftest import LIMIT, NodeUnderTest
from tests.node.fakes import HELLO, OTHER, SYSTEM, expression


async def test_identity_names_the_driver_and_its_version_and_claims_no_controller(node: NodeUnderTest) -> None:
    async with node.running(), node.identity() as identity:
        info = await identity.GetPluginInfo(GetPluginInfoRequest())
        assert (info.name, info.vendor_version) == ("csi.cknix.cool", __version__)
        assert not (await identity.GetPluginCapabilities(GetPluginCapabilitiesRequest())).capabilities
        assert (await identity.Probe(ProbeRequest())).ready.value is True


async def test_the_node_tells_its_name_and_capabilities(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        info = await client.NodeGetInfo(NodeGetInfoRequest())
        assert (info.node_id, info.max_volumes_per_node) == ("node-1", 0)
        assert not info.HasField("accessible_topology")
        reply = await client.NodeGetCapabilities(NodeGetCapabilitiesRequest())
        assert [capability.rpc.type for capability in reply.capabilities] == [
            NodeServiceCapability.RPC.SINGLE_NODE_MULTI_WRITER
        ]


async def test_what_is_not_advertised_is_unimplemented(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        for call in (
            client.NodeStageVolume(NodeStageVolumeRequest()),
            client.NodeUnstageVolume(NodeUnstageVolumeRequest()),
            client.NodeGetVolumeStats(NodeGetVolumeStatsRequest()),
            client.NodeExpandVolume(NodeExpandVolumeRequest()),
        ):
            with pytest.raises(GRPCError) as raised:
                await call
            assert raised.value.status is Status.UNIMPLEMENTED
            assert raised.value.message


async def test_unknown_services_and_methods_are_unimplemented(node: NodeUnderTest) -> None:
    async with node.running(), Channel(path=str(node.endpoint)) as channel:
        with pytest.raises(GRPCError) as raised:
            await ControllerStub(channel).ControllerGetCapabilities(ControllerGetCapabilitiesRequest())
        assert raised.value.status is Status.UNIMPLEMENTED
        assert raised.value.message == "/csi.v1.Controller/ControllerGetCapabilities is not a method of this driver"
        unheard = UnaryUnaryMethod(
            channel, "/csi.v1.Node/NodeUnheardOf", NodePublishVolumeRequest, NodePublishVolumeResponse
        )
        with pytest.raises(GRPCError) as raised:
            await unheard(NodePublishVolumeRequest())
        assert raised.value.status is Status.UNIMPLEMENTED


async def test_a_volume_is_published_and_unpublished(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request())
        assert node.volumes.mounted == {node.target: Publication(HELLO.basename, writable=False)}
        await client.NodeUnpublishVolume(node.unpublish_request())
        assert node.volumes.mounted == {}


async def test_a_second_publish_of_the_same_volume_does_nothing(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request())
        await client.NodePublishVolume(node.publish_request())
    assert node.volumes.calls == ["reconcile", "publish v1"]


async def test_a_republish_asks_neither_store_nor_api_server(node: NodeUnderTest) -> None:
    await node.expressions.put(expression(phase=SUCCEEDED, results={SYSTEM: HELLO}))
    async with node.running(), node.client() as client:
        request = node.publish_request(**{"expression": "hello", "csi.storage.k8s.io/pod.namespace": "default"})
        await client.NodePublishVolume(request)
        node.expressions.failure = CknixError("away", code=Code.UNAVAILABLE)
        node.fetcher.valid.clear()
        await client.NodePublishVolume(request)
    assert node.fetcher.fetched == []


async def test_another_volume_at_the_same_target_is_a_conflict(node: NodeUnderTest) -> None:
    node.fetcher.valid.add(OTHER)
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request())
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(node.publish_request(storePath=str(OTHER)))
        assert raised.value.status is Status.ALREADY_EXISTS


async def test_a_volume_for_one_user_is_refused_at_a_second_target_until_the_first_is_gone(node: NodeUnderTest) -> None:
    request = node.publish_request()
    request.volume_capability.access_mode.mode = VolumeCapability.AccessMode.SINGLE_NODE_SINGLE_WRITER
    elsewhere = NodePublishVolumeRequest()
    elsewhere.CopyFrom(request)
    elsewhere.target_path = str(node.directory / "pods/2/mount")
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(request)
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(elsewhere)
        assert raised.value.status is Status.FAILED_PRECONDITION
        await client.NodeUnpublishVolume(node.unpublish_request())
        await client.NodePublishVolume(elsewhere)


async def test_unpublish_of_what_was_never_published_is_fine(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        assert await client.NodeUnpublishVolume(node.unpublish_request()) == NodeUnpublishVolumeResponse()


async def test_every_problem_of_a_request_is_on_the_wire(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(NodePublishVolumeRequest(volume_context={"expresion": "hello"}))
    assert raised.value.status is Status.INVALID_ARGUMENT
    assert raised.value.message == (
        "volume_id: is missing; target_path: is missing; volume_capability: is missing; "
        'volume attribute "expresion": is not known; did you mean "expression"?'
    )


@pytest.mark.parametrize("code", list(Code))
async def test_an_error_arrives_with_its_code_and_words_and_nothing_else(node: NodeUnderTest, code: Code) -> None:
    node.volumes.failure = CknixError("what happened\nand … why", code=code)
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(node.publish_request())
    assert raised.value.status.name == code.value
    assert raised.value.message == "what happened\nand … why"
    assert raised.value.details is None


async def test_a_bug_is_internal_with_its_type_on_the_wire_and_its_traceback_in_the_log(
    node: NodeUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    node.volumes.failure = ZeroDivisionError("in the middle")
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(node.publish_request())
    assert raised.value.status is Status.INTERNAL
    assert raised.value.message == (
        "NodePublishVolume: unexpected ZeroDivisionError; the node daemon's log has the traceback"
    )
    assert "ZeroDivisionError: in the middle" in caplog.text


async def test_a_request_that_cannot_be_read_is_internal(node: NodeUnderTest) -> None:
    class Garbage:
        def SerializeToString(self) -> bytes:
            return b"\x0a\xff"  # a field that ends before its length

        @classmethod
        def FromString(cls, data: bytes) -> "Garbage":
            return cls()

    async with node.running(), Channel(path=str(node.endpoint)) as channel:
        method = UnaryUnaryMethod(channel, "/csi.v1.Node/NodePublishVolume", Garbage, NodePublishVolumeResponse)
        with pytest.raises(GRPCError) as raised:
            await method(Garbage())
    assert raised.value.status is Status.INTERNAL


async def test_each_call_is_one_line_in_the_log_and_secrets_are_in_none(
    node: NodeUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "cknix_csi")
    request = node.publish_request()
    request.secrets["key"] = "s3cret"
    request.publish_context["key"] = "s3cret"
    request.volume_context["csi.storage.k8s.io/serviceAccount.tokens"] = "t0ken"
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(request)
        request.volume_capability.mount.mount_flags.append("password=hunter2")
        with pytest.raises(GRPCError):
            await client.NodePublishVolume(request)
    lines = [record.getMessage() for record in caplog.records if "NodePublishVolume" in record.getMessage()]
    assert len(lines) == 2
    assert lines[0].startswith("NodePublishVolume volume=v1 after 0.")
    assert lines[0].endswith("s: OK")
    assert "INVALID_ARGUMENT" in lines[1]
    assert not any(word in caplog.text for word in ("s3cret", "t0ken", "hunter2"))


async def test_a_hundred_pods_of_one_cold_closure_cause_one_fetch(node: NodeUnderTest) -> None:
    node.fetcher.open.clear()
    requests = []
    for number in range(100):
        request = node.publish_request(storePath=str(OTHER))
        request.volume_id = f"v{number}"
        request.target_path = str(node.directory / f"pods/{number}/mount")
        requests.append(request)
    async with node.running(), node.client() as client:
        calls = [asyncio.create_task(client.NodePublishVolume(request)) for request in requests]
        await node.fetcher.started.wait()
        node.fetcher.open.set()
        await asyncio.gather(*calls)
    assert node.fetcher.fetched == [OTHER]
    assert len(node.volumes.mounted) == 100


async def test_a_fetch_longer_than_the_budget_is_aborted_with_progress_and_the_retry_joins_it(
    node: NodeUnderTest,
) -> None:
    node.budget = 0.05
    node.fetcher.open.clear()
    request = node.publish_request(storePath=str(OTHER))
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(request)
        assert raised.value.status is Status.ABORTED
        assert raised.value.message == f"still fetching {OTHER}: 3 of 17 (python3-3.12), 0s; kubelet will retry"
        node.fetcher.open.set()
        await client.NodePublishVolume(request)
    assert node.fetcher.fetched == [OTHER]


async def test_a_client_that_gives_up_ends_neither_fetch_nor_publish(node: NodeUnderTest) -> None:
    node.fetcher.open.clear()
    request = node.publish_request(storePath=str(OTHER))
    async with node.running(), node.client() as client:
        with pytest.raises((GRPCError, asyncio.TimeoutError)):
            await client.NodePublishVolume(request, timeout=0.1)
        assert node.fetcher.started.is_set()
        node.fetcher.open.set()
        await client.NodePublishVolume(request)
    assert not node.fetcher.cancelled.is_set()
    assert node.fetcher.fetched == [OTHER]
    assert node.volumes.calls == ["reconcile", "publish v1"]


async def test_a_publish_that_failed_is_tried_anew_by_the_next_call(node: NodeUnderTest) -> None:
    node.fetcher.failure = CacheUnavailable("no cache answers")
    request = node.publish_request(storePath=str(OTHER))
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(request)
        assert raised.value.status is Status.UNAVAILABLE
        node.fetcher.failure = None
        await client.NodePublishVolume(request)


async def test_a_closure_collected_under_the_publish_is_fetched_again(node: NodeUnderTest, tmp_path: Path) -> None:
    node.volumes.open.clear()
    async with node.running(), node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(node.publish_request()))
        await node.volumes.entered.wait()
        node.fetcher.valid.clear()
        node.volumes.failure = PathNotValid(Store.chroot(tmp_path), HELLO)
        node.volumes.open.set()
        await call
    assert node.fetcher.fetched == [HELLO]
    assert node.volumes.mounted


async def test_the_pod_starts_as_soon_as_its_expression_has_a_result(node: NodeUnderTest) -> None:
    await node.expressions.put(expression(phase=RUNNING))
    request = node.publish_request(**{"expression": "hello", "csi.storage.k8s.io/pod.namespace": "default"})
    async with node.running(), node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(request))
        await node.expressions.watched()
        await node.expressions.put(expression(phase=SUCCEEDED, results={SYSTEM: HELLO}))
        async with asyncio.timeout(1):
            await call


async def test_unpublish_cancels_the_publish_in_flight_and_waits_until_it_is_undone(node: NodeUnderTest) -> None:
    node.volumes.open.clear()
    async with node.running(), node.client() as client:
        publish = asyncio.create_task(client.NodePublishVolume(node.publish_request()))
        await node.volumes.entered.wait()
        await client.NodeUnpublishVolume(node.unpublish_request())
        assert node.volumes.calls == ["reconcile", "publish v1", "undone v1", "unpublish v1"]
        with pytest.raises(GRPCError) as raised:
            await publish
    assert raised.value.status is Status.ABORTED
    assert raised.value.message == f"publishing volume v1 at {node.target} was cancelled by its unpublish"
    assert node.volumes.mounted == {}


async def test_unpublish_of_one_pod_leaves_the_publish_of_another_pod_alone(node: NodeUnderTest) -> None:
    node.fetcher.open.clear()
    async with node.running(), node.client() as client:
        publish = asyncio.create_task(client.NodePublishVolume(node.publish_request(storePath=str(OTHER))))
        await node.fetcher.started.wait()
        other = NodeUnpublishVolumeRequest(volume_id="v1", target_path=str(node.directory / "pods/2/mount"))
        await client.NodeUnpublishVolume(other)
        node.fetcher.open.set()
        await publish
    assert list(node.volumes.mounted) == [node.target]


async def test_what_was_unpublished_is_not_held_against_the_next_volume(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request())
        await client.NodeUnpublishVolume(node.unpublish_request())
        node.volumes.mounted[node.target] = Publication(HELLO.basename, writable=False)
        request = node.publish_request()
        request.volume_id = "v2"
        await client.NodePublishVolume(request)


async def test_a_publish_with_other_arguments_does_not_join_the_one_in_flight(node: NodeUnderTest) -> None:
    node.volumes.open.clear()
    async with node.running(), node.client() as client:
        publish = asyncio.create_task(client.NodePublishVolume(node.publish_request()))
        await node.volumes.entered.wait()
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(node.publish_request(storePath=str(OTHER)))
        assert raised.value.status is Status.ABORTED
        node.volumes.open.set()
        await publish


async def test_volumes_are_published_side_by_side(node: NodeUnderTest) -> None:
    node.volumes.open.clear()
    async with node.running(), node.client() as client:
        calls = []
        for number in range(50):
            request = node.publish_request()
            request.volume_id = f"v{number}"
            request.target_path = str(node.directory / f"pods/{number}/mount")
            calls.append(asyncio.create_task(client.NodePublishVolume(request)))
        async with asyncio.timeout(LIMIT):
            while len(node.volumes.calls) < 51:
                await asyncio.sleep(0.002)
        node.volumes.open.set()
        await asyncio.gather(*calls)
