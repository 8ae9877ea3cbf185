"""A publish that takes longer than kubelet may wait: it says how far it is, goes on, and its end is heard of."""

from __future__ import annotations

import asyncio

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi.api.errors import OutOfSpace
from cknix_csi.csi import publisher
from tests.node.conftest import LIMIT, NodeUnderTest


@pytest.fixture
def slow(node: NodeUnderTest) -> NodeUnderTest:
    """A node whose volumes do not become ready before ``volumes.open`` is set."""
    node.budget = 0.05
    node.volumes.open.clear()
    return node


async def refused(slow: NodeUnderTest) -> tuple[Status, str]:
    async with slow.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(slow.publish_request())
    return raised.value.status, raised.value.message or ""


async def ended(slow: NodeUnderTest) -> None:
    """Wait until the publish under way has ended."""
    slow.volumes.open.set()
    async with asyncio.timeout(LIMIT):
        while not slow.volumes.mounted and slow.volumes.failure:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)


async def test_a_copy_longer_than_the_budget_is_aborted_with_progress_and_the_retry_joins_it(
    slow: NodeUnderTest,
) -> None:
    slow.volumes.copied = "still copying it: 1.0 GiB of 3.0 GiB, 17s"
    async with slow.running(), slow.client() as client:
        for _ in range(3):
            status, message = await refused(slow)
            assert status is Status.ABORTED
            assert "still copying it: 1.0 GiB of 3.0 GiB, 17s; kubelet will retry" in message
        slow.volumes.open.set()
        await client.NodePublishVolume(slow.publish_request())
        assert slow.volumes.calls.count("publish v1") == 1


async def test_a_copy_that_ended_meanwhile_is_there_for_the_next_call(slow: NodeUnderTest) -> None:
    slow.volumes.copied = "still copying it"
    async with slow.running(), slow.client() as client:
        await refused(slow)
        await ended(slow)
        await client.NodePublishVolume(slow.publish_request())
        assert slow.volumes.calls.count("publish v1") == 1


async def test_a_failure_that_nobody_waited_for_is_told_to_the_next_call_and_once(slow: NodeUnderTest) -> None:
    slow.volumes.copied = "still copying it"
    slow.volumes.failure = OutOfSpace("the disk was full after all")
    async with slow.running(), slow.client() as client:
        await refused(slow)
        await ended(slow)
        status, message = await refused(slow)
        assert status is Status.RESOURCE_EXHAUSTED
        assert "the disk was full after all" in message
        await client.NodePublishVolume(slow.publish_request())
        assert slow.volumes.calls.count("publish v1") == 2


async def test_an_unpublish_ends_a_copy_that_nobody_waits_for_and_what_became_of_it(slow: NodeUnderTest) -> None:
    slow.volumes.copied = "still copying it"
    async with slow.running(), slow.client() as client:
        await refused(slow)
        await client.NodeUnpublishVolume(slow.unpublish_request())
        assert slow.volumes.calls[-2:] == ["undone v1", "unpublish v1"]
        slow.volumes.failure = OutOfSpace("no room")
        await refused(slow)
        await ended(slow)
        await client.NodeUnpublishVolume(slow.unpublish_request())
        await client.NodePublishVolume(slow.publish_request())


async def test_a_mount_that_hangs_is_answered_within_the_time_that_kubelet_waits(
    slow: NodeUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_GRACE_SECONDS", 0.05)
    async with slow.running():
        status, message = await refused(slow)
        assert status is Status.ABORTED
        assert "volume v1 is still being published" in message
        slow.volumes.open.set()
