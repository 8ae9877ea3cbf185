"""A pod hears once, and soon, what its volume waits for; who does not wait hears nothing."""

from __future__ import annotations

import asyncio

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi.api.errors import CacheUnavailable, InProgress, PathUntrusted
from cknix_csi.api.expression import RUNNING, SUCCEEDED
from cknix_csi.api.situations import Situation
from cknix_csi.csi import waiting
from cknix_csi.csi.requests import PublishCall
from cknix_csi.proto.csi_grpc import NodeStub
from cknix_csi.proto.csi_pb2 import NodePublishVolumeRequest
from tests.node.conftest import LIMIT, NodeUnderTest
from tests.node.fakes import HELLO, OTHER, SYSTEM, FakeEvents, expression

POD = {
    "csi.storage.k8s.io/pod.name": "web",
    "csi.storage.k8s.io/pod.namespace": "default",
    "csi.storage.k8s.io/pod.uid": "u-1",
    "csi.storage.k8s.io/ephemeral": "true",
}
EXPRESSION = {**POD, "expression": "hello"}
FETCH = f'volume "v1" has to wait: still fetching {OTHER}: 3 of 17 (python3-3.12), 0s'


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "TELL_AFTER_SECONDS", 0.02)


async def told(node: NodeUnderTest, count: int) -> list[tuple[str, str, str]]:
    """What has been posted, as soon as it is *count* Events."""
    async with asyncio.timeout(LIMIT):
        while len(node.events.posted) < count:
            await asyncio.sleep(0.002)
    return node.events.posted


async def refused(client: NodeStub, request: NodePublishVolumeRequest) -> Status:
    with pytest.raises(GRPCError) as raised:
        await client.NodePublishVolume(request)
    return raised.value.status


async def test_a_pod_hears_of_each_thing_it_waits_for(node: NodeUnderTest) -> None:
    await node.expressions.put(expression(phase=RUNNING, message="building 1 of 2"))
    node.fetcher.open.clear()
    async with node.running(), node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(node.publish_request(**EXPRESSION)))
        assert await told(node, 1) == [
            (
                "web",
                "WaitingForExpression",
                'volume "v1" has to wait: Expression default/hello has no result yet (generation 1, Running): '
                "building 1 of 2",
            )
        ]
        await node.expressions.put(expression(phase=RUNNING, message="building 2 of 2"))
        await node.expressions.put(expression(phase=SUCCEEDED, results={SYSTEM: OTHER}))
        assert (await told(node, 2))[1:] == [("web", "Fetching", FETCH)]
        node.fetcher.open.set()
        await call
    assert len(node.events.posted) == 2


async def test_what_is_told_is_how_far_it_is_by_then(node: NodeUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "TELL_AFTER_SECONDS", 0.2)
    await node.expressions.put(expression(phase=RUNNING, message="building 1 of 2"))
    async with node.running(), node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(node.publish_request(**EXPRESSION)))
        await node.expressions.watched()
        await node.expressions.put(expression(phase=RUNNING, message="building 2 of 2"))
        [(_, _, message)] = await told(node, 1)
        assert message.endswith("building 2 of 2")
        await node.expressions.put(expression(phase=SUCCEEDED, results={SYSTEM: HELLO}))
        await call


async def test_kubelets_retries_are_told_nothing_new_until_the_volume_is_gone(node: NodeUnderTest) -> None:
    node.budget = 0.05
    node.fetcher.open.clear()
    request = node.publish_request(**POD, storePath=str(OTHER))
    async with node.running(), node.client() as client:
        for _ in range(3):
            assert await refused(client, request) is Status.ABORTED
        assert node.events.posted == [("web", "Fetching", FETCH)]
        await client.NodeUnpublishVolume(node.unpublish_request())
        assert await refused(client, request) is Status.ABORTED
        assert len(node.events.posted) == 2


@pytest.mark.parametrize(
    ("failure", "events"),
    [
        pytest.param(CacheUnavailable("away"), 1, id="kubelet asks again for the volume it may have"),
        pytest.param(PathUntrusted("forged"), 2, id="kubelet has forgotten the volume"),
    ],
)
async def test_a_fetch_that_fails_ends_the_wait_only_where_kubelet_ends_the_volume(
    node: NodeUnderTest, failure: CacheUnavailable | PathUntrusted, events: int
) -> None:
    node.fetcher.failure = failure
    request = node.publish_request(**POD, storePath=str(OTHER))
    async with node.running(), node.client() as client:
        for number in range(2):
            node.fetcher.open.clear()
            call = asyncio.create_task(refused(client, request))
            await told(node, min(number + 1, events))
            await asyncio.sleep(0.05)
            node.fetcher.open.set()
            assert (await call).name == failure.code.value
    assert len(node.events.posted) == events


async def test_each_pod_is_told_that_waits_for_the_same_closure(node: NodeUnderTest) -> None:
    node.fetcher.open.clear()
    async with node.running(), node.client() as client:
        calls = []
        for number in range(3):
            request = node.publish_request(
                **{**POD, "csi.storage.k8s.io/pod.name": f"web-{number}"}, storePath=str(OTHER)
            )
            request.volume_id = f"v{number}"
            request.target_path = str(node.directory / f"pods/{number}/mount")
            calls.append(asyncio.create_task(client.NodePublishVolume(request)))
        posted = await told(node, 3)
        node.fetcher.open.set()
        await asyncio.gather(*calls)
    assert sorted((pod, reason) for pod, reason, _ in posted) == [(f"web-{number}", "Fetching") for number in range(3)]


async def test_a_pod_hears_of_the_copy_that_is_made_for_it(node: NodeUnderTest) -> None:
    node.volumes.open.clear()
    node.volumes.copied = "1.0 GiB of 3.0 GiB are copied"
    request = node.publish_request(**POD, storePath=str(HELLO), presentation="copy")
    async with node.running(), node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(request))
        assert await told(node, 1) == [("web", "Copying", 'volume "v1" has to wait: 1.0 GiB of 3.0 GiB are copied')]
        node.volumes.open.set()
        await call
    assert [reason for _, reason, _ in node.events.posted] == ["Copying", "VolumeCopied"]


async def test_who_waits_for_nothing_is_told_nothing(node: NodeUnderTest) -> None:
    node.volumes.open.clear()
    async with node.running(), node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(node.publish_request(**POD, storePath=str(OTHER))))
        await node.volumes.entered.wait()
        await asyncio.sleep(0.1)
        node.volumes.open.set()
        await call
    assert node.events.posted == []


async def test_what_was_over_before_it_was_told_is_not_told_later(node: NodeUnderTest) -> None:
    events = FakeEvents()
    waits = waiting.Waits(events)
    call = PublishCall.parse(node.publish_request(), system=SYSTEM)
    with pytest.raises(InProgress), waits.of(call) as on_wait:
        on_wait(Situation.FETCHING, lambda: "fetching")
        await asyncio.sleep(0.05)
        raise InProgress("later")
    with waits.of(call) as on_wait:
        on_wait(Situation.WAITING_FOR_EXPRESSION, lambda: "no result")
        on_wait(Situation.FETCHING, lambda: "fetching again")
        await asyncio.sleep(0.05)
    assert [(reason, message) for _, reason, message in events.posted] == [
        ("Fetching", f'volume "{call.volume_id}" has to wait: fetching')
    ]
