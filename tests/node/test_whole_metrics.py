"""What the whole daemon tells Prometheus and kubelet's probes while it publishes, and while others are down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi import __version__
from cknix_csi.proto.csi_grpc import IdentityStub
from cknix_csi.proto.csi_pb2 import ProbeRequest
from tests.node.asked import SECOND, Asked, free_port
from tests.node.whole import Cluster, Source, WholeNode


@asynccontextmanager
async def probed(whole: WholeNode) -> AsyncIterator[IdentityStub]:
    async with Channel(path=str(whole.endpoint)) as channel:
        yield IdentityStub(channel)


@pytest.fixture
async def asked(whole: WholeNode) -> AsyncIterator[Asked]:
    """A daemon that has been launched, which nobody has registered yet."""
    port = free_port()
    async with aiohttp.ClientSession() as client:
        whole.launch(CKNIX_METRICS_LISTEN=f"127.0.0.1:{port}")
        yield Asked(client, port)


async def test_what_is_scraped_is_what_has_happened(whole: WholeNode, source: Source, asked: Asked) -> None:
    await whole.registered()
    await whole.publish("first", storePath=source.hello)
    await whole.publish("second", writable=True, storePath=source.hello)
    await whole.publish("second", writable=True, storePath=source.hello)
    assert (await whole.refused("third", storePath=f"/nix/store/{'0' * 32}-none"))[0] == "NOT_FOUND"
    await whole.unpublish("first")

    assert await asked.values("cknix_publish_duration_seconds_count") == {
        ("new", "OK"): 1,
        ("known", "OK"): 1,
        ("mounted", "OK"): 1,
        ("new", "PathNotFound"): 1,
    }
    assert await asked.values("cknix_unpublish_duration_seconds_count") == {("OK",): 1}
    operations = await asked.values("csi_plugin_operations_seconds_count")
    publishes = {
        code: count for (_, code, method), count in operations.items() if method.endswith("/NodePublishVolume")
    }
    assert publishes == {"OK": 3, "NotFound": 1}
    assert await asked.values("cknix_rpc_errors_total") == {("NodePublishVolume", "PathNotFound"): 1}

    assert await asked.values("cknix_fetch_duration_seconds_count") == {("OK",): 1, ("PathNotFound",): 1}
    sizes = [int(each.split()[1]) for each in whole.admin("nix", "path-info", "--size", *source.closure(source.hello))]
    assert await asked.value("cknix_fetched_bytes_total") == sum(sizes)
    assert await asked.value("cknix_fetches_running") == 0

    assert await asked.values("cknix_volumes") == {("redirect", "true"): 1}
    assert await asked.value("cknix_views") == 1
    assert await asked.value("cknix_ledger_volumes") == 1
    assert await asked.value("cknix_ledger_closures") == 1
    assert await asked.value("cknix_ledger_written") == 1
    assert 0 < await asked.value("cknix_data_root_free_bytes") < await asked.value("cknix_data_root_size_bytes")


async def test_a_fetch_is_seen_while_it_runs(whole: WholeNode, cluster: Cluster, source: Source, asked: Asked) -> None:
    await whole.registered()
    cluster.cache.stall()
    waiting = asyncio.create_task(whole.publish(storePath=source.hello))
    await whole.eventually("Nix fetches", whole.children)
    assert await asked.value("cknix_fetches_running") == 1
    cluster.cache.open()
    await waiting
    assert await asked.value("cknix_fetches_running") == 0


async def test_a_node_is_ready_once_kubelet_knows_and_whoever_else_is_down(
    whole: WholeNode, cluster: Cluster, source: Source, asked: Asked
) -> None:
    cluster.api.stall()
    cluster.cache.stall()
    assert await asked.becomes("/livez", 200) == "ok\n"
    unready = await asked.becomes("/readyz", 503)
    assert "[-] the driver is registered with kubelet" in unready.splitlines()
    await whole.registered()
    assert "[-]" not in await asked.becomes("/readyz", 200)
    async with probed(whole) as identity:
        assert (await identity.Probe(ProbeRequest(), timeout=SECOND)).ready.value
    assert await asked.values("cknix_build_info") == {("node", __version__): 1}


async def test_a_data_root_that_is_gone_makes_the_node_unready_but_not_dead(
    whole: WholeNode, source: Source, asked: Asked
) -> None:
    await whole.registered()
    await asked.becomes("/readyz", 200)
    views = whole.data / "views"
    views.rename(whole.data / "aside")
    views.mkdir()
    async with probed(whole) as identity:
        with pytest.raises(GRPCError) as raised:
            await identity.Probe(ProbeRequest(), timeout=SECOND)
        assert raised.value.status is Status.FAILED_PRECONDITION
        assert raised.value.message == (
            f"the data root {whole.data} is another directory than it was when this process started; "
            "restart the node daemon"
        )
        assert raised.value.message in await asked.becomes("/readyz", 503)
        assert (await asked.get("/livez"))[0] == 200
        whole.terminate()
    # What a restart mends.
    views.rmdir()
    (whole.data / "aside").rename(views)
    await whole.start()
    async with probed(whole) as identity:
        assert (await identity.Probe(ProbeRequest(), timeout=SECOND)).ready.value
