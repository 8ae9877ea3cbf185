"""The cache's signing key (a Secret) and what nodes must know of it (a ConfigMap, kept true).

The Secret is the truth, also while the controller runs: when it is deleted, a new key is made, and another key in it is
used from then on.  So a lost Secret mends itself, and deleting it is how a key is changed.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Coroutine
from secrets import token_hex
from typing import Any, NoReturn

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.kube import cacheconfig, controllerplace
from cknix_csi.kube.api import APPLY_PATCH, CONFLICT, NOT_FOUND, Api, ApiError, Json, core
from cknix_csi.kube.backoff import Backoff
from cknix_csi.kube.listwatch import list_and_watch
from cknix_csi.nix.cache.signing import KeyPair

SECRET = "cknix-cache-key"  # noqa: S105 - the object's name
SECRET_KEY = "secretKey"  # noqa: S105 - a field's name
PUBLIC_KEY = "publicKey"
# A new key has a new name: Nix finds the key of a signature by its name.
KEY_PREFIX = "cknix-cache-"
LABELS = {"app.kubernetes.io/name": "cknix", "app.kubernetes.io/component": "controller"}

# How soon a ConfigMap that somebody changed or deleted is right again.
REAPPLY_SECONDS = 30.0

_log = logging.getLogger(__name__)


class MalformedKey(CknixError):
    """The Secret is there but does not hold a key pair."""

    situation = Situation.MALFORMED_KEY


async def ensure_key(api: Api, namespace: str, generate: Callable[[str], KeyPair]) -> KeyPair:
    """The key pair in the Secret, which is made when it is missing; two controllers end up with the same one.

    Waits for an API server that is away.  Raises :class:`MalformedKey`.
    """
    backoff = Backoff(first=0.5, cap=30.0)
    while True:
        try:
            return await _read_or_make(api, namespace, generate)
        except ApiError as error:
            delay = backoff.next()
            _log.warning("the Secret %s/%s cannot be had yet: %s", namespace, SECRET, error.message)
            await asyncio.sleep(delay)


async def with_key(
    api: Api,
    namespace: str,
    generate: Callable[[str], KeyPair],
    use: Callable[[KeyPair], Coroutine[Any, Any, None]],
) -> NoReturn:
    """Run *use* with the key pair in the Secret; when that becomes another one, end it and run it with the new one.

    Raises :class:`MalformedKey` for what the Secret holds at the start, and what *use* raises.
    """
    key = await ensure_key(api, namespace, generate)
    touched = asyncio.Event()
    touched.set()
    only = {"fieldSelector": f"metadata.name={SECRET}"}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(
            list_and_watch(
                api,
                core("secrets", namespace),
                listed=lambda _: touched.set(),
                changed=lambda _, __: touched.set(),
                query=only,
            )
        )
        while True:
            using = tasks.create_task(use(key))
            key = await _other_key(api, namespace, generate, key, touched)
            using.cancel()
            await asyncio.wait({using})
            _log.warning("the cache is signed with another key from now on: %s", key.public)
    raise AssertionError("the loop does not end")


async def _other_key(
    api: Api, namespace: str, generate: Callable[[str], KeyPair], key: KeyPair, touched: asyncio.Event
) -> KeyPair:
    """The key pair in the Secret, as soon as it is not *key*."""
    while True:
        await touched.wait()
        touched.clear()
        try:
            found = await ensure_key(api, namespace, generate)
        except MalformedKey as error:
            # The running key is a good one: nodes can go on with it until somebody mends the Secret.
            _log.error("%s; until then the cache is signed with the key it had", error.message)
            continue
        if found != key:
            return found


async def _read_or_make(api: Api, namespace: str, generate: Callable[[str], KeyPair]) -> KeyPair:
    path = core("secrets", namespace, SECRET)
    try:
        return _parse(await api.get(path), namespace)
    except ApiError as error:
        if error.status != NOT_FOUND:
            raise
    made = generate(KEY_PREFIX + token_hex(4))
    try:
        await api.create(core("secrets", namespace), _secret(namespace, made))
    except ApiError as error:
        if error.status != CONFLICT:
            raise
        return _parse(await api.get(path), namespace)
    _log.info("made the cache's signing key %s", made.public)
    return made


async def publish_config(api: Api, namespace: str, url: str, public_key: str, node: str) -> NoReturn:
    """Keep the ConfigMap that nodes read as it must be, for ever; *node* is where this controller runs."""
    backoff = Backoff(first=0.5, cap=REAPPLY_SECONDS)
    data = {cacheconfig.URL: url, cacheconfig.PUBLIC_KEY: public_key, controllerplace.NODE: node}
    body: Json = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": cacheconfig.NAME, "namespace": namespace, "labels": LABELS},
        "data": data,
    }
    while True:
        try:
            path = core("configmaps", namespace, cacheconfig.NAME)
            if controllerplace.BEFORE not in data and (
                before := await controllerplace.place_before(api, namespace, node)
            ):
                data[controllerplace.BEFORE] = before
            # Forced: whatever tool wrote other values before, the running key is the true one.
            await api.patch(path, body, kind=APPLY_PATCH, query={"force": "true"})
            backoff.reset()
            delay = REAPPLY_SECONDS
        except ApiError as error:
            _log.warning("the ConfigMap %s/%s cannot be written: %s", namespace, cacheconfig.NAME, error.message)
            delay = backoff.next()
        await asyncio.sleep(delay)


def _secret(namespace: str, key: KeyPair) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": SECRET, "namespace": namespace, "labels": LABELS},
        "type": "Opaque",
        # A half-edited key would make every node refuse every path; to change the key, delete the Secret.
        "immutable": True,
        "data": {SECRET_KEY: _encode(key.secret), PUBLIC_KEY: _encode(key.public)},
    }


def _parse(secret: Json, namespace: str) -> KeyPair:
    data = secret.get("data") or {}
    try:
        # The public half is computed: the two cannot disagree.
        return KeyPair.from_secret(base64.b64decode(data[SECRET_KEY], validate=True).decode())
    except (KeyError, TypeError, ValueError):
        raise MalformedKey(
            f"the Secret {namespace}/{SECRET} holds no signing key under {SECRET_KEY}; delete it to have a new one made"
        ) from None


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
