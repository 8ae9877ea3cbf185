"""The volumes that the provisioner has made: one ConfigMap each, which is all there is of such a volume.

It is created once and never changed, and the API server lets one of two creations of a name win: so a creation that is
repeated, by whichever process, finds what the first one decided.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cknix_csi.api.errors import CknixError, Invalid, Problem
from cknix_csi.api.expression import GROUP
from cknix_csi.api.situations import Situation
from cknix_csi.kube.api import (
    CONFLICT,
    GONE,
    NOT_FOUND,
    TOO_LARGE,
    UNPROCESSABLE,
    ApiError,
    DeletingApi,
    Json,
    core,
)

log = logging.getLogger(__name__)

LABEL = f"{GROUP}/volume"
"""On each of the ConfigMaps; nothing without it is ever deleted."""
MAX_PAGE = 500

_BAD_REQUEST = 400
_READABLE = 64
_MOST_WORDS = 300
_ID = re.compile(r"volume-([a-z0-9-]+-)?[0-9a-f]{16}")


def volume_id(name: str) -> str:
    """The id of the volume called *name*: the same for ever, a ConfigMap's name, at most 88 characters.

    ``volume-pvc-0e4c…-5f1d7a84c79e2f0b``: what can be read of the name, and a digest of all of it.
    """
    readable = re.sub("[^a-z0-9]+", "-", name.lower())[:_READABLE].strip("-")
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return "-".join(filter(None, ("volume", readable, digest)))


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """One volume."""

    name: str
    """What the container orchestrator calls it when it asks for it."""
    capacity: int
    """Bytes that were asked for; 0: none were."""
    parameters: Mapping[str, str]
    """As they were asked for."""
    attributes: Mapping[str, str]
    """What NodePublishVolume gets."""
    systems: tuple[str, ...]
    """Of the nodes that can use it; none: all of them."""

    @property
    def id(self) -> str:
        return volume_id(self.name)

    def manifest(self, namespace: str) -> Json:
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": self.id,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/name": "cknix", "app.kubernetes.io/part-of": "cknix", LABEL: "true"},
            },
            "immutable": True,
            "data": {
                "name": self.name,
                "capacityBytes": str(self.capacity),
                "parameters": json.dumps(dict(self.parameters), sort_keys=True),
                "attributes": json.dumps(dict(self.attributes), sort_keys=True),
                "systems": json.dumps(self.systems),
            },
        }

    @classmethod
    def parse(cls, body: Json) -> VolumeRecord:
        """Read a ConfigMap.  Raises :class:`CknixError` for one that somebody else wrote."""
        name = body["metadata"]["name"]
        try:
            data = body["data"]
            record = cls(
                name=str(data["name"]),
                capacity=int(data["capacityBytes"]),
                parameters=_texts(json.loads(data["parameters"])),
                attributes=_texts(json.loads(data["attributes"])),
                systems=tuple(str(system) for system in json.loads(data["systems"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(name, repr(error)) from error
        if record.id != name:
            raise _damaged(name, f"it is that of {record.id}")
        return record


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the volumes; *more* is the token of the next page, empty after the last one."""

    records: list[VolumeRecord]
    more: str


class VolumeRecords:
    """The records in *namespace*.  Every method raises :class:`ApiError` when the API server does not help."""

    def __init__(self, api: DeletingApi, namespace: str) -> None:
        self._api = api
        self._namespace = namespace

    async def get(self, identity: str) -> VolumeRecord | None:
        """The volume with that id, None when there is none.  Raises :class:`CknixError` when its record is damaged."""
        body = await self._body(identity)
        return None if body is None else VolumeRecord.parse(body)

    async def add(self, record: VolumeRecord) -> bool:
        """Make the volume exist; False when one with its id does.  Raises :class:`Invalid` when it has too many words.

        Parameters are all of it that can be long, and a repetition would be as long.
        """
        try:
            await self._api.create(core("configmaps", self._namespace), record.manifest(self._namespace))
        except ApiError as error:
            if error.status == CONFLICT:
                return False
            if error.status in {TOO_LARGE, UNPROCESSABLE}:
                words = "cannot be kept in a ConfigMap, which holds less than 1 MiB; shorten them"
                raise Invalid([Problem("parameters", f"{words} ({error.message[:_MOST_WORDS]})")]) from error
            raise
        return True

    async def remove(self, identity: str) -> bool:
        """Make the volume not exist; False when it did not.  Of other objects nothing is touched."""
        body = await self._body(identity)
        if body is None:
            return False
        try:
            await self._api.delete(core("configmaps", self._namespace, identity), uid=body["metadata"]["uid"])
        except ApiError as error:
            if error.status == NOT_FOUND:
                return False
            raise
        return True

    async def page(self, limit: int, token: str) -> Page:
        """At most *limit* volumes from *token* on, which is empty for the first ones.

        Raises :class:`CknixError` with ABORTED for a token that is unknown or too old.
        """
        query = {"labelSelector": LABEL, "limit": str(min(limit, MAX_PAGE)), **({"continue": token} if token else {})}
        try:
            answer = await self._api.get(core("configmaps", self._namespace), query=query)
        except ApiError as error:
            if token and error.status in {_BAD_REQUEST, GONE}:
                words = f"starting_token is not one of this list, or too old ({error.status}); list from the beginning"
                raise CknixError(words, Situation.LIST_EXPIRED) from error
            raise
        records = []
        for body in answer.get("items") or []:
            try:
                records.append(VolumeRecord.parse(body))
            except CknixError as error:
                log.warning("left out of the list: %s", error)
        return Page(records, str(answer["metadata"].get("continue") or ""))

    async def _body(self, identity: str) -> Json | None:
        if not _ID.fullmatch(identity):
            return None
        try:
            body = await self._api.get(core("configmaps", self._namespace, identity))
        except ApiError as error:
            if error.status == NOT_FOUND:
                return None
            raise
        return body if LABEL in (body["metadata"].get("labels") or {}) else None


def _damaged(name: str, why: str) -> CknixError:
    return CknixError(
        f"ConfigMap {name} is labelled {LABEL} and does not hold a volume ({why}); "
        "restore it, or delete it together with its PersistentVolume",
        Situation.VOLUME_RECORD_DAMAGED,
    )


def _texts(value: Any) -> dict[str, str]:
    return {str(key): str(text) for key, text in value.items()}
