"""The API server as a small protocol: JSON in, JSON out, one error type.

Objects stay dictionaries: the generated model classes of the client libraries cost more time to fill than the requests
that bring them, and everything we read is parsed into values of :mod:`cknix_csi.api` anyway.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

from cknix_csi.api.errors import CknixError
from cknix_csi.api.expression import GROUP, PLURAL, VERSION
from cknix_csi.api.situations import Situation

Json = dict[str, Any]

NOT_FOUND = 404
CONFLICT = 409
GONE = 410
TOO_LARGE = 413
UNPROCESSABLE = 422

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"

FIELD_MANAGER = "cknix"


class ApiError(CknixError):
    """The API server refused a request or could not be asked.

    *status* is the HTTP status, or None when there was no answer at all.
    """

    situation = Situation.KUBERNETES_UNAVAILABLE

    def __init__(self, message: str, *, status: int | None) -> None:
        super().__init__(message, Situation.OBJECT_NOT_FOUND if status == NOT_FOUND else None)
        self.status = status


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """*kind* is ADDED, MODIFIED, DELETED or BOOKMARK."""

    kind: str
    object: Json


class Api(Protocol):
    """One API server.  Every method raises :class:`ApiError`; paths are absolute (``/api/v1/…``)."""

    async def get(self, path: str, *, query: Mapping[str, str] | None = None, metadata_only: bool = False) -> Json:
        """One object or one page of a list.  *metadata_only* asks for ``PartialObjectMetadata``: no spec, no status."""

    async def create(self, path: str, body: Json, *, query: Mapping[str, str] | None = None) -> Json:
        """POST to a collection; status 409 when the name is taken."""

    async def patch(self, path: str, body: Any, *, kind: str, query: Mapping[str, str] | None = None) -> Json:
        """PATCH of *kind* (:data:`MERGE_PATCH`, :data:`JSON_PATCH` or :data:`APPLY_PATCH`)."""

    def watch(
        self, path: str, *, resource_version: str, timeout: float, query: Mapping[str, str] | None = None
    ) -> AsyncIterator[WatchEvent]:
        """Changes after *resource_version*, until the server ends the stream (after about *timeout* seconds).

        Status 410 when *resource_version* is too old: list again.
        """


class DeletingApi(Api, Protocol):
    """One for those who may delete."""

    async def delete(self, path: str, *, uid: str) -> None:
        """DELETE of the object with *uid*; status 404 when it is gone, 409 when another one has its name."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A complete list: all pages, as of *resource_version*."""

    items: list[Json]
    resource_version: str


async def list_all(
    api: Api,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    metadata_only: bool = False,
    page: int = 250,
    trim: Callable[[Json], Json] = lambda item: item,
) -> Listing:
    """All objects of the collection at *path*; *query* may select some of them.

    They are read *page* by *page*, and *trim* makes each smaller before the next page is asked for.

    Raises :class:`ApiError`, also for an answer that is not a list.  What depends on the *absence* of an object relies
    on this being complete.
    """
    items: list[Json] = []
    query = {**(query or {}), "limit": str(page)}
    while True:
        answer = await api.get(path, query=query, metadata_only=metadata_only)
        metadata = answer.get("metadata")
        # Go writes an empty list as null.
        found = answer.get("items", "missing") or []
        if (
            not str(answer.get("kind")).endswith("List")
            or not isinstance(metadata, dict)
            or not isinstance(found, list)
            or not metadata.get("resourceVersion")
        ):
            raise ApiError(f"the API server's answer to GET {path} is not a list", status=None)
        items += map(trim, found)
        more = metadata.get("continue")
        if not more:
            return Listing(items, str(metadata["resourceVersion"]))
        query = {"limit": str(page), "continue": str(more)}


def expressions(namespace: str | None = None, name: str | None = None, *, status: bool = False) -> str:
    """Path of all Expressions, those of a namespace, one of them, or its status."""
    return _path(f"/apis/{GROUP}/{VERSION}", PLURAL, namespace, name) + ("/status" if status else "")


def core(kind: str, namespace: str | None = None, name: str | None = None) -> str:
    """Path of a core/v1 collection (*kind* in plural: ``configmaps``) or of one object of it."""
    return _path("/api/v1", kind, namespace, name)


def _path(root: str, plural: str, namespace: str | None, name: str | None) -> str:
    parts = [root]
    if namespace is not None:
        parts += ["namespaces", quote(namespace, safe="")]
    parts.append(plural)
    if name is not None:
        parts.append(quote(name, safe=""))
    return "/".join(parts)
