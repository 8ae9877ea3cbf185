"""The second-publish table of the CSI specification over the wire, in every access mode; how large requests may be."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi.csi.requests import AccessMode
from cknix_csi.proto.csi_grpc import NodeStub
from cknix_csi.proto.csi_pb2 import NodePublishVolumeRequest
from cknix_csi.volumes.volumes import Publication
from tests.node.conftest import NodeUnderTest
from tests.node.fakes import HELLO, OTHER

# CSI specification, "NodePublishVolume": what another target gets while the first is published.
OTHER_TARGET = {
    AccessMode.MULTI_NODE_READER_ONLY: Status.OK,
    AccessMode.MULTI_NODE_SINGLE_WRITER: Status.OK,
    AccessMode.MULTI_NODE_MULTI_WRITER: Status.OK,
    AccessMode.SINGLE_NODE_MULTI_WRITER: Status.OK,
    AccessMode.SINGLE_NODE_SINGLE_WRITER: Status.FAILED_PRECONDITION,
    AccessMode.SINGLE_NODE_WRITER: Status.FAILED_PRECONDITION,
    AccessMode.SINGLE_NODE_READER_ONLY: Status.FAILED_PRECONDITION,
}


async def answer(client: NodeStub, request: NodePublishVolumeRequest) -> Status:
    try:
        await client.NodePublishVolume(request)
    except GRPCError as error:
        return error.status
    return Status.OK


@pytest.mark.parametrize("mode", AccessMode)
async def test_a_second_publish_is_answered_as_the_table_says(node: NodeUnderTest, mode: AccessMode) -> None:
    node.fetcher.valid.add(OTHER)

    def request(**attributes: str) -> NodePublishVolumeRequest:
        made = node.publish_request(**attributes)
        made.readonly = mode.reads_only
        made.volume_capability.access_mode.mode = mode.value  # type: ignore[assignment]
        return made

    elsewhere = request()
    elsewhere.target_path += "-2"
    flipped = request()
    flipped.readonly = not mode.reads_only
    async with node.running(), node.client() as client:
        assert await answer(client, request()) is Status.OK
        assert await answer(client, request()) is Status.OK
        assert await answer(client, request(storePath=str(OTHER))) is Status.ALREADY_EXISTS
        # A mode that only reads is read-only whatever the flag says.
        assert await answer(client, flipped) is (Status.OK if mode.reads_only else Status.ALREADY_EXISTS)
        assert await answer(client, elsewhere) is OTHER_TARGET[mode]
        await client.NodeUnpublishVolume(node.unpublish_request())
        assert await answer(client, elsewhere) is Status.OK


async def test_the_pods_of_one_claim_do_not_make_each_other_wait(
    node: NodeUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    look = node.volumes.published

    def counted(target: Path) -> Publication | None:
        nonlocal looks
        looks += 1
        return look(target)

    monkeypatch.setattr(node.volumes, "published", counted)
    counts = []
    async with node.running(), node.client() as client:
        for number in range(20):
            request = node.publish_request()
            request.target_path += f"-{number}"
            looks = 0
            await client.NodePublishVolume(request)
            counts.append(looks)
    assert set(counts[1:]) == {counts[0]}


async def test_as_much_as_the_specification_allows_is_taken(node: NodeUnderTest) -> None:
    """Section "Size Limits": 128 bytes for a string, 4 KiB for a map, the system's own limit for a path."""
    request = node.publish_request()
    request.volume_id = "v" * 128
    request.target_path = "/" + "/".join(["d" * 255] * 15) + "/" + "d" * 254  # PATH_MAX is 4096 with its NUL
    for number in range(32):
        request.secrets[f"secret-{number}"] = "s" * 110
        request.publish_context[f"context-{number}"] = "c" * 110
    request.volume_context["storePath"] = str(HELLO)
    request.volume_context["csi.storage.k8s.io/serviceAccount.tokens"] = "t" * 3900
    assert len(request.target_path) == 4095
    async with node.running(), node.client() as client:
        assert await answer(client, request) is Status.OK


async def test_fields_of_a_newer_specification_change_nothing(node: NodeUnderTest) -> None:
    request = NodePublishVolumeRequest.FromString(
        node.publish_request().SerializeToString() + b"\xfa\x3e\x03new"  # field 1007, length-delimited
    )
    async with node.running(), node.client() as client:
        assert await answer(client, request) is Status.OK
        assert await answer(client, node.publish_request()) is Status.OK
