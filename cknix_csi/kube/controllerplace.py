"""Where the controller lives, as it says itself in the ConfigMap of its cache."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn

from cknix_csi.api.errors import CknixError
from cknix_csi.kube.api import MERGE_PATCH, NOT_FOUND, Api, ApiError, Json, core
from cknix_csi.kube.cacheconfig import NAME
from cknix_csi.kube.listwatch import list_and_watch
from cknix_csi.repeats import Repeats

NODE = "node"
"""Key in the ConfigMap: name of the controller's node."""
BEFORE = "nodeBefore"
"""Key in the ConfigMap: name of the last other node that the controller was on."""
_AGAIN_SECONDS = 10.0

_log = logging.getLogger(__name__)


async def place_before(api: Api, namespace: str, node: str) -> str:
    """The last node other than *node* that a controller was on, whether *node* is written there already or not.

    Empty when that is not known.  Raises ApiError.
    """
    try:
        # A patch answers with the whole object, so that the right to read ConfigMaps is not needed.
        body = await api.patch(core("configmaps", namespace, NAME), {}, kind=MERGE_PATCH)
    except ApiError as error:
        if error.status == NOT_FOUND:
            return ""
        raise
    data = body.get("data") or {}
    last = data.get(NODE)
    return str((last if last and last != node else data.get(BEFORE)) or "")


async def follow_controller(
    api: Api, namespace: str, moved: Callable[[str], Awaitable[None]], *, again_seconds: float = _AGAIN_SECONDS
) -> NoReturn:
    """Call *moved* with the name of the controller's node, now and whenever the ConfigMap is written; for ever.

    And again every *again_seconds*: a controller that has just been replaced may still live where it was, and what
    *moved* could not do it may do then; an OSError or CknixError of it is logged.  A ConfigMap that is missing or does
    not say is no news.
    """
    news: asyncio.Queue[str] = asyncio.Queue()

    def see(body: Json) -> None:
        node = (body.get("data") or {}).get(NODE)
        if isinstance(node, str) and node:
            news.put_nowait(node)

    async def tell() -> NoReturn:
        node = await news.get()
        failures = Repeats()
        while True:
            try:
                await moved(node)
                failures.over(node)
            except (CknixError, OSError) as error:
                level = logging.WARNING if failures.failed(node, str(error)).aloud else logging.DEBUG
                _log.log(level, "what follows from the controller being on node %s is not done: %s", node, error)
            with suppress(TimeoutError):
                async with asyncio.timeout(again_seconds):
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
