"""kubelet finds the driver again, whatever becomes of its sockets and however long kubelet refuses it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi.csi.provisioner import run_provisioner
from cknix_csi.csi.readiness import Readiness, Step
from cknix_csi.csi.registration import Registration
from cknix_csi.csi.server import serve
from cknix_csi.kube.api import DeletingApi
from cknix_csi.kube.backoff import Backoff
from cknix_csi.proto.csi_grpc import IdentityStub
from cknix_csi.proto.csi_pb2 import GetPluginInfoRequest, NodeGetInfoRequest
from cknix_csi.proto.pluginregistration_grpc import RegistrationStub
from cknix_csi.proto.pluginregistration_pb2 import RegistrationStatus
from tests.node.conftest import LIMIT, NodeUnderTest, exists, gone
from tests.node.pluginmanager import PluginManager

DRIVER = "csi.cknix.cool"
AWAY = "dial tcp 127.0.0.1:6443: connect: connection refused"


@pytest.fixture
async def kubelet(node: NodeUnderTest) -> AsyncIterator[PluginManager]:
    async with PluginManager(node.directory).running() as manager:
        yield manager


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT):
        while not holds():
            await asyncio.sleep(0.005)


async def page(node: NodeUnderTest) -> list[str]:
    """What is not so, of ``/readyz``."""
    lines = (await node.readiness.page("")).body.decode().splitlines()
    return [line for line in lines if not line.startswith("[+]")]


async def page_says(node: NodeUnderTest, words: str) -> None:
    async with asyncio.timeout(LIMIT):
        while not any(words in line for line in await page(node)):
            await asyncio.sleep(0.005)


async def ready(node: NodeUnderTest) -> None:
    async with asyncio.timeout(LIMIT):
        while await page(node):
            await asyncio.sleep(0.005)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize("lost", [("endpoint",), ("registration",), ("endpoint", "registration")], ids="+".join)
async def test_a_socket_that_is_removed_is_served_anew_and_kubelet_has_the_driver_again(
    node: NodeUnderTest, kubelet: PluginManager, lost: tuple[str, ...]
) -> None:
    async with node.running():
        await ready(node)
        asked = kubelet.asked
        for each in lost:
            getattr(node, each).unlink()
        await until(lambda: kubelet.asked > asked or "registration" not in lost)
        await exists(node.endpoint)
        await exists(node.registration)
        await until(lambda: kubelet.drivers == {DRIVER: str(node.endpoint)})
        await ready(node)
        assert kubelet.asked - asked == ("registration" in lost)
        async with node.client() as client:
            assert (await client.NodeGetInfo(NodeGetInfoRequest())).node_id == "node-1"
        assert node.endpoint.stat().st_mode & 0o777 == 0o600
        assert sorted(os.listdir(node.directory)) == ["csi.sock", "reg.sock"]
    assert os.listdir(node.directory) == []


async def test_the_csi_socket_is_back_before_the_registration_socket(
    node: NodeUnderTest, kubelet: PluginManager
) -> None:
    async with node.running():
        await ready(node)
        kubelet.appeared.clear()
        node.registration.unlink()
        node.endpoint.unlink()
        await until(lambda: len(kubelet.appeared) == 2)
    assert kubelet.appeared == ["csi.sock", "reg.sock"]


async def test_who_lives_at_the_path_keeps_it_and_the_daemon_waits_and_says_so(
    node: NodeUnderTest, kubelet: PluginManager, caplog: pytest.LogCaptureFixture
) -> None:
    async with node.running():
        await ready(node)
        caplog.clear()
        node.endpoint.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(node.endpoint))
            other.listen()
            node.registration.unlink()
            theirs = node.endpoint.stat().st_ino
            await page_says(node, f"the CSI socket is served: the socket {node.endpoint} was removed or replaced")
            words = f"another process serves at {node.endpoint}"
            await page_says(node, words)
            await asyncio.sleep(0.3)  # many looks
            assert node.endpoint.stat().st_ino == theirs
            # kubelet would call the other one.
            assert not node.registration.exists()
            assert len(warnings(caplog)) == 1
            assert words in warnings(caplog)[0]
        await ready(node)
        assert node.endpoint.stat().st_ino != theirs
        assert kubelet.drivers == {DRIVER: str(node.endpoint)}


async def test_a_call_that_runs_when_its_socket_is_lost_ends_as_ever(node: NodeUnderTest) -> None:
    node.volumes.open.clear()
    async with node.running(), node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(node.publish_request()))
        await node.volumes.entered.wait()
        node.endpoint.unlink()
        await exists(node.endpoint)
        async with node.client() as another:
            await another.NodeGetInfo(NodeGetInfoRequest())
        node.volumes.open.set()
        await call
        assert node.target in node.volumes.mounted


async def test_at_the_end_calls_on_connections_from_before_the_loss_are_refused(node: NodeUnderTest) -> None:
    node.volumes.open.clear()
    async with node.running(), node.client() as client:
        call = asyncio.create_task(client.NodePublishVolume(node.publish_request()))
        await node.volumes.entered.wait()
        node.endpoint.unlink()
        await exists(node.endpoint)
        node.stop.set()
        await gone(node.endpoint)
        with pytest.raises(GRPCError) as raised:
            await client.NodeUnpublishVolume(node.unpublish_request())
        assert raised.value.status is Status.UNAVAILABLE
        node.volumes.open.set()
        await call


async def test_sockets_that_were_out_of_sight_are_found_again(node: NodeUnderTest, kubelet: PluginManager) -> None:
    async with node.running():
        await ready(node)
        before = node.endpoint.stat().st_ino
        away = node.directory.with_name(f"{node.directory.name}-away")
        node.directory.rename(away)
        await page_says(node, f"directory {node.directory} for a socket: No such file or directory")
        away.rename(node.directory)
        await ready(node)
        assert node.endpoint.stat().st_ino == before


async def test_a_refused_daemon_goes_on_and_is_registered_once_kubelet_can(
    node: NodeUnderTest, kubelet: PluginManager, caplog: pytest.LogCaptureFixture
) -> None:
    kubelet.refusal = AWAY
    async with node.running() as daemon:
        await page_says(node, "the driver is registered with kubelet: kubelet refused the driver")
        await until(lambda: kubelet.asked == 3)
        assert not daemon.done()
        async with node.client() as client:
            await client.NodePublishVolume(node.publish_request())
        assert (await page(node))[0].endswith(f"kubelet refused the driver {DRIVER} at {node.endpoint}: {AWAY}")
        assert warnings(caplog) == [
            f"kubelet refused the driver {DRIVER} at {node.endpoint}: {AWAY}; it will be asked again"
        ]
        kubelet.refusal = ""
        await until(lambda: kubelet.drivers == {DRIVER: str(node.endpoint)})
        await ready(node)
        assert sorted(os.listdir(node.directory)) == ["csi.sock", "reg.sock"]


async def test_a_driver_that_was_taken_and_then_refused_is_not_ready(
    node: NodeUnderTest, kubelet: PluginManager
) -> None:
    async with node.running():
        await ready(node)
        kubelet.refusal = AWAY
        node.registration.unlink()
        await page_says(node, AWAY)


async def test_the_socket_is_shown_once_after_each_refusal_and_not_after_it_was_taken(scratch: Path) -> None:
    shown: list[str] = []

    async def show() -> None:
        shown.append("again")
        if len(shown) == 1:
            raise OSError("the disk is full")

    registration = Registration(driver=DRIVER, endpoint=scratch, backoff=Backoff(0.02, 0.02))
    path = scratch / "reg.sock"
    async with serve([registration], path, grace=1), Channel(path=str(path)) as channel:
        kubelet = RegistrationStub(channel)
        offering = asyncio.create_task(registration.offering(show))
        try:
            await asyncio.sleep(0.1)
            assert shown == []
            await kubelet.NotifyRegistrationStatus(RegistrationStatus(error=AWAY))
            await until(lambda: len(shown) == 2)  # the first could not be
            await asyncio.sleep(0.1)
            assert len(shown) == 2
            await kubelet.NotifyRegistrationStatus(RegistrationStatus(error=AWAY))
            await kubelet.NotifyRegistrationStatus(RegistrationStatus(plugin_registered=True))
            await asyncio.sleep(0.1)
            assert len(shown) == 2
        finally:
            offering.cancel()
            await asyncio.wait({offering})


async def test_the_socket_of_the_provisioner_comes_back_too(scratch: Path) -> None:
    path, stop, readiness = scratch / "csi.sock", asyncio.Event(), Readiness([Step.SERVED])
    api = cast(DeletingApi, None)  # who the driver is, is known without
    task = asyncio.create_task(run_provisioner(api, namespace="volumes", endpoint=path, stop=stop, readiness=readiness))
    try:
        await exists(path)
        path.unlink()
        await exists(path)
        async with Channel(path=str(path)) as channel:
            assert (await IdentityStub(channel).GetPluginInfo(GetPluginInfoRequest())).name == DRIVER
        assert (await readiness.page("")).status == 200
    finally:
        stop.set()
        await task
    assert not path.exists()
