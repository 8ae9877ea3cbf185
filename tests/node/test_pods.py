"""What a publish asks about its pod and tells it: user namespaces, presentations, and what a copy has cost."""

from __future__ import annotations

import asyncio
import logging

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi.api.errors import CknixError, NotFound
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.situations import Situation
from cknix_csi.csi import pods
from tests.node.conftest import NodeUnderTest
from tests.node.fakes import HELLO, OTHER

POD = {
    "storePath": str(HELLO),
    "csi.storage.k8s.io/pod.name": "web",
    "csi.storage.k8s.io/pod.namespace": "default",
    "csi.storage.k8s.io/pod.uid": "u-1",
    "csi.storage.k8s.io/ephemeral": "true",
}
AWAY = CknixError("the API server did not answer", Situation.KUBERNETES_UNAVAILABLE)


@pytest.mark.parametrize(
    ("answer", "host_users"),
    [
        pytest.param(True, True, id="a pod of the host's users"),
        pytest.param(False, False, id="a pod with a user namespace"),
        pytest.param(NotFound("no"), True, id="a pod that has gone"),
        pytest.param(AWAY, True, id="a pod of which nobody can tell"),
    ],
)
async def test_volumes_learn_whether_the_pod_uses_the_hosts_users(
    node: NodeUnderTest, answer: bool | CknixError, host_users: bool, caplog: pytest.LogCaptureFixture
) -> None:
    node.pods.known["web"] = answer
    async with node.running(), node.client() as client:
        with caplog.at_level(logging.WARNING, "cknix_csi.csi.pods"):
            await client.NodePublishVolume(node.publish_request(**POD))
    assert [request.host_users for request in node.volumes.requests] == [host_users]
    assert [(pod.namespace, pod.name, pod.uid) for pod in node.pods.asked] == [("default", "web", "u-1")]
    guessed = [record.getMessage() for record in caplog.records if "hostUsers" in record.getMessage()]
    assert bool(guessed) == (answer is AWAY)
    assert all("the API server did not answer" in message for message in guessed)


async def test_an_api_server_that_says_nothing_holds_no_volume_up_for_long(
    node: NodeUnderTest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pods, "_PATIENCE_SECONDS", 0.05)
    node.pods.silent = True
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request(**POD))
    assert [request.host_users for request in node.volumes.requests] == [True]
    assert "did not answer within" in caplog.text


async def test_neither_a_volume_that_is_mounted_nor_one_without_a_pod_is_asked_about(node: NodeUnderTest) -> None:
    node.pods.known["web"] = True
    async with node.running(), node.client() as client:
        for _ in range(2):
            await client.NodePublishVolume(node.publish_request(**POD))
        assert len(node.pods.asked) == 1
        await client.NodeUnpublishVolume(node.unpublish_request())
        await client.NodePublishVolume(node.publish_request())
    assert len(node.pods.asked) == 1
    assert node.volumes.requests[-1].host_users


async def test_the_pod_is_told_what_its_copy_has_cost_and_of_nothing_else(node: NodeUnderTest) -> None:
    node.pods.known["web"] = False
    async with node.running(), node.client() as client:
        for presentation in ("redirect", "hardlink", "copy", "copy"):
            await client.NodePublishVolume(node.publish_request(**POD, presentation=presentation))
            if presentation != "copy":
                await client.NodeUnpublishVolume(node.unpublish_request())
    asked = [request.presentation for request in node.volumes.requests]
    assert asked == [Presentation.REDIRECT, Presentation.HARDLINK, Presentation.COPY]
    message = (
        f'volume "v1" is a private copy of {HELLO}, as it asks for; '
        "files: 12 copied (3456 bytes); 0 directories, 0 symbolic links; in 0.250s"
    )
    assert node.events.posted == [("web", "VolumeCopied", message)]


async def test_another_presentation_of_a_mounted_volume_is_a_conflict(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request(**POD, presentation="copy"))
        await client.NodePublishVolume(node.publish_request(**POD))
        with pytest.raises(GRPCError) as refused:
            await client.NodePublishVolume(node.publish_request(**POD, presentation="hardlink"))
    assert refused.value.status is Status.ALREADY_EXISTS
    assert "it is presented as copy, asked for is hardlink" in str(refused.value.message)


async def test_what_no_pod_can_have_is_refused_before_anything_is_fetched(node: NodeUnderTest) -> None:
    node.pods.known["web"] = False
    request = node.publish_request(**{**POD, "storePath": str(OTHER)})
    request.readonly = False
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as refused:
            await client.NodePublishVolume(request)
        assert refused.value.status is Status.INVALID_ARGUMENT
        assert node.fetcher.fetched == []
        request.volume_context["presentation"] = "copy"
        await client.NodePublishVolume(request)
    assert node.fetcher.fetched == [OTHER]


async def test_a_call_ends_as_soon_as_its_pod_is_deleted_and_leaves_nothing(node: NodeUnderTest) -> None:
    node.pods.known["web"] = True
    node.volumes.open.clear()
    other = node.publish_request(**POD | {"csi.storage.k8s.io/pod.uid": "u-2"})
    other.volume_id, other.target_path = "v2", str(node.target.with_name("other"))
    async with node.running(), node.client() as client:
        waiting = asyncio.create_task(client.NodePublishVolume(node.publish_request(**POD)))
        stays = asyncio.create_task(client.NodePublishVolume(other))
        while len(node.volumes.requests) < 2:
            await asyncio.sleep(0.001)
        node.pods.end("u-1")
        for call in (waiting, client.NodePublishVolume(node.publish_request(**POD))):
            with pytest.raises(GRPCError) as refused:
                await asyncio.wait_for(call, 1)
            assert refused.value.status is Status.ABORTED
            assert "pod default/web is being deleted" in str(refused.value.message)
        await client.NodeUnpublishVolume(node.unpublish_request())
        assert not stays.done()
        node.volumes.open.set()
        await stays
    assert [str(target) for target in node.volumes.mounted] == [other.target_path]
