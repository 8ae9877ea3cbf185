"""Whether the API server has Expressions at all: their CustomResourceDefinition, watched by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cknix_csi.api import conditions
from cknix_csi.api.expression import GROUP, PLURAL
from cknix_csi.kube.api import Api, Json
from cknix_csi.kube.listwatch import list_and_watch

NAME = f"{PLURAL}.{GROUP}"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@dataclass(frozen=True, slots=True)
class Definition:
    """What matters of the CRD; one that is deleted and made again has another *uid*."""

    uid: str
    served: bool
    """Expressions can be made, read and watched."""
    terminating: bool
    """It is being deleted: the API server deletes every Expression, and then it."""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Definition:
        metadata = body.get("metadata") or {}
        found = (body.get("status") or {}).get("conditions") or []
        terminating = bool(metadata.get("deletionTimestamp")) or conditions.is_true(found, "Terminating")
        return cls(str(metadata.get("uid")), conditions.is_true(found, "Established") and not terminating, terminating)


ABSENT = Definition("", served=False, terminating=False)


class DefinitionWatch:
    """Knows the newest state of the definition while :meth:`run` runs; None until the API server has told."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._state: Definition | None = None
        self._news = asyncio.Event()

    async def run(self) -> NoReturn:
        """Follow the definition until cancelled; an API server that is away is waited for."""
        only = {"fieldSelector": f"metadata.name={NAME}"}
        await list_and_watch(self._api, DEFINITIONS, listed=self._listed, changed=self._changed, query=only)

    async def other_than(self, seen: Definition | None) -> Definition:
        """The state, as soon as it is known and not *seen*."""
        while self._state is None or self._state == seen:
            await self._news.wait()
        return self._state

    def _listed(self, items: list[Json]) -> None:
        self._set(Definition.parse(items[0]) if items else ABSENT)

    def _changed(self, kind: str, body: Json) -> None:
        self._set(ABSENT if kind == "DELETED" else Definition.parse(body))

    def _set(self, state: Definition) -> None:
        self._state = state
        self._news.set()
        self._news = asyncio.Event()
