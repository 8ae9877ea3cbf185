"""Least privilege towards the API server: what each account may do is exactly what its role asks for."""

from __future__ import annotations

import base64

import pytest

from cknix_csi.controller.writer import StatusWriter, Superseded
from cknix_csi.kube.api import ApiError, core
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.kube.events import Subject
from cknix_csi.nix.cache.signing import KeyPair
from tests.api import rbac
from tests.api.conftest import Controller, Expressions, connected, eventually
from tests.api.rights import granted, used
from tests.api.server import DRIVER_NAMESPACE


async def test_the_controller_needs_every_right_it_has_and_asks_for_no_other(
    expr: Expressions, controller: Controller
) -> None:
    before = len(expr.server.audited())
    controller.start()
    await expr.create("good", "result=good")
    await expr.reaches("good", "Succeeded")
    await expr.create("bad", "result=bad build=fail")
    await expr.reaches("bad", "Failed")
    # The same news again: its Event is not made but counted.
    await expr.change("bad", expr="result=bad build=fail # again")
    await expr.reaches("bad", "Failed", 2)
    # A status that comes too late is refused, and the controller looks why.  Too late for a process to be made so.
    bad = Subject(expr.namespace, "bad", (await expr.get("bad"))["metadata"]["uid"])
    async with connected(expr.server.kubeconfig("late", rbac.token(expr.server, rbac.CONTROLLER))) as late:
        writer = StatusWriter(late, bad, generation=1)
        writer.put({"phase": "Succeeded"})
        with pytest.raises(Superseded):
            await writer.run()
    expr.delete("good")
    await expr.gone("good")
    # The next one finds key, configuration and Lease as they were left.
    assert controller.stop() == 0
    controller.start()
    await expr.create("later", "result=later")
    await expr.reaches("later", "Succeeded")

    async def all_used() -> bool:
        return used(rbac.CONTROLLER, expr.server.audited()[before:]) == granted(rbac.CONTROLLER)

    async def unused() -> list[str]:
        return sorted(map(str, granted(rbac.CONTROLLER) - used(rbac.CONTROLLER, expr.server.audited()[before:])))

    await eventually(all_used, unused)
    encoded = (await expr.api.get(core("secrets", DRIVER_NAMESPACE, "cknix-cache-key")))["data"]["secretKey"]
    key = KeyPair.from_secret(base64.b64decode(encoded).decode())
    assert key.name in controller.log()
    assert key.secret.partition(":")[2] not in controller.log()


@pytest.mark.parametrize("namespace", [DRIVER_NAMESPACE, "kube-system", "default"])
async def test_a_node_can_read_no_secret(node_api: KubernetesApi, namespace: str) -> None:
    for path in (core("secrets", namespace), core("secrets", namespace, "cknix-cache-key")):
        with pytest.raises(ApiError) as refused:
            await node_api.get(path)
        assert refused.value.status == 403
