"""List, then watch, then list again: a copy of a collection that is never far behind and survives every outage."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import NoReturn

from cknix_csi.kube.api import GONE, Api, ApiError, Json, list_all
from cknix_csi.kube.backoff import Backoff

# One stream lasts between one and two of these.  Ending it now and then spreads clients over API servers.
WATCH_SECONDS = 300.0

_log = logging.getLogger(__name__)


async def list_and_watch(
    api: Api,
    path: str,
    *,
    listed: Callable[[list[Json]], None],
    changed: Callable[[str, Json], None],
    query: Mapping[str, str] | None = None,
    trim: Callable[[Json], Json] = lambda item: item,
    page: int = 250,
) -> NoReturn:
    """Follow the objects at *path*, or those that *query* selects, for ever; an API server that is away is waited for.

    *listed* gets every complete list: what is not in it is gone.  *changed* gets each change after it (ADDED, MODIFIED
    or DELETED, and the object).  *trim* and *page*: how lists are kept small while they are read.
    """
    backoff = Backoff(first=0.2, cap=15.0)
    # Nothing but changes, or a stream to its end, shows that a version was any good: not the list that it is from.
    expired = Backoff(first=0.2, cap=15.0)
    version: str | None = None
    while True:
        try:
            if version is None:
                listing = await list_all(api, path, query=query, trim=trim, page=page)
                listed(listing.items)
                version = listing.resource_version
                backoff.reset()
            timeout = WATCH_SECONDS * (1 + random.random())  # noqa: S311 - spreads load, guards nothing
            async for event in api.watch(path, resource_version=version, timeout=timeout, query=query):
                version = str(event.object["metadata"]["resourceVersion"])
                backoff.reset()
                expired.reset()
                if event.kind != "BOOKMARK":
                    changed(event.kind, event.object)
        except ApiError as error:
            gone = error.status == GONE
            if gone:
                version = None
            waits = expired if gone else backoff
            delay = waits.next()
            # A version that is too old is no news, but one that was too old at once is.
            _log.log(
                logging.WARNING if waits.tries == 1 + gone else logging.DEBUG,
                "%s; following %s again in %.1f s",
                error.message,
                path,
                delay,
            )
            await asyncio.sleep(delay)
        else:
            expired.reset()
            # A server that ends streams at once must not be asked in a busy loop.
            await asyncio.sleep(0.05)
