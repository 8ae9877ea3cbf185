"""The kube room and the controller's dealings with the API server, on an API server in memory."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from cknix_csi.api.situations import Code
from cknix_csi.api.storepath import StorePath
from cknix_csi.controller.key import MalformedKey, ensure_key
from cknix_csi.controller.nodes import ClusterSystems, systems_of
from cknix_csi.controller.roots import owner, release_orphans, root_name
from cknix_csi.kube.api import JSON_PATCH, ApiError, Json, WatchEvent, core, expressions, list_all
from cknix_csi.kube.backoff import Backoff
from cknix_csi.kube.cacheconfig import CacheConfig
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.kube.events import MAX_MESSAGE, Event, EventRecorder, Subject
from cknix_csi.kube.expressions import ExpressionWatch
from cknix_csi.nix.cache.signing import KeyPair, generate_key
from cknix_csi.nix.substituters import CacheEndpoint
from tests.unit.fakeapi import FakeApi

UID = "01234567-89ab-cdef-0123-456789abcdef"
HASH = "7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb"
SECRET = core("secrets", "s", "cknix-cache-key")


def listing(*items: Json, kind: str = "ExpressionList", **metadata: str) -> Json:
    return {"kind": kind, "metadata": {"resourceVersion": "1", **metadata}, "items": list(items)}


def test_importing_the_kube_room_does_not_import_a_kubernetes_client() -> None:
    modules = "client, expressions, cacheconfig, events"
    code = f"import sys; from cknix_csi.kube import {modules}; assert 'kubernetes_asyncio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest_asyncio.fixture
async def deaf() -> AsyncIterator[KubernetesApi]:
    """The real client, with nobody listening where it calls."""
    from kubernetes_asyncio.client import ApiClient, Configuration

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with ApiClient(Configuration(host=f"http://127.0.0.1:{port}")) as client:
        yield KubernetesApi(client)


async def test_nobody_listening_is_an_api_error_of_every_call(deaf: KubernetesApi) -> None:
    async def watch() -> None:
        async for _ in deaf.watch("/apis", resource_version="1", timeout=1):
            pass

    for call in (deaf.get("/api"), deaf.create("/api", {}), deaf.patch("/api", {}, kind=JSON_PATCH), watch()):
        with pytest.raises(ApiError, match="did not answer") as error:
            await call
        assert error.value.status is None
        assert error.value.code is Code.UNAVAILABLE


@pytest_asyncio.fixture
async def talking() -> AsyncIterator[tuple[KubernetesApi, list[bytes]]]:
    """The real client and a server that answers every request with the lines given, in pieces."""
    from kubernetes_asyncio.client import ApiClient, Configuration

    lines: list[bytes] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        text = b"".join(line + b"\n" for line in lines)
        for start in range(0, len(text), 7):
            await response.write(text[start : start + 7])
        return response

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with ApiClient(Configuration(host=host)) as client:
        yield KubernetesApi(client), lines
    await runner.cleanup()


def line(kind: str, **fields: Any) -> bytes:
    return json.dumps({"type": kind, "object": fields}).encode()


async def collect(api: KubernetesApi) -> list[str]:
    return [event.kind async for event in api.watch("/x", resource_version="1", timeout=1)]


async def test_a_watch_is_read_whatever_its_pieces(talking: tuple[KubernetesApi, list[bytes]]) -> None:
    api, lines = talking
    version = {"metadata": {"resourceVersion": "5"}}
    lines += [
        line("ADDED", **version, text="x" * 100),
        b"",
        line("FROM_THE_FUTURE", **version),
        line("BOOKMARK", **version),
    ]
    assert await collect(api) == ["ADDED", "BOOKMARK"]


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (line("ERROR", code=410, message="too old"), 410),
        (line("ERROR", code=500, message="boom"), 500),
        (line("ERROR"), 410),
        (b"{half", None),
        (b"[]", None),
        (b'{"type": "ADDED", "object": null}', None),
        (line("ADDED", metadata={}), None),
    ],
    ids=["too old", "server error", "no code", "half a line", "a list", "no object", "no version"],
)
async def test_a_watch_that_goes_wrong_is_an_api_error(
    talking: tuple[KubernetesApi, list[bytes]], bad: bytes, status: int | None
) -> None:
    api, lines = talking
    lines.append(bad)
    with pytest.raises(ApiError) as error:
        await collect(api)
    assert error.value.status == status


def test_delays_grow_to_the_cap_with_at_most_half_of_them_random() -> None:
    longest = Backoff(first=1, cap=10, draw=lambda: 1.0)
    assert [longest.next() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    shortest = Backoff(first=1, cap=10, draw=lambda: 0.0)
    assert [shortest.next() for _ in range(6)] == [0.5, 1, 2, 4, 5, 5]
    for _ in range(5000):
        longest.next()
    assert longest.next() == 10
    longest.reset()
    assert longest.next() == 1


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"kind": "ExpressionList", "metadata": {"resourceVersion": "1"}},
        {"kind": "ExpressionList", "metadata": {}, "items": []},
        {"kind": "Status", "metadata": {"resourceVersion": "1"}, "items": []},
        {"kind": "ExpressionList", "metadata": {"resourceVersion": "1"}, "items": {}, "x": 1} | {"items": "none"},
    ],
    ids=["nothing", "no items", "no version", "another kind", "items that are text"],
)
async def test_an_answer_that_is_not_a_complete_list_is_an_error(answer: Json) -> None:
    api = FakeApi()
    api.objects[expressions()] = answer
    with pytest.raises(ApiError, match="is not a list"):
        await list_all(api, expressions())


class Roots:
    def __init__(self, *names: str) -> None:
        self.found = {name: StorePath(HASH, "x") for name in names}

    def add(self, name: str, path: StorePath) -> None:
        self.found[name] = path

    def remove(self, name: str) -> None:
        self.found.pop(name, None)

    def list(self) -> dict[str, StorePath]:
        return dict(self.found)


def test_a_root_is_found_again_by_the_uid_in_its_name() -> None:
    name = root_name(Subject("n", "my.app", UID), "x86_64-linux", StorePath(HASH, "hello"))
    assert owner(name) == UID
    assert owner("closures/x") is None
    assert owner("n/a/not-a-uid-x86_64-linux") is None
    assert owner("n/a/b/" + UID + "-x") is None


async def test_a_root_made_while_the_list_is_read_is_not_taken_for_an_orphan() -> None:
    api, roots = FakeApi(), Roots(f"n/gone/{UID}-s-h")
    newcomer = f"n/new/{UID[:-1]}0-s-h"

    def meanwhile(method: str, path: str) -> None:
        roots.add(newcomer, StorePath(HASH, "new"))

    api.fail = meanwhile
    api.objects[expressions()] = listing()
    await release_orphans(api, roots)
    assert list(roots.found) == [newcomer]


def test_only_linux_nodes_of_known_kinds_count() -> None:
    def node(arch: str | None, os: str = "linux") -> Json:
        return {"metadata": {"labels": {"kubernetes.io/os": os, **({"kubernetes.io/arch": arch} if arch else {})}}}

    nodes = [node("arm64"), node("amd64"), node("amd64", "windows"), node("mips"), node(None), {"metadata": {}}]
    assert systems_of(nodes) == ("x86_64-linux", "aarch64-linux")
    assert systems_of([node("s390x", "windows")]) == ()


async def test_nodes_are_listed_once_a_minute_at_most() -> None:
    api, time = FakeApi(), 0.0
    api.objects[core("nodes")] = listing(kind="NodeList")
    systems = ClusterSystems(api, clock=lambda: time)
    await systems.systems()
    await systems.systems()
    assert len(api.requests) == 1
    time = 60.0
    await systems.systems()
    assert len(api.requests) == 2


async def test_two_controllers_that_start_at_once_end_up_with_one_key() -> None:
    api = FakeApi()
    first, second = await asyncio.gather(ensure_key(api, "s", generate_key), ensure_key(api, "s", generate_key))
    assert first == second
    assert await ensure_key(api, "s", generate_key) == first


async def test_the_loser_of_the_race_takes_the_winners_key() -> None:
    api = FakeApi()
    winner = generate_key("cknix-cache-1")

    def make(name: str) -> KeyPair:
        # Between our look and our write, the other controller writes.
        return generate_key(name)

    other = FakeApi()
    await ensure_key(other, "s", lambda name: winner)

    def race(method: str, path: str) -> None:
        if method == "POST":
            api.objects[SECRET] = other.objects[SECRET]

    api.fail = race
    assert await ensure_key(api, "s", make) == winner


async def test_a_secret_without_a_key_is_an_error_that_says_what_to_do() -> None:
    api = FakeApi()
    for data in (None, {}, {"secretKey": "!"}, {"secretKey": "bm90IGEga2V5"}):
        api.objects[SECRET] = {"data": data}
        with pytest.raises(MalformedKey, match="delete it to have a new one made"):
            await ensure_key(api, "s", generate_key)


async def test_an_api_server_that_is_away_makes_the_key_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    api, failures = FakeApi(), [ApiError("away", status=None)]
    monkeypatch.setattr(Backoff, "next", lambda self: 0.0)
    api.fail = lambda method, path: failures.pop() if failures else None
    assert (await ensure_key(api, "s", generate_key)).name.startswith("cknix-cache-")


def event(message: str) -> Event:
    return Event(Subject("n", "a" * 253, UID), "Normal", "Built", message)


def test_events_names_are_the_same_for_the_same_news_only() -> None:
    assert event("a").name == event("a").name
    assert event("a").name != event("b").name
    assert len(event("a").name) <= 253


async def test_a_long_message_keeps_its_end_within_the_limit_of_an_event() -> None:
    api = FakeApi()
    recorder = EventRecorder(api, component="c", instance="i")
    task = asyncio.create_task(recorder.run())
    recorder.post(Subject("n", "a", UID), "Warning", "BuildFailed", "ä" * 5000 + "the end")
    while not api.objects:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    (body,) = api.objects.values()
    assert body["message"].endswith("the end")
    assert len(body["message"].encode()) <= MAX_MESSAGE


async def test_an_event_that_expired_between_two_requests_is_made_again() -> None:
    api = FakeApi()
    recorder = EventRecorder(api, component="c", instance="i")
    subject = Subject("n", "a", UID)
    task = asyncio.create_task(recorder.run())
    recorder.post(subject, "Normal", "Built", "x")
    while not api.objects:
        await asyncio.sleep(0)

    def expires(method: str, path: str) -> None:
        if method == "PATCH":
            api.objects.clear()

    api.fail = expires
    recorder.post(subject, "Normal", "Built", "x")
    while [method for method, _ in api.requests].count("POST") < 3:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert [body["count"] for body in api.objects.values()] == [1]


def expression(name: str, version: str, uid: str = UID) -> Json:
    return {"metadata": {"namespace": "n", "name": name, "uid": uid, "resourceVersion": version, "generation": 1}}


async def test_a_deletion_of_the_predecessor_does_not_hide_its_successor() -> None:
    api = FakeApi()
    api.objects[expressions()] = listing(expression("a", "1", "new"))
    watch = ExpressionWatch(api)
    task = asyncio.create_task(watch.run())
    while ("WATCH", expressions()) not in api.requests:
        await asyncio.sleep(0)
    api.watched.put_nowait(WatchEvent("DELETED", expression("a", "2", "old")))
    api.watched.put_nowait(WatchEvent("MODIFIED", expression("b", "3")))
    seen = await watch.get("n", "a")
    assert seen.uid == "new"
    task.cancel()
    await asyncio.wait({task})


async def test_what_vanished_while_the_watch_was_away_is_gone_after_the_next_list() -> None:
    api = FakeApi()
    api.objects[expressions()] = listing(expression("a", "1"))
    watch = ExpressionWatch(api)
    task = asyncio.create_task(watch.run())
    while ("WATCH", expressions()) not in api.requests:
        await asyncio.sleep(0)
    seen = await watch.get("n", "a")
    waiting = asyncio.create_task(watch.changed(seen))
    await asyncio.sleep(0)
    api.objects[expressions()] = listing(expression("b", "5"))
    api.watched.put_nowait(ApiError("too old", status=410))
    with pytest.raises(Exception, match="n/a does not exist"):
        async with asyncio.timeout(5):
            await waiting
    task.cancel()
    await asyncio.wait({task})


async def test_a_cache_that_cannot_be_remembered_is_still_used(tmp_path: Path) -> None:
    api = FakeApi()
    api.objects[core("configmaps", "s", "cknix-cache")] = {"data": {"url": "http://c", "publicKey": "k:1"}}
    (tmp_path / "file").touch()
    config = CacheConfig(api, "s", tmp_path / "file/cache.json")
    assert await config.endpoints() == (CacheEndpoint("http://c", "k:1"),)


@pytest.mark.parametrize("data", [None, {}, {"url": "http://c"}, {"url": " ", "publicKey": "k"}, {"url": 1}])
async def test_an_incomplete_config_names_no_cache(data: Json | None, tmp_path: Path) -> None:
    api = FakeApi()
    api.objects[core("configmaps", "s", "cknix-cache")] = {"data": data}
    assert await CacheConfig(api, "s", tmp_path / "cache.json").endpoints() == ()
    assert not (tmp_path / "cache.json").exists()
