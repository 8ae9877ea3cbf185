"""A client of another make (gRPC's C core) understands the daemon's answers as grpclib's does."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.proto.csi_pb2 import (
    GetPluginInfoRequest,
    GetPluginInfoResponse,
    NodePublishVolumeRequest,
    NodePublishVolumeResponse,
)
from tests.node.conftest import NodeUnderTest
from tests.node.fakes import OTHER


async def call(node: NodeUnderTest, method: str, request: Any, reply: Any, **options: Any) -> Any:
    """One call on a connection of its own, from a thread: as far from the daemon's event loop as one process allows."""

    def blocking() -> Any:
        with grpc.insecure_channel(f"unix://{node.endpoint}") as channel:
            stub: Callable[..., Any] = channel.unary_unary(
                method, request_serializer=type(request).SerializeToString, response_deserializer=reply.FromString
            )
            return stub(request, **options)

    return await asyncio.to_thread(blocking)


async def publish(node: NodeUnderTest, request: NodePublishVolumeRequest, **options: Any) -> Any:
    return await call(node, "/csi.v1.Node/NodePublishVolume", request, NodePublishVolumeResponse, **options)


async def test_a_call_is_answered(node: NodeUnderTest) -> None:
    async with node.running():
        reply = await call(node, "/csi.v1.Identity/GetPluginInfo", GetPluginInfoRequest(), GetPluginInfoResponse)
        assert reply.name == "csi.cknix.cool"
        assert await publish(node, node.publish_request()) == NodePublishVolumeResponse()


async def test_an_unknown_method_is_unimplemented(node: NodeUnderTest) -> None:
    async with node.running():
        with pytest.raises(grpc.RpcError) as raised:
            await call(node, "/csi.v1.Controller/GetCapacity", GetPluginInfoRequest(), GetPluginInfoResponse)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("failing", {each.code: each for each in Situation}.values(), ids=lambda each: each.code.value)
async def test_an_error_has_its_code_its_words_and_no_details(node: NodeUnderTest, failing: Situation) -> None:
    node.volumes.failure = CknixError("what happened\nand … why", failing)
    async with node.running():
        with pytest.raises(grpc.RpcError) as raised:
            await publish(node, node.publish_request())
    assert raised.value.code().name == failing.code.value
    assert raised.value.details() == "what happened\nand … why"
    assert not any(key.endswith("-bin") for key, _ in raised.value.trailing_metadata())


async def test_the_longest_message_arrives(node: NodeUnderTest) -> None:
    node.volumes.failure = CknixError("failed: " + "漢\n" * 50_000 + "the end")
    async with node.running():
        with pytest.raises(grpc.RpcError) as raised:
            await publish(node, node.publish_request())
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert raised.value.details().startswith("failed: ")
    assert raised.value.details().endswith("the end")


async def test_a_deadline_ends_the_call_and_not_the_fetch(node: NodeUnderTest) -> None:
    node.fetcher.open.clear()
    request = node.publish_request(storePath=str(OTHER))
    async with node.running():
        with pytest.raises(grpc.RpcError) as raised:
            await publish(node, request, timeout=0.3)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert node.fetcher.started.is_set()
        node.fetcher.open.set()
        await publish(node, request)
    assert node.fetcher.fetched == [OTHER]
    assert not node.fetcher.cancelled.is_set()
