"""Nodes learn where the controller lives, with no more rights than they have."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from cknix_csi.controller.key import publish_config
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.kube.controllerplace import follow_controller, place_before
from tests.api import rbac
from tests.api.conftest import connected, eventually
from tests.api.server import DRIVER_NAMESPACE, Server


async def test_a_node_hears_where_the_controller_lives_and_when_it_moves(
    server: Server, api: KubernetesApi, node_api: KubernetesApi
) -> None:
    heard: list[str] = []

    async def moved(node: str) -> None:
        heard.append(node)

    async def heard_last(node: str) -> None:
        async def is_last() -> bool:
            return heard[-1:] == [node]

        await eventually(is_last)

    tasks: list[asyncio.Task[NoReturn]] = []

    def publish(node: str) -> None:
        config = publish_config(api, DRIVER_NAMESPACE, "http://cache", "k:cHVibGlj", node)
        tasks.append(asyncio.create_task(config))

    tasks.append(asyncio.create_task(follow_controller(node_api, DRIVER_NAMESPACE, moved)))
    try:
        for node in ("node-a", "node-b"):
            publish(node)
            await heard_last(node)
            tasks[-1].cancel()
        server.kubectl("delete", "-n", DRIVER_NAMESPACE, "configmap", "cknix-cache")
        publish("node-c")
        await heard_last("node-c")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.kubectl("delete", "-n", DRIVER_NAMESPACE, "--ignore-not-found", "configmap", "cknix-cache")


async def test_a_controller_knows_where_it_was_before_with_no_more_rights_than_it_has(server: Server) -> None:
    kubeconfig = server.kubeconfig("controller", rbac.token(server, rbac.CONTROLLER))
    try:
        async with connected(kubeconfig) as api:

            async def before(node: str) -> str:
                return await place_before(api, DRIVER_NAMESPACE, node)

            async def lives(node: str) -> None:
                config = publish_config(api, DRIVER_NAMESPACE, "http://cache", "k:cHVibGlj", node)
                task = asyncio.create_task(config)

                async def written() -> bool:
                    # Whoever comes to a third node knows the second.
                    return await before("no-node") == node

                await eventually(written)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            assert await before("node-a") == ""
            await lives("node-a")
            assert await before("node-a") == ""
            assert await before("node-b") == "node-a"
            await lives("node-b")
            assert await before("node-b") == "node-a"
            # A restart on the same node has not been elsewhere.
            await lives("node-b")
            assert await before("node-b") == "node-a"
            await lives("node-a")
            assert await before("node-a") == "node-b"
    finally:
        server.kubectl("delete", "-n", DRIVER_NAMESPACE, "--ignore-not-found", "configmap", "cknix-cache")
