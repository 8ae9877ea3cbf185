"""Where the controller lives, as it says itself in the ConfigMap of its cache."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn

from cknix_csi.kube.api import Api, Json, core
from cknix_csi.kube.cacheconfig import NAME
from cknix_csi.kube.listwatch import list_and_watch

NODE = "node"
"""Key in the ConfigMap: name of the controller's node."""
_AGAIN_SECONDS = 10.0


async def follow_controller(api: Api, namespace: str, moved: Callable[[str], Awaitable[None]]) -> NoReturn:
    """Call *moved* with the name of the controller's node, now and whenever the ConfigMap is written; for ever.

    And again every few seconds, since a controller that has just been replaced may still live where it was.  A
    ConfigMap that is missing or does not say is no news.
    """
    news: asyncio.Queue[str] = asyncio.Queue()

    def see(body: Json) -> None:
        node = (body.get("data") or {}).get(NODE)
        if isinstance(node, str) and node:
            news.put_nowait(node)

    async def tell() -> NoReturn:
        node = await news.get()
        while True:
            await moved(node)
            with suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_SECONDS):
                    node = await news.get()

    def listed(items: list[Json]) -> None:
        for item in items:
            see(item)

    def changed(kind: str, body: Json) -> None:
        if kind != "DELETED":
            see(body)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(tell())
        only = {"fieldSelector": f"metadata.name={NAME}"}
        await list_and_watch(api, core("configmaps", namespace), listed=listed, changed=changed, query=only)
    raise AssertionError("list_and_watch does not end")
