"""The Secret with the cache's key is the truth while the controller runs: lost, changed, broken."""

from __future__ import annotations

import base64
from pathlib import Path

from cknix_csi.kube.api import Json, core
from cknix_csi.kube.cacheconfig import CacheConfig
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.nix.cache.signing import KeyPair, generate_key
from tests.api.conftest import Controller, Expressions, eventually
from tests.api.server import DRIVER_NAMESPACE

SECRET = core("secrets", DRIVER_NAMESPACE, "cknix-cache-key")
CONFIG = core("configmaps", DRIVER_NAMESPACE, "cknix-cache")


def secret(text: str) -> Json:
    data = {"secretKey": base64.b64encode(text.encode()).decode()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cknix-cache-key"}, "data": data}


def delete(expr: Expressions) -> None:
    expr.server.kubectl("delete", "secret", "cknix-cache-key", "-n", DRIVER_NAMESPACE, "--ignore-not-found")


async def published(api: KubernetesApi, key: str) -> None:
    async def is_published() -> bool:
        return bool((await api.get(CONFIG))["data"]["publicKey"] == key)

    await eventually(is_published, lambda: api.get(CONFIG))


async def first_key(expr: Expressions, controller: Controller) -> KeyPair:
    """The key after the start, once everybody knows it."""
    controller.start()
    await expr.create("a", "result=a")
    await expr.reaches("a", "Succeeded")
    encoded = (await expr.api.get(SECRET))["data"]["secretKey"]
    key = KeyPair.from_secret(base64.b64decode(encoded).decode())
    await published(expr.api, key.public)
    await controller.noted("serving", key.public)
    return key


async def test_a_secret_that_is_deleted_is_a_new_key_for_the_cache_and_for_the_nodes(
    expr: Expressions, controller: Controller, node_api: KubernetesApi, tmp_path: Path
) -> None:
    old = await first_key(expr, controller)
    delete(expr)

    async def another() -> bool:
        return bool((await expr.api.get(CONFIG))["data"]["publicKey"] != old.public)

    await eventually(another)
    (endpoint,) = await CacheConfig(node_api, DRIVER_NAMESPACE, tmp_path / "cache.json").endpoints()
    encoded = (await expr.api.get(SECRET))["data"]["secretKey"]
    new = KeyPair.from_secret(base64.b64decode(encoded).decode())
    # Another name as well: Nix finds the key of a signature by its name.
    assert new.name != old.name
    assert endpoint.public_key == new.public
    await controller.noted("serving", new.public)
    # And a restart changes nothing.
    controller.stop()
    controller.start()
    await controller.noted("serving", new.public, 2)


async def test_a_key_that_the_administrator_brings_is_used(expr: Expressions, controller: Controller) -> None:
    await first_key(expr, controller)
    mine = generate_key("mine")
    # While both requests are made, the controller must not be quick enough to make a key of its own.
    with controller.frozen():
        delete(expr)
        await expr.api.create(core("secrets", DRIVER_NAMESPACE), secret(mine.secret))
    await published(expr.api, mine.public)
    await controller.noted("serving", mine.public)


async def test_a_secret_without_a_key_leaves_the_old_one_in_use_until_it_is_mended(
    expr: Expressions, controller: Controller
) -> None:
    old = await first_key(expr, controller)
    with controller.frozen():
        delete(expr)
        await expr.api.create(core("secrets", DRIVER_NAMESPACE), secret("not a key"))

    async def complained() -> bool:
        return "holds no signing key" in controller.log()

    await eventually(complained)
    assert controller.running()
    assert (await expr.api.get(CONFIG))["data"]["publicKey"] == old.public
    delete(expr)

    async def mended() -> bool:
        return bool((await expr.api.get(CONFIG))["data"]["publicKey"] != old.public)

    await eventually(mended)
