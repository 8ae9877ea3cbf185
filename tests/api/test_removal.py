"""The definition of Expressions goes and comes back: under a running controller, without one, half-way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import kopf
import pytest
import pytest_asyncio

from cknix_csi.api.expression import GROUP, PLURAL, VERSION
from cknix_csi.controller.operator import KopfThread, connection
from cknix_csi.kube.api import MERGE_PATCH, NOT_FOUND, ApiError, expressions, list_all
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.kube.definition import DEFINITIONS, NAME, Definition
from tests.api import rbac
from tests.api.conftest import Controller, Expressions, eventually
from tests.api.fakenix import store_path
from tests.api.server import REPOSITORY, Server

MANIFEST = str(REPOSITORY / "yaml/10-crd.yaml")


def path(name: str) -> str:
    return str(store_path(name))


class Crd:
    """What an administrator does with the definition."""

    def __init__(self, server: Server, api: KubernetesApi) -> None:
        self._server = server
        self._api = api

    async def delete(self) -> None:
        """As people do: kubectl waits until it is gone."""
        await asyncio.to_thread(self._server.kubectl, "delete", "-f", MANIFEST, "--timeout=40s")

    async def begin_to_delete(self) -> None:
        """Ask for the deletion and wait until every Expression is being deleted."""
        self._server.kubectl("delete", "-f", MANIFEST, "--wait=false")

        async def all_asked() -> bool:
            items = (await list_all(self._api, expressions(), metadata_only=True)).items
            return bool(items) and all("deletionTimestamp" in item["metadata"] for item in items)

        await eventually(all_asked)

    async def apply(self) -> None:
        self._server.kubectl("apply", "--server-side", "-f", MANIFEST)
        self._server.kubectl("wait", "--for=condition=Established", f"crd/{NAME}", "--timeout=30s")

    async def gone(self) -> None:
        await eventually(self._is_gone, lambda: self._api.get(f"{DEFINITIONS}/{NAME}"))

    async def _is_gone(self) -> bool:
        try:
            await self._api.get(f"{DEFINITIONS}/{NAME}")
        except ApiError as error:
            return error.status == NOT_FOUND
        return False

    async def restore(self) -> None:
        """Whatever a test has left of it, afterwards it is served."""
        if not await self._is_gone() and Definition.parse(await self._api.get(f"{DEFINITIONS}/{NAME}")).terminating:
            for item in (await list_all(self._api, expressions(), metadata_only=True)).items:
                where = expressions(item["metadata"]["namespace"], item["metadata"]["name"])
                await self._api.patch(where, {"metadata": {"finalizers": None}}, kind=MERGE_PATCH)
            await self.gone()
        await self.apply()


@pytest_asyncio.fixture
async def crd(expr: Expressions, controller: Controller) -> AsyncIterator[Crd]:
    """The definition, in place again when the test is over."""
    crd = Crd(expr.server, expr.api)
    yield crd
    if controller.running():
        controller.kill()
    await crd.restore()


async def test_a_deletion_of_the_definition_ends_and_takes_every_root_along(
    expr: Expressions, controller: Controller, crd: Crd
) -> None:
    controller.start()
    await expr.create("done", "result=done")
    await expr.create("failed", "result=failed build=fail")
    await expr.create("building", "result=building build=gate")
    await expr.reaches("done", "Succeeded")
    await expr.reaches("failed", "Failed")
    await controller.noted("build", "building")
    await crd.delete()
    assert controller.roots() == {}
    assert controller.world.noted("build cancelled", "building") == 1


async def test_expressions_of_a_definition_that_came_back_are_worked_on_without_a_restart(
    expr: Expressions, controller: Controller, crd: Crd
) -> None:
    controller.start()
    await expr.create("a", "result=before")
    await expr.reaches("a", "Succeeded")
    await crd.delete()
    await crd.apply()
    await expr.create("a", "result=after")
    status = await expr.reaches("a", "Succeeded")
    assert status["result"] == path("after")
    assert list(controller.roots().values()) == [path("after")]
    # Gone and back in a moment.
    await asyncio.to_thread(expr.server.kubectl, "replace", "--force", "-f", MANIFEST)
    await crd.apply()
    await expr.create("a", "result=replaced")
    await expr.reaches("a", "Succeeded")
    assert list(controller.roots().values()) == [path("replaced")]
    expr.delete("a")
    await expr.gone("a")
    assert controller.roots() == {}


async def test_a_controller_that_starts_before_the_definition_waits_for_it(
    expr: Expressions, controller: Controller, crd: Crd
) -> None:
    await crd.delete()
    controller.start()

    async def waits() -> bool:
        return f"{NAME} is not served; waiting for it" in controller.log()

    await eventually(waits)
    await crd.apply()
    await expr.create("a", "result=a")
    await expr.reaches("a", "Succeeded")


async def test_an_installation_over_a_removal_that_hangs_heals_it(
    expr: Expressions, controller: Controller, crd: Crd
) -> None:
    controller.start()
    for name in ("a", "b"):
        await expr.create(name, f"result={name}")
        await expr.reaches(name, "Succeeded")
    controller.kill()
    await crd.begin_to_delete()
    # The removal hangs: nobody is there to release them.  What is applied again is the definition that is going.
    expr.server.kubectl("apply", "--server-side", "-f", MANIFEST)
    controller.start()
    await crd.gone()
    assert controller.roots() == {}
    await crd.apply()
    await expr.create("a", "result=a")
    await expr.reaches("a", "Succeeded")


async def test_roots_stay_while_nobody_can_list_expressions_and_go_when_a_list_lacks_theirs(
    expr: Expressions, controller: Controller, crd: Crd
) -> None:
    controller.start()
    await expr.create("a", "result=a")
    await expr.reaches("a", "Succeeded")
    controller.kill()
    # By force, as people do who are tired of waiting.
    await expr.api.patch(expressions(expr.namespace, "a"), {"metadata": {"finalizers": None}}, kind=MERGE_PATCH)
    await crd.delete()
    controller.start()

    async def waits() -> bool:
        return f"{NAME} is not served; waiting for it" in controller.log()

    await eventually(waits)
    assert list(controller.roots().values()) == [path("a")]
    await crd.apply()

    async def released() -> bool:
        return controller.roots() == {}

    await eventually(released)


async def test_a_controller_that_is_ended_during_the_removal_releases_what_waits_for_it(
    expr: Expressions, controller: Controller, crd: Crd
) -> None:
    controller.start()
    for name in ("a", "b", "c"):
        await expr.create(name, f"result={name}")
        await expr.reaches(name, "Succeeded")
    with controller.frozen():
        await crd.begin_to_delete()
        controller.ask_to_stop()
    assert await asyncio.to_thread(controller.stop) == 0
    await crd.gone()
    assert controller.roots() == {}


async def test_kopf_does_not_run_on_when_its_api_server_does_not_know_expressions_yet(
    expr: Expressions, controller: Controller, crd: Crd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "KUBECONFIG", str(expr.server.kubeconfig("controller", rbac.token(expr.server, rbac.CONTROLLER)))
    )
    await crd.delete()
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await connection()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def observed(**_: Any) -> None:
        """Never called."""

    async with asyncio.timeout(30):
        with pytest.raises(RuntimeError, match="not told of Expressions"):
            await asyncio.to_thread(KopfThread(registry).run)
