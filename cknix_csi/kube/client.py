"""The connection to the API server: kubernetes-asyncio finds it and keeps its credentials fresh, we speak JSON over it.

kubernetes-asyncio is imported on first use only: importing it takes more than a second, and ``cknix-csi --help`` has
0.3 s.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from cknix_csi import __version__
from cknix_csi.kube.api import FIELD_MANAGER, GONE, ApiError, DeletingApi, Json, WatchEvent

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from kubernetes_asyncio.client import ApiClient, Configuration

REQUEST_TIMEOUT = 30.0
CONNECT_TIMEOUT = 10.0
# The server sends a bookmark about once a minute, the first one later: a stream that is silent for longer is dead.
SILENCE_LIMIT = 150.0

_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
_CHUNK = 1 << 20
_KINDS = frozenset({"ADDED", "MODIFIED", "DELETED", "BOOKMARK"})
_USER_AGENT = f"cknix-csi/{__version__}"
_SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


async def load_configuration() -> Configuration:
    """Where the API server is and who we are: the pod's ServiceAccount, else the kubeconfig (``KUBECONFIG``).

    Raises :class:`ApiError` when there is neither.
    """
    from kubernetes_asyncio import config  # noqa: PLC0415 - see the module
    from kubernetes_asyncio.client import Configuration  # noqa: PLC0415

    configuration = Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and _SERVICE_ACCOUNT_TOKEN.exists():
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            # Read here, since kubernetes-asyncio reads the variable only once, when it is imported.
            await config.load_kube_config(
                config_file=os.environ.get("KUBECONFIG") or None, client_configuration=configuration
            )
    except (config.ConfigException, OSError) as error:
        raise ApiError(
            f"no Kubernetes API server is known: {error}; run in a pod with a ServiceAccount, or set KUBECONFIG",
            status=None,
        ) from error
    return configuration


@asynccontextmanager
async def connect() -> AsyncIterator[KubernetesApi]:
    """The process's connection, closed at the end.  Raises :class:`ApiError` when no API server is configured."""
    from kubernetes_asyncio.client import ApiClient  # noqa: PLC0415 - see the module

    async with ApiClient(await load_configuration()) as client:
        yield KubernetesApi(client)


class KubernetesApi(DeletingApi):
    """:class:`Api` over kubernetes-asyncio's HTTP client (TLS, proxies, token rotation)."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    @property
    def configuration(self) -> Configuration:
        return self._client.configuration

    async def get(self, path: str, *, query: Mapping[str, str] | None = None, metadata_only: bool = False) -> Json:
        return await self._call("GET", path, query=query, accept=_METADATA_ONLY if metadata_only else None)

    async def create(self, path: str, body: Json, *, query: Mapping[str, str] | None = None) -> Json:
        return await self._call("POST", path, body=body, query={"fieldManager": FIELD_MANAGER, **(query or {})})

    async def patch(self, path: str, body: Any, *, kind: str, query: Mapping[str, str] | None = None) -> Json:
        query = {"fieldManager": FIELD_MANAGER, **(query or {})}
        return await self._call("PATCH", path, body=body, query=query, content_type=kind)

    async def delete(self, path: str, *, uid: str) -> None:
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        await self._call("DELETE", path, body=options)

    async def watch(
        self, path: str, *, resource_version: str, timeout: float, query: Mapping[str, str] | None = None
    ) -> AsyncIterator[WatchEvent]:
        query = {
            **(query or {}),
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(int(timeout)),
        }
        try:
            async with await self._send("GET", path, query=query, stream=True) as response:
                if response.status != 200:
                    raise _refused("GET", path, response.status, await response.read())
                async for line in _lines(response):
                    event = _parse_event(path, line)
                    if event is not None:
                        yield event
        except _transport_errors() as error:
            raise _unreachable("GET", path, error) from error

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str | None = None,
        accept: str | None = None,
    ) -> Json:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                response = await self._send(
                    method, path, body=body, query=query, content_type=content_type, accept=accept
                )
                async with response:
                    content = await response.read()
            if not 200 <= response.status < 300:
                raise _refused(method, path, response.status, content)
            answer = json.loads(content)
        except _transport_errors() as error:
            raise _unreachable(method, path, error) from error
        if not isinstance(answer, dict):
            raise ApiError(f"the API server's answer to {method} {path} is not an object", status=None)
        return answer

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str | None = None,
        accept: str | None = None,
        stream: bool = False,
    ) -> ClientResponse:
        from aiohttp import ClientTimeout  # noqa: PLC0415 - see the module

        configuration = self._client.configuration
        headers: dict[str, str] = {
            "Accept": accept or "application/json",
            "Content-Type": content_type or "application/json",
        }
        headers["User-Agent"] = _USER_AGENT
        for setting in (await configuration.auth_settings()).values():
            headers[setting["key"]] = str(setting["value"])
        # A path may bring a query of its own, such as a field selector.
        path, _, own = path.partition("?")
        response: ClientResponse = await self._client.rest_client.request(
            method,
            f"{configuration.host}{path}",
            query_params={**dict(parse_qsl(own)), **(query or {})},
            headers=headers,
            body=body,
            _preload_content=False,
            _request_timeout=ClientTimeout(
                connect=CONNECT_TIMEOUT, sock_connect=CONNECT_TIMEOUT, sock_read=SILENCE_LIMIT if stream else None
            ),
        )
        return response


async def _lines(response: ClientResponse) -> AsyncIterator[bytes]:
    """Lines of any length: a watch event holds a whole object, which may be longer than aiohttp's line limit."""
    rest = b""
    async for chunk in response.content.iter_chunked(_CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield line


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a request may fail with; asked for only when an exception is matched, so that the import stays cheap."""
    from aiohttp import ClientError  # noqa: PLC0415
    from kubernetes_asyncio.config import ConfigException  # noqa: PLC0415 - a token file that is being rotated

    return (OSError, TimeoutError, ValueError, ClientError, ConfigException)


def _refused(method: str, path: str, status: int, content: bytes) -> ApiError:
    try:
        reason = str(json.loads(content)["message"])
    except (ValueError, KeyError, TypeError):
        reason = content[:200].decode(errors="replace")
    return ApiError(f"the API server refused {method} {path}: {reason} ({status})", status=status)


def _parse_event(path: str, line: bytes) -> WatchEvent | None:
    """One line of a watch; None for a kind of event that did not exist yet.  Raises ValueError, :class:`ApiError`."""
    event = json.loads(line)
    try:
        kind, body = event["type"], event["object"]
        if kind == "ERROR":
            code = body.get("code")
            raise ApiError(
                f"the watch of {path} ended: {body.get('message')}", status=code if isinstance(code, int) else GONE
            )
        if not body["metadata"]["resourceVersion"]:
            raise ValueError("an event without a version")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it sent what is no event: {line[:200]!r}") from error
    return WatchEvent(kind, body) if kind in _KINDS else None


def _unreachable(method: str, path: str, error: BaseException) -> ApiError:
    what = str(error) or type(error).__name__
    return ApiError(f"the API server did not answer {method} {path}: {what}", status=None)
