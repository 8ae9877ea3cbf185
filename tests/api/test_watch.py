"""What the node daemon reads of the API server: with its own rights, and while the API server comes and goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from cknix_csi.api.errors import CknixError, NotFound
from cknix_csi.api.situations import Code
from cknix_csi.api.storepath import StorePath
from cknix_csi.kube import cacheconfig
from cknix_csi.kube.api import MERGE_PATCH, core, expressions
from cknix_csi.kube.cacheconfig import CacheConfig
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.kube.expressions import ExpressionWatch
from cknix_csi.nix.substituters import CacheEndpoint
from tests.api.conftest import Expressions, eventually
from tests.api.fakenix import store_path
from tests.api.server import DRIVER_NAMESPACE, Server


@pytest_asyncio.fixture
async def watch(node_api: KubernetesApi) -> AsyncIterator[ExpressionWatch]:
    """A running watch."""
    watch = ExpressionWatch(node_api)
    task = asyncio.create_task(watch.run())
    yield watch
    task.cancel()
    await asyncio.wait({task})


async def set_result(expr: Expressions, name: str, result: str) -> None:
    """Write a status as the controller would."""
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Succeeded",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    status = {
        "phase": "Succeeded",
        "observedGeneration": 1,
        "results": [{"system": "x86_64-linux", "path": result}],
        "conditions": [ready],
    }
    path = expressions(expr.namespace, name, status=True)
    await expr.api.patch(path, {"status": status}, kind=MERGE_PATCH)


async def test_an_expression_made_a_moment_ago_is_asked_for(expr: Expressions, node_api: KubernetesApi) -> None:
    never_run = ExpressionWatch(node_api)
    await expr.create("a", "1")
    assert (await never_run.get(expr.namespace, "a")).phase == "Pending"
    with pytest.raises(NotFound, match=f"Expression {expr.namespace}/nobody does not exist"):
        await never_run.get(expr.namespace, "nobody")


async def test_a_change_of_the_status_wakes_who_waits_for_it(expr: Expressions, watch: ExpressionWatch) -> None:
    await expr.create("a", "1")
    await expr.create("b", "1")
    seen = await watch.get(expr.namespace, "a")
    waiting = asyncio.create_task(watch.changed(seen))
    await set_result(expr, "b", str(store_path("b")))
    await set_result(expr, "a", str(store_path("a")))
    async with asyncio.timeout(20):
        changed = await waiting
    assert changed.ready
    assert changed.results == {"x86_64-linux": store_path("a")}


async def test_a_deletion_wakes_who_waits(expr: Expressions, watch: ExpressionWatch) -> None:
    await expr.create("a", "1")
    seen = await watch.get(expr.namespace, "a")
    waiting = asyncio.create_task(watch.changed(seen))
    await asyncio.sleep(0)
    expr.delete("a")
    with pytest.raises(NotFound):
        async with asyncio.timeout(20):
            await waiting


async def test_a_path_is_wanted_as_long_as_any_expression_has_it_for_a_result(
    expr: Expressions, watch: ExpressionWatch
) -> None:
    one, two = store_path("wanted-one"), store_path("wanted-two")

    async def are(*wanted: StorePath) -> None:
        async def seen() -> bool:
            return [path for path in (one, two) if watch.wants(path)] == list(wanted)

        await eventually(seen)

    for name in ("a", "b"):
        await expr.create(name, "1")
        await set_result(expr, name, str(one))
    await are(one)
    await set_result(expr, "a", str(two))
    await are(one, two)
    expr.delete("b")
    await are(two)
    expr.delete("a")
    await are()


async def test_a_known_expression_is_told_from_memory_while_the_api_server_is_away(
    expr: Expressions, watch: ExpressionWatch, server: Server
) -> None:
    await expr.create("a", "1")
    await set_result(expr, "a", str(store_path("one")))

    async def known() -> bool:
        return (await watch.get(expr.namespace, "a")).ready and len(watch._known) >= 1

    await eventually(known)
    server.kill_api_server()
    assert (await watch.get(expr.namespace, "a")).results == {"x86_64-linux": store_path("one")}
    with pytest.raises(CknixError) as unknown:
        await watch.get(expr.namespace, "b")
    assert unknown.value.code is Code.UNAVAILABLE
    waiting = asyncio.create_task(watch.changed(await watch.get(expr.namespace, "a")))
    await asyncio.to_thread(server.start_api_server)
    await set_result(expr, "a", str(store_path("two")))
    async with asyncio.timeout(40):
        assert (await waiting).results == {"x86_64-linux": store_path("two")}


async def test_a_watch_that_begins_without_an_api_server_waits_for_it(
    expr: Expressions, node_api: KubernetesApi, server: Server
) -> None:
    await expr.create("a", "1")
    server.kill_api_server()
    watch = ExpressionWatch(node_api)
    task = asyncio.create_task(watch.run())
    with pytest.raises(CknixError) as unknown:
        await watch.get(expr.namespace, "a")
    assert unknown.value.code is Code.UNAVAILABLE
    await asyncio.to_thread(server.start_api_server)
    await eventually(lambda: _knows(watch, expr.namespace, "a"))
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})


async def _knows(watch: ExpressionWatch, namespace: str, name: str) -> bool:
    try:
        return (await watch.get(namespace, name)).name == name
    except CknixError:
        return False


async def test_an_object_of_a_megabyte_passes_through_the_watch(expr: Expressions, watch: ExpressionWatch) -> None:
    await expr.create("first", "1")
    await watch.get(expr.namespace, "first")
    await expr.create("big", "😀" * 131_072)
    seen = await watch.get(expr.namespace, "big")
    waiting = asyncio.create_task(watch.changed(seen))
    await set_result(expr, "big", str(store_path("big")))
    async with asyncio.timeout(20):
        assert (await waiting).ready


@pytest.fixture
def config_map(server: Server) -> Iterator[None]:
    """The ConfigMap as the controller writes it; gone afterwards."""
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "cknix-cache", "namespace": DRIVER_NAMESPACE},
        "data": {"url": "http://cache", "publicKey": "k:1"},
    }
    server.kubectl("create", "-f", "-", stdin=json.dumps(body))
    yield
    if not server.running:
        server.start_api_server()
    server.kubectl("delete", "cm", "cknix-cache", "-n", DRIVER_NAMESPACE, "--ignore-not-found")


async def test_there_is_no_cache_before_the_controller_names_one(
    server: Server, node_api: KubernetesApi, tmp_path: Path
) -> None:
    config = CacheConfig(node_api, DRIVER_NAMESPACE, tmp_path / "state/cache.json")
    assert await config.endpoints() == ()


@pytest.mark.usefixtures("config_map")
async def test_the_cache_is_remembered_over_a_restart_without_an_api_server(
    server: Server, node_api: KubernetesApi, tmp_path: Path
) -> None:
    copy = tmp_path / "state/cache.json"
    expected = (CacheEndpoint("http://cache", "k:1"),)
    assert await CacheConfig(node_api, DRIVER_NAMESPACE, copy).endpoints() == expected
    server.kill_api_server()
    assert await CacheConfig(node_api, DRIVER_NAMESPACE, copy).endpoints() == expected
    copy.write_text("{half of")
    assert await CacheConfig(node_api, DRIVER_NAMESPACE, copy).endpoints() == ()


@pytest.mark.usefixtures("config_map")
async def test_a_new_key_is_seen_after_a_short_while_and_not_asked_for_each_time(
    server: Server, api: KubernetesApi, node_api: KubernetesApi, tmp_path: Path
) -> None:
    time = 0.0
    config = CacheConfig(node_api, DRIVER_NAMESPACE, tmp_path / "cache.json", clock=lambda: time)
    assert await config.endpoints() == (CacheEndpoint("http://cache", "k:1"),)
    await api.patch(
        core("configmaps", DRIVER_NAMESPACE, "cknix-cache"), {"data": {"publicKey": "k:2"}}, kind=MERGE_PATCH
    )
    assert await config.endpoints() == (CacheEndpoint("http://cache", "k:1"),)
    time = cacheconfig.FRESH_SECONDS
    assert await config.endpoints() == (CacheEndpoint("http://cache", "k:2"),)
    assert json.loads((tmp_path / "cache.json").read_text()) == {"url": "http://cache", "publicKey": "k:2"}
