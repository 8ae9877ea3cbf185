"""What the node daemon knows of its node's pods: by one watch with its own rights, whatever the API server does."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from cknix_csi.api.attributes import PodInfo
from cknix_csi.api.errors import CknixError, NotFound
from cknix_csi.api.situations import Code
from cknix_csi.kube.api import Json, WatchEvent, core
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.kube.events import EventRecorder
from cknix_csi.kube.pods import PodEvents, PodWatch
from tests.api.conftest import eventually
from tests.api.server import Server

NODE = "node-1"
_numbers = itertools.count(1)


class CountingApi:
    """The node's API, with the paths that were asked for."""

    def __init__(self, api: KubernetesApi) -> None:
        self._api = api
        self.asked: list[str] = []
        self.pages: list[int] = []

    async def get(self, path: str, **options: Any) -> Json:
        self.asked.append(path)
        answer = await self._api.get(path, **options)
        if "items" in answer:
            self.pages.append(len(answer["items"] or []))
        return answer

    async def create(self, path: str, body: Json, **options: Any) -> Json:
        return await self._api.create(path, body, **options)

    async def patch(self, path: str, body: Any, **options: Any) -> Json:
        return await self._api.patch(path, body, **options)

    def watch(self, path: str, **options: Any) -> AsyncIterator[WatchEvent]:
        return self._api.watch(path, **options)


class Pods:
    """Pods of a namespace, on nodes without a kubelet: they are never run."""

    def __init__(self, server: Server, api: KubernetesApi, namespace: str) -> None:
        self._server = server
        self._api = api
        self.namespace = namespace

    async def create(self, name: str, *, node: str = NODE, mirror_of: str = "", **spec: Any) -> PodInfo:
        annotations = {"kubernetes.io/config.mirror": mirror_of} if mirror_of else {}
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "annotations": annotations},
            "spec": {
                "nodeName": node,
                "automountServiceAccountToken": False,
                "containers": [{"name": "main", "image": "none"}],
                **spec,
            },
        }
        made = await self._api.create(core("pods", self.namespace), body)
        return PodInfo(name, self.namespace, mirror_of or made["metadata"]["uid"])

    def begin_to_delete(self, *names: str) -> None:
        """They stay for their grace period, which no kubelet ends."""
        self._server.kubectl("delete", "pod", *names, "-n", self.namespace, "--wait=false")

    def delete(self, name: str) -> None:
        self._server.kubectl("delete", "pod", name, "-n", self.namespace, "--force", "--grace-period=0")


@pytest_asyncio.fixture
async def pods(server: Server, api: KubernetesApi) -> AsyncIterator[Pods]:
    """Pods in a namespace of the test's own; all are deleted at its end."""
    namespace = f"pods-{os.getpid()}-{next(_numbers)}"
    await api.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    # Elsewhere the controller manager, which does not run here, makes it.
    server.kubectl("create", "serviceaccount", "default", "-n", namespace)
    yield Pods(server, api, namespace)
    if not server.running:
        server.start_api_server()
    server.kubectl("delete", "pods", "--all", "-n", namespace, "--force", "--grace-period=0")


@asynccontextmanager
async def running(watch: PodWatch) -> AsyncIterator[None]:
    task = asyncio.create_task(watch.run())
    try:
        yield
    finally:
        assert not task.done()
        task.cancel()
        await asyncio.wait({task})


async def knows(watch: PodWatch, count: int) -> None:
    """Wait until *watch* has been shown so many pods."""

    async def shown() -> bool:
        return len(watch._known) == count

    await eventually(shown)


async def test_pods_of_the_node_are_told_from_memory_and_others_asked_for_once(
    pods: Pods, node_api: KubernetesApi
) -> None:
    shifted = await pods.create("shifted", hostUsers=False)
    plain = await pods.create("plain")
    said = await pods.create("said", hostUsers=True)
    elsewhere = await pods.create("elsewhere", node="node-2", hostUsers=False)
    counting = CountingApi(node_api)
    watch = PodWatch(counting, NODE)
    async with running(watch):
        await knows(watch, 3)
        counting.asked.clear()
        for _ in range(3):
            assert [await watch.host_users(pod) for pod in (shifted, plain, said)] == [False, True, True]
        assert counting.asked == []
        assert await watch.host_users(elsewhere) is False
        assert counting.asked == [core("pods", pods.namespace, "elsewhere")]


async def test_a_pod_that_comes_and_goes_is_followed(pods: Pods, node_api: KubernetesApi) -> None:
    counting = CountingApi(node_api)
    watch = PodWatch(counting, NODE)
    async with running(watch):
        await knows(watch, 0)
        first = await pods.create("web", hostUsers=False)
        await knows(watch, 1)
        assert await watch.host_users(first) is False
        await asyncio.to_thread(pods.delete, "web")
        await knows(watch, 0)
        with pytest.raises(NotFound, match=f"pod {pods.namespace}/web with uid {first.uid} does not exist"):
            await watch.host_users(first)
        second = await pods.create("web")
        await knows(watch, 1)
        assert await watch.host_users(second) is True
        with pytest.raises(NotFound):  # another pod of that name is not the one that was asked about
            await watch.host_users(first)


async def test_a_pod_that_is_deleted_is_told_of_while_it_still_is_there(pods: Pods, node_api: KubernetesApi) -> None:
    watch = PodWatch(node_api, NODE)
    told: list[str] = []
    watch.on_ending(told.append)
    async with running(watch):
        pod, later = await pods.create("web"), await pods.create("later")
        static = await pods.create("static-node-1", mirror_of="0123456789abcdef")
        await knows(watch, 3)
        assert ([watch.ending(each) for each in (pod, later, static)], told) == ([False] * 3, [])
        await asyncio.to_thread(pods.begin_to_delete, "static-node-1", "web")

        async def ending() -> bool:
            return watch.ending(pod)

        await eventually(ending)
        # Of a static pod only the image is deleted.
        assert ([watch.ending(each) for each in (later, static)], set(told)) == ([False] * 2, {pod.uid})
    await asyncio.to_thread(pods.delete, "later")
    told.clear()
    async with running(watch):
        await knows(watch, 2)
        assert set(told) == {pod.uid, later.uid}


async def test_a_static_pod_is_known_by_the_uid_that_its_kubelet_has_for_it(
    pods: Pods, node_api: KubernetesApi
) -> None:
    static = await pods.create("static-node-1", mirror_of="0123456789abcdef", hostUsers=False)
    assert await PodWatch(node_api, NODE).host_users(static) is False


async def test_while_the_api_server_is_away_what_is_known_is_told_and_nothing_is_made_up(
    pods: Pods, node_api: KubernetesApi, server: Server
) -> None:
    shifted = await pods.create("shifted", hostUsers=False)
    watch = PodWatch(node_api, NODE)
    async with running(watch):
        await knows(watch, 1)
        server.kill_api_server()
        assert await watch.host_users(shifted) is False
        with pytest.raises(CknixError) as unknown:
            await watch.host_users(PodInfo("new", pods.namespace, "u-2"))
        assert unknown.value.code is Code.UNAVAILABLE
        await asyncio.to_thread(server.start_api_server)
        later = await pods.create("later", hostUsers=False)
        await knows(watch, 2)
        assert await watch.host_users(later) is False


async def test_of_many_pods_little_is_kept_and_they_are_read_page_by_page(pods: Pods, node_api: KubernetesApi) -> None:
    big = {"annotations": {"notes": "x" * 20_000}}
    made = []
    for number in range(60):
        made.append(await pods.create(f"pod-{number}", hostUsers=number % 2 == 0 or None))
    await asyncio.gather(*(_annotate(pods, pod, big) for pod in made))
    counting = CountingApi(node_api)
    watch = PodWatch(counting, NODE)
    async with running(watch):
        await knows(watch, 60)
        assert counting.pages == [50, 10]
        assert "x" * 1000 not in repr(watch._known)
        assert {await watch.host_users(pod) for pod in made} == {True}


async def _annotate(pods: Pods, pod: PodInfo, metadata: Json) -> None:
    path = core("pods", pod.namespace, pod.name)
    await pods._api.patch(path, {"metadata": metadata}, kind="application/merge-patch+json")


async def test_an_event_reaches_the_pod_with_the_nodes_rights(
    pods: Pods, node_api: KubernetesApi, api: KubernetesApi
) -> None:
    pod = await pods.create("copied")
    recorder = EventRecorder(node_api, component="cknix-node", instance=NODE)
    posting = asyncio.create_task(recorder.run())
    events = PodEvents(recorder)
    events.post(PodInfo(), "VolumeCopied", "to nobody")
    for _ in range(2):  # a container that comes back gets the same news, which raises the first one's count
        events.post(pod, "VolumeCopied", "it cost 3 bytes")
    query = {"fieldSelector": f"involvedObject.uid={pod.uid}"}

    async def posted() -> bool:
        items = (await api.get(core("events", pods.namespace), query=query))["items"]
        return [item["count"] for item in items] == [2]

    await eventually(posted)
    posting.cancel()
    await asyncio.wait({posting})
    (event,) = (await api.get(core("events", pods.namespace), query=query))["items"]
    assert (event["type"], event["reason"], event["message"]) == ("Normal", "VolumeCopied", "it cost 3 bytes")
    assert event["involvedObject"]["kind"] == "Pod"
    assert event["source"]["component"] == "cknix-node"
