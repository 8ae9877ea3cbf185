"""While the definition of Expressions (the CRD) is being deleted, the API server deletes all of them and waits for us.

kopf is of no use then: discovery does not show at its start that Expressions can be patched, so it serves none of them.
And after an installation over a half-finished removal they wait from the start on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from cknix_csi.api.expression import FINALIZER
from cknix_csi.kube.api import (
    CONFLICT,
    JSON_PATCH,
    NOT_FOUND,
    UNPROCESSABLE,
    Api,
    ApiError,
    Json,
    expressions,
    list_all,
)
from cknix_csi.kube.definition import DEFINITIONS, NAME, Definition
from cknix_csi.kube.events import Subject

POLL_SECONDS = 0.5
LAST_CHANCE_SECONDS = 10.0
_ASK_SECONDS = 2.0

Release = Callable[[Subject], Awaitable[None]]
"""Ends the work on an Expression and removes its roots; raises OSError when they cannot be removed."""

_log = logging.getLogger(__name__)


async def let_go(api: Api, release: Release) -> None:
    """Release Expressions that are being deleted, as they come, until there are no Expressions any more."""
    while True:
        if not await _remaining(api, release):
            return
        await asyncio.sleep(POLL_SECONDS)


async def let_go_at_last(api: Api, release: Release) -> None:
    """As :func:`let_go`, at the end of this process and for a short while: when all of cknix is being deleted.

    Does nothing when the definition is to stay: then the next controller goes on with its Expressions.
    """
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            definition = Definition.parse(await api.get(f"{DEFINITIONS}/{NAME}"))
        if definition.terminating:
            async with asyncio.timeout(LAST_CHANCE_SECONDS):
                await let_go(api, release)
    except (ApiError, TimeoutError) as error:
        _log.debug("nothing can be released at the end: %s", error)


async def _remaining(api: Api, release: Release) -> bool:
    """One round; False when there was nothing left to wait for."""
    try:
        found = (await list_all(api, expressions(), metadata_only=True)).items
    except ApiError as error:
        if error.status == NOT_FOUND:
            return False
        _log.warning("Expressions that are being deleted cannot be listed yet: %s", error.message)
        return True
    for item in found:
        metadata = item.get("metadata") or {}
        if metadata.get("deletionTimestamp"):
            await _let_one_go(api, release, metadata)
    return bool(found)


async def _let_one_go(api: Api, release: Release, metadata: Json) -> None:
    subject = Subject(str(metadata.get("namespace")), str(metadata.get("name")), str(metadata.get("uid")))
    finalizers = metadata.get("finalizers") or []
    if FINALIZER not in finalizers:
        return
    place = f"/metadata/finalizers/{finalizers.index(FINALIZER)}"
    patch: list[dict[str, Any]] = [
        {"op": "test", "path": "/metadata/uid", "value": subject.uid},
        {"op": "test", "path": place, "value": FINALIZER},
        {"op": "remove", "path": place},
    ]
    try:
        await release(subject)
        await api.patch(expressions(subject.namespace, subject.name), patch, kind=JSON_PATCH)
    except OSError as error:
        _log.warning("GC roots of %s not released: %s", subject, error)
    except ApiError as error:
        # Gone, or changed by somebody else: the next list tells.
        if error.status not in {NOT_FOUND, CONFLICT, UNPROCESSABLE}:
            _log.warning("the finalizer of %s not removed: %s", subject, error.message)
