"""Which binary cache the nodes of this cluster believe: a ConfigMap that the controller writes and every node reads."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cknix_csi.kube.api import NOT_FOUND, Api, ApiError, core
from cknix_csi.nix.substituters import CacheEndpoint

NAME = "cknix-cache"
URL = "url"
PUBLIC_KEY = "publicKey"

# Many volumes at once ask once; a new key after the controller's data were lost is seen soon enough.
FRESH_SECONDS = 10.0
_PATIENCE_SECONDS = 5.0

_log = logging.getLogger(__name__)


class CacheConfig:
    """Reads the ConfigMap ``cknix-cache``; a copy in *copy* keeps nodes working while no API server answers."""

    def __init__(self, api: Api, namespace: str, copy: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._path = core("configmaps", namespace, NAME)
        self._copy = copy
        self._clock = clock
        self._lock = asyncio.Lock()
        self._asked: float | None = None
        self._endpoints: tuple[CacheEndpoint, ...] = ()

    async def endpoints(self) -> tuple[CacheEndpoint, ...]:
        """The caches to fetch from; none when the controller has not published one yet."""
        async with self._lock:
            if self._asked is None or self._clock() - self._asked >= FRESH_SECONDS:
                self._endpoints = await self._read()
                self._asked = self._clock()
            return self._endpoints

    async def _read(self) -> tuple[CacheEndpoint, ...]:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                answer = await self._api.get(self._path)
        except (ApiError, TimeoutError) as error:
            if isinstance(error, ApiError) and error.status == NOT_FOUND:
                # An answer: there is no cache now.  The copy is kept for the time when nobody answers.
                return ()
            _log.warning("the ConfigMap %s cannot be read (%s); using this node's copy", NAME, error)
            return self._endpoints or await asyncio.to_thread(self._load)
        endpoints = _parse(answer.get("data"))
        if not endpoints:
            _log.warning("the ConfigMap %s lacks %s or %s", NAME, URL, PUBLIC_KEY)
        elif endpoints != self._endpoints:
            await asyncio.to_thread(self._save, endpoints[0])
        return endpoints

    def _load(self) -> tuple[CacheEndpoint, ...]:
        try:
            return _parse(json.loads(self._copy.read_bytes()))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read: %s", self._copy, error)
            return ()

    def _save(self, endpoint: CacheEndpoint) -> None:
        content = json.dumps({URL: endpoint.url, PUBLIC_KEY: endpoint.public_key}).encode()
        beside = self._copy.with_name(self._copy.name + ".new")
        try:
            self._copy.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._copy)
        except OSError as error:
            # Only the next outage would miss it; the fetch that asked has its answer.
            _log.warning("%s cannot be written: %s", self._copy, error)


def _parse(data: Any) -> tuple[CacheEndpoint, ...]:
    if not isinstance(data, dict):
        return ()
    url, key = data.get(URL), data.get(PUBLIC_KEY)
    if not isinstance(url, str) or not isinstance(key, str) or not url.strip() or not key.strip():
        return ()
    return (CacheEndpoint(url.strip(), key.strip()),)
