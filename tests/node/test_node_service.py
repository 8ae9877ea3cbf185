"""The Node service over a real socket: what kubelet sees."""

import asyncio
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi import __version__, logs
from cknix_csi.api.errors import CacheUnavailable, CknixError
from cknix_csi.api.expression import RUNNING, SUCCEEDED
from cknix_csi.api.limits import Limit, Medium, SizePolicy
from cknix_csi.api.situations import Situation
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
    PluginCapability,
    ProbeRequest,
    VolumeCapability,
    VolumeUsage,
)
from cknix_csi.volumes.failures import StoreDamaged
from cknix_csi.volumes.usage import Amount, Measured
from cknix_csi.volumes.volumes import Publication
from tests.node.conftest import LIMIT, NodeUnderTest
from tests.node.fakes import HELLO, OTHER, SYSTEM, expression


async def test_identity_names_the_driver_its_version_and_what_its_other_processes_do(node: NodeUnderTest) -> None:
    async with node.running(), node.identity() as identity:
        info = await identity.GetPluginInfo(GetPluginInfoRequest())
        assert (info.name, info.vendor_version) == ("csi.cknix.cool", __version__)
        reply = await identity.GetPluginCapabilities(GetPluginCapabilitiesRequest())
        assert {capability.service.type for capability in reply.capabilities} == {
            PluginCapability.Service.CONTROLLER_SERVICE,
            PluginCapability.Service.VOLUME_ACCESSIBILITY_CONSTRAINTS,
        }
        assert (await identity.Probe(ProbeRequest())).ready.value is True


async def test_the_node_tells_its_name_and_capabilities(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        info = await client.NodeGetInfo(NodeGetInfoRequest())
        assert (info.node_id, info.max_volumes_per_node) == ("node-1", 0)
        assert dict(info.accessible_topology.segments) == {"cknix.cool/system": SYSTEM}
        reply = await client.NodeGetCapabilities(NodeGetCapabilitiesRequest())
        assert {capability.rpc.type for capability in reply.capabilities} == {
            NodeServiceCapability.RPC.GET_VOLUME_STATS,
            NodeServiceCapability.RPC.VOLUME_CONDITION,
            NodeServiceCapability.RPC.SINGLE_NODE_MULTI_WRITER,
        }


async def test_what_is_not_advertised_is_unimplemented(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        for call in (
            client.NodeStageVolume(NodeStageVolumeRequest()),
            client.NodeUnstageVolume(NodeUnstageVolumeRequest()),
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


def _stats_request(node: NodeUnderTest) -> NodeGetVolumeStatsRequest:
    return NodeGetVolumeStatsRequest(volume_id="v1", volume_path=str(node.target))


async def test_a_volumes_use_is_told_while_it_is_published_and_it_is_not_found_afterwards(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request())
        answer = await client.NodeGetVolumeStats(_stats_request(node))
        [usage] = answer.usage
        assert (usage.unit, usage.total, usage.used, usage.available) == (VolumeUsage.BYTES, 300, 200, 100)
        assert not answer.volume_condition.abnormal
        await client.NodeUnpublishVolume(node.unpublish_request())
        with pytest.raises(GRPCError) as raised:
            await client.NodeGetVolumeStats(_stats_request(node))
        assert raised.value.status is Status.NOT_FOUND
        with pytest.raises(GRPCError) as raised:
            await client.NodeGetVolumeStats(NodeGetVolumeStatsRequest())
        assert raised.value.status is Status.INVALID_ARGUMENT


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
        node.expressions.failure = CknixError("away", Situation.KUBERNETES_UNAVAILABLE)
        node.fetcher.valid.clear()
        await client.NodePublishVolume(request)
    assert node.fetcher.fetched == []


GIB = 1 << 30


@pytest.mark.parametrize(
    ("policy", "attributes", "given"),
    [
        (SizePolicy(), {}, None),
        (SizePolicy(default=GIB), {}, Limit(GIB)),
        (SizePolicy(maximum=GIB), {"sizeLimit": "1Mi", "medium": "Memory"}, Limit(1 << 20, Medium.MEMORY)),
    ],
)
async def test_a_writable_volume_gets_the_limit_that_it_asks_for_or_the_nodes(
    node: NodeUnderTest, policy: SizePolicy, attributes: dict[str, str], given: Limit | None
) -> None:
    node.sizes = policy
    request = node.publish_request(storePath=str(HELLO), **attributes)
    request.readonly = False
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(request)
    assert node.volumes.mounted == {node.target: Publication(HELLO.basename, writable=True, limit=given)}


async def test_more_than_the_node_gives_is_refused_but_not_to_a_pod_that_has_it_already(node: NodeUnderTest) -> None:
    node.sizes = SizePolicy(maximum=GIB)
    request = node.publish_request(storePath=str(HELLO), sizeLimit="2Gi")
    request.readonly = False
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(request)
        assert raised.value.status is Status.INVALID_ARGUMENT
        assert raised.value.message is not None
        assert "2Gi is more than the 1Gi that this node gives a volume" in raised.value.message
        node.volumes.mounted[node.target] = Publication(HELLO.basename, writable=True, limit=Limit(2 * GIB))
        await client.NodePublishVolume(request)


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


@pytest.mark.parametrize("failing", {each.code: each for each in Situation}.values(), ids=lambda each: each.code.value)
async def test_an_error_arrives_with_its_code_and_words_and_nothing_else(
    node: NodeUnderTest, failing: Situation
) -> None:
    node.volumes.failure = CknixError("what happened\nand … why", failing)
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(node.publish_request())
    assert raised.value.status.name == failing.code.value
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
        "NodePublishVolume: unexpected ZeroDivisionError; the driver's log has the traceback"
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


_POD = {"csi.storage.k8s.io/pod.name": "web", "csi.storage.k8s.io/pod.namespace": "default"}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Lines of the log from INFO on, as text without the time."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record).partition(",")[2][4:])

    handler = Keep(logging.INFO)
    handler.setFormatter(logs.TextFormatter())
    caplog.set_level(logging.DEBUG, "cknix_csi")
    logger = logging.getLogger("cknix_csi")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def _like_kubelets(node: NodeUnderTest, **attributes: str) -> NodePublishVolumeRequest:
    """A publish whose target is a place of kubelet's."""
    request = node.publish_request(**_POD, **(attributes or {"storePath": str(HELLO)}))
    node.target = node.directory / "pods/u-1/volumes/kubernetes.io~csi/tools/mount"
    request.target_path = str(node.target)
    return request


async def test_a_publish_and_an_unpublish_are_one_line_each_that_names_pod_volume_and_closure(
    node: NodeUnderTest, told: list[str]
) -> None:
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(_like_kubelets(node))
        await client.NodeUnpublishVolume(node.unpublish_request())
    lines = [line for line in told if "mounted" in line]
    about = rf"\[pod=default/web volume=tools volume_id=v1 closure={re.escape(HELLO.basename)}\]"
    assert len(lines) == 2, told
    assert re.fullmatch(
        rf"INFO cknix_csi\.csi\.publisher: mounted {re.escape(str(HELLO))} read-only in 0\.\d+s, "
        rf"having waited 0\.\d+s for it to be on this node {about}",
        lines[0],
    )
    # The pod's name is remembered from the publish; kubelet does not send it again.
    wanted = {"pod=default/web", "volume=tools", "volume_id=v1", f"closure={HELLO.basename}"}
    what, _, fields = lines[1].partition(" [")
    assert re.fullmatch(
        rf"INFO cknix_csi\.csi\.publisher: unmounted {re.escape(HELLO.basename)} \(read-only\) in 0\.\d+s", what
    )
    assert set(fields.removesuffix("]").split()) == wanted
    assert not any("NodePublishVolume" in line or "NodeUnpublishVolume" in line for line in told)


async def test_an_unpublish_of_what_an_earlier_daemon_mounted_names_the_pods_uid(
    node: NodeUnderTest, told: list[str]
) -> None:
    _like_kubelets(node)
    node.volumes.mounted[node.target] = Publication(HELLO.basename, writable=True)
    async with node.running(), node.client() as client:
        await client.NodeUnpublishVolume(node.unpublish_request())
        await client.NodeUnpublishVolume(node.unpublish_request())
    lines = [line for line in told if "mounted" in line]
    assert lines[0].endswith(f"[pod_uid=u-1 volume=tools volume_id=v1 closure={HELLO.basename}]")
    assert "nothing was mounted" in lines[1]


async def test_secrets_are_in_no_line(node: NodeUnderTest, told: list[str], caplog: pytest.LogCaptureFixture) -> None:
    request = node.publish_request()
    request.secrets["key"] = "s3cret"
    request.publish_context["key"] = "s3cret"
    request.volume_context["csi.storage.k8s.io/serviceAccount.tokens"] = "t0ken"
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(request)
        request.volume_capability.mount.mount_flags.append("password=hunter2")
        with pytest.raises(GRPCError):
            await client.NodePublishVolume(request)
    text = "\n".join([caplog.text, *told])
    assert "INVALID_ARGUMENT" in text
    assert not any(word in text for word in ("s3cret", "t0ken", "hunter2"))


async def test_a_failure_that_retries_repeat_is_told_once_and_its_end_as_well(
    node: NodeUnderTest, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    request = _like_kubelets(node)
    async with node.running(), node.client() as client:
        for _ in range(3):
            node.volumes.failure = CknixError("no room", Situation.OUT_OF_SPACE)
            with pytest.raises(GRPCError):
                await client.NodePublishVolume(request)
        warnings = [line for line in told if line.startswith("WARNING")]
        assert len(warnings) == 1
        assert "RESOURCE_EXHAUSTED: no room [pod=default/web volume=tools" in warnings[0]
        assert f"closure={HELLO.basename}" in warnings[0]
        node.volumes.failure = CknixError("other trouble", Situation.OUT_OF_SPACE)
        with pytest.raises(GRPCError):
            await client.NodePublishVolume(request)
        await client.NodePublishVolume(request)
    warnings = [line for line in told if line.startswith("WARNING")]
    assert len(warnings) == 2
    assert "other trouble (4 times in 0s)" in warnings[1]
    assert any("NodePublishVolume succeeded after 4 failures in 0s [pod=default/web" in line for line in told)
    quiet = [record for record in caplog.records if record.levelno == logging.DEBUG and "no room" in record.message]
    assert len(quiet) == 2


async def test_what_is_wrong_with_a_volume_is_told_once_with_its_pod_and_so_is_its_end(
    node: NodeUnderTest, told: list[str]
) -> None:
    words = "its GC root is gone, " + "and much more is to be said of that " * 5
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(_like_kubelets(node, storePath=str(HELLO)))
        node.volumes.measured = Measured(Amount(1, 1, 0), None, words)
        for _ in range(3):
            condition = (await client.NodeGetVolumeStats(_stats_request(node))).volume_condition
            assert condition.abnormal
            assert condition.message.startswith("its GC root is gone, and much more")
        node.volumes.measured = Measured(Amount(1, 1, 0), None)
        await client.NodeGetVolumeStats(_stats_request(node))
    [unwell] = [line for line in told if "not well" in line]
    assert unwell.startswith("WARNING")
    assert words in unwell
    assert unwell.endswith("[pod_uid=u-1 volume=tools volume_id=v1]")
    [well] = [line for line in told if "the volume is well again after 0s" in line]
    assert well.startswith("INFO")


async def test_a_misspelt_attribute_is_told_with_the_pod_and_given_up_with_it(
    node: NodeUnderTest, told: list[str]
) -> None:
    request = _like_kubelets(node, expresion="hello")
    async with node.running(), node.client() as client:
        for _ in range(2):
            with pytest.raises(GRPCError):
                await client.NodePublishVolume(request)
        await client.NodeUnpublishVolume(node.unpublish_request())
    [warning] = [line for line in told if line.startswith("WARNING")]
    assert warning.endswith("[pod=default/web volume=tools volume_id=v1]")
    assert any("the volume was unpublished after its publish had met 2 failures" in line for line in told)


async def test_waiting_is_no_failure_and_told_once(node: NodeUnderTest, told: list[str]) -> None:
    node.fetcher.open.clear()
    node.budget = 0.02
    async with node.running(), node.client() as client:
        for _ in range(3):
            with pytest.raises(GRPCError) as raised:
                await client.NodePublishVolume(_like_kubelets(node, storePath=str(OTHER)))
            assert raised.value.status is Status.ABORTED
        node.fetcher.open.set()
    lines = [line for line in told if "ABORTED" in line]
    assert len(lines) == 1
    assert lines[0].startswith("INFO")
    assert not any(line.startswith("WARNING") for line in told)


async def test_a_fetch_is_about_its_closure_and_not_about_who_asked_first(node: NodeUnderTest, told: list[str]) -> None:
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(_like_kubelets(node, storePath=str(OTHER)))
    [fetching, fetched] = [line for line in told if "fetch" in line]
    assert fetching.endswith(f"fetching {OTHER} [closure={OTHER.basename}]")
    assert fetched.endswith(f"[closure={OTHER.basename}]")


async def test_a_bug_that_retries_meet_again_has_one_traceback(node: NodeUnderTest, told: list[str]) -> None:
    async with node.running(), node.client() as client:
        for _ in range(3):
            node.volumes.failure = ZeroDivisionError("in the middle")
            with pytest.raises(GRPCError):
                await client.NodePublishVolume(node.publish_request())
    assert len([line for line in told if "Traceback" in line]) == 1


async def test_a_closure_whose_files_are_lost_is_fetched_again_and_published(
    node: NodeUnderTest, told: list[str]
) -> None:
    node.volumes.failure = StoreDamaged(f"{HELLO} is in the store's database but not in the store")
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request())
    assert node.fetcher.fetched == [HELLO]
    assert list(node.volumes.mounted) == [node.target]
    assert any("but not in the store; fetching it again" in line for line in told)


async def test_damage_that_a_fetch_does_not_heal_is_told_after_one_fetch(node: NodeUnderTest) -> None:
    node.volumes.failures = [StoreDamaged("lost"), StoreDamaged("still lost")]
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(node.publish_request())
        assert (raised.value.status, raised.value.message) == (Status.FAILED_PRECONDITION, "still lost")
        assert node.fetcher.fetched == [HELLO]
        assert node.volumes.mounted == {}
        await client.NodePublishVolume(node.publish_request())


async def test_damage_that_no_cache_can_heal_says_both(node: NodeUnderTest) -> None:
    node.volumes.failure = StoreDamaged("a file is lost")
    node.fetcher.failure = CacheUnavailable("no cache answers")
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(node.publish_request())
    assert raised.value.status is Status.UNAVAILABLE
    assert raised.value.message == "a file is lost; fetching it again did not help: no cache answers"


async def test_a_restore_longer_than_the_budget_is_aborted_and_the_retry_joins_it(node: NodeUnderTest) -> None:
    node.budget = 0.1
    node.fetcher.open.clear()
    node.volumes.failures = [StoreDamaged("lost"), StoreDamaged("lost")]
    async with node.running(), node.client() as client:
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(node.publish_request())
        assert raised.value.status is Status.ABORTED
        assert f"still fetching {HELLO}" in (raised.value.message or "")
        retry = asyncio.create_task(client.NodePublishVolume(node.publish_request()))
        node.fetcher.open.set()
        await retry
    assert list(node.volumes.mounted) == [node.target]


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
            await client.NodePublishVolume(request, timeout=1.0)
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


async def test_a_volume_that_is_being_unpublished_is_not_published_meanwhile(node: NodeUnderTest) -> None:
    async with node.running(), node.client() as client:
        await client.NodePublishVolume(node.publish_request())
        node.volumes.unmounting.clear()
        first = asyncio.create_task(client.NodeUnpublishVolume(node.unpublish_request()))
        while "unpublish v1" not in node.volumes.calls:
            await asyncio.sleep(0.001)
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(node.publish_request())
        assert raised.value.status is Status.ABORTED
        assert raised.value.message == f"a volume is being unpublished at {node.target}; retry"
        second = asyncio.create_task(client.NodeUnpublishVolume(node.unpublish_request()))
        node.volumes.unmounting.set()
        await asyncio.gather(first, second)
        assert node.volumes.mounted == {}
        await client.NodePublishVolume(node.publish_request())


async def test_two_volumes_at_once_at_one_target_are_not_both_published(node: NodeUnderTest) -> None:
    node.volumes.open.clear()
    other = node.publish_request()
    other.volume_id = "v2"
    async with node.running(), node.client() as client:
        first = asyncio.create_task(client.NodePublishVolume(node.publish_request()))
        await node.volumes.entered.wait()
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(other)
        assert raised.value.status is Status.ABORTED
        node.volumes.open.set()
        await first
        with pytest.raises(GRPCError) as raised:
            await client.NodePublishVolume(other)
        assert raised.value.status is Status.ALREADY_EXISTS


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
