"""An API server in memory: objects by path, the few kinds of requests the controller makes, failures on demand."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from cknix_csi.kube.api import CONFLICT, JSON_PATCH, NOT_FOUND, UNPROCESSABLE, Api, ApiError, Json, WatchEvent


class FakeApi(Api):
    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], ApiError | None] = lambda method, path: None
        self.watched: asyncio.Queue[WatchEvent | ApiError] = asyncio.Queue()

    async def get(self, path: str, *, query: Mapping[str, str] | None = None, metadata_only: bool = False) -> Json:
        self._asked("GET", path)
        return copy.deepcopy(self._find(path))

    async def create(self, path: str, body: Json, *, query: Mapping[str, str] | None = None) -> Json:
        self._asked("POST", path)
        full = f"{path}/{body['metadata']['name']}"
        if full in self.objects:
            raise ApiError("already exists", status=CONFLICT)
        self.objects[full] = copy.deepcopy(body)
        return body

    async def patch(self, path: str, body: Any, *, kind: str, query: Mapping[str, str] | None = None) -> Json:
        self._asked("PATCH", path)
        if kind == JSON_PATCH:
            found = self._find(path.removesuffix("/status"))
            for operation in body:
                if operation["op"] == "test":
                    value: Any = found
                    for key in operation["path"].strip("/").split("/"):
                        value = value.get(key)
                    if value != operation["value"]:
                        raise ApiError("the server rejected our request", status=UNPROCESSABLE)
                else:
                    found[operation["path"].strip("/")] = copy.deepcopy(operation["value"])
            return copy.deepcopy(found)
        found = self.objects.setdefault(path, {}) if "apply" in kind else self._find(path)
        found.update(copy.deepcopy(body))
        return copy.deepcopy(found)

    async def watch(
        self, path: str, *, resource_version: str, timeout: float, query: Mapping[str, str] | None = None
    ) -> AsyncIterator[WatchEvent]:
        self._asked("WATCH", path)
        while True:
            event = await self.watched.get()
            if isinstance(event, ApiError):
                raise event
            yield event

    def _find(self, path: str) -> Json:
        if path not in self.objects:
            raise ApiError(f"{path} not found", status=NOT_FOUND)
        return self.objects[path]

    def _asked(self, method: str, path: str) -> None:
        self.requests.append((method, path))
        if (error := self.fail(method, path)) is not None:
            raise error
