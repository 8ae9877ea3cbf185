"""Two controllers at once: one works, the other waits, and takes over when the first one is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from cknix_csi.kube.api import MERGE_PATCH, ApiError, Json
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.kube.lease import FencedApi, Lease, Timing
from tests.api.conftest import Controller, Expressions, eventually
from tests.api.fakenix import store_path
from tests.api.server import DRIVER_NAMESPACE, Server

LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{DRIVER_NAMESPACE}/leases/cknix-controller"
QUICK = {"duration": 3.0, "deadline": 2.0, "retry": 0.3}
SLOW = {"duration": 600.0, "deadline": 10.0, "retry": 0.3}


async def holder(api: KubernetesApi) -> str:
    try:
        return str((await api.get(LEASE))["spec"].get("holderIdentity") or "")
    except ApiError:
        return ""


async def held_by(api: KubernetesApi, instance: str) -> None:
    async def reached() -> bool:
        return (await holder(api)).startswith(f"{instance}_")

    await eventually(reached, lambda: api.get(LEASE))


async def said(controller: Controller, text: str) -> None:
    async def found() -> bool:
        return text in controller.log()

    await eventually(found)


async def test_of_two_controllers_one_works_and_the_other_takes_over_when_it_is_killed(
    expr: Expressions, controller: Controller, second: Controller
) -> None:
    controller.start(lease=QUICK)
    await held_by(expr.api, "first")
    second.start(lease=QUICK)
    await said(second, "this process waits")
    for number in range(3):
        await expr.create(f"a{number}", f"result=a{number}")
        await expr.reaches(f"a{number}", "Succeeded")
    # Longer than the Lease lasts without a renewal.
    await asyncio.sleep(2 * QUICK["duration"])
    assert second.world.journal.read_text() == ""
    assert second.roots() == {}

    await expr.create("interrupted", "result=interrupted build=gate")
    await controller.noted("build", "interrupted")
    controller.kill()
    second.world.open("interrupted")
    await expr.reaches("interrupted", "Succeeded")
    # Its store is another one: what the first had built is built again.
    for name in ("a0", "a1", "a2"):
        await second.noted("built", name)
    assert store_path("interrupted").name in {path.split("-", 1)[1] for path in second.roots().values()}
    assert second.world.noted("serving") == 1


async def test_a_controller_that_is_stopped_leaves_at_once_to_the_next(
    expr: Expressions, controller: Controller, second: Controller
) -> None:
    controller.start(lease=SLOW)
    await held_by(expr.api, "first")
    second.start(lease=SLOW)
    await said(second, "this process waits")
    assert await asyncio.to_thread(controller.stop) == 0
    stopped = time.monotonic()
    await held_by(expr.api, "second")
    assert time.monotonic() - stopped < 2.0


async def test_a_container_that_kubelet_starts_again_need_not_wait_for_the_one_that_was_killed(
    expr: Expressions, controller: Controller
) -> None:
    controller.start(lease=SLOW)
    await expr.create("a", "result=a build=gate")
    await controller.noted("build", "a")
    before = await holder(expr.api)
    controller.kill()
    controller.start(lease=SLOW)
    await controller.noted("build", "a", 2)
    assert (await holder(expr.api)) != before


async def test_two_that_share_a_name_by_mistake_do_not_take_it_from_each_other_for_ever(
    expr: Expressions, controller: Controller, second: Controller
) -> None:
    controller.start(lease=SLOW)
    await held_by(expr.api, "first")
    second.start(lease=SLOW, instance="first")
    await said(controller, "another controller has taken over")
    transitions = (await expr.api.get(LEASE))["spec"]["leaseTransitions"]
    await asyncio.sleep(3.0)
    assert (await expr.api.get(LEASE))["spec"]["leaseTransitions"] == transitions == 1
    await expr.create("a", "result=a")
    await expr.reaches("a", "Succeeded")
    assert second.world.noted("built", "a") == 1
    assert controller.world.noted("built", "a") == 0


async def test_a_controller_that_was_stopped_in_time_writes_nothing_when_it_goes_on(
    expr: Expressions, controller: Controller, second: Controller
) -> None:
    controller.start(lease=QUICK)
    await expr.create("a", "result=a build=gate")
    await controller.noted("build", "a")
    second.start(lease=QUICK)
    await said(second, "this process waits")
    with controller.frozen():
        await second.noted("build", "a")
        # The frozen one would succeed first, and say so.
        controller.world.open("a")
    await said(controller, "another controller has taken over")
    await asyncio.sleep(1.0)
    assert (await expr.status("a"))["phase"] == "Running"
    second.world.open("a")
    await expr.reaches("a", "Succeeded")
    # It waits for its turn, and gets it.
    assert await asyncio.to_thread(second.stop) == 0
    await held_by(expr.api, "first")
    await expr.create("b", "result=b")
    await expr.reaches("b", "Succeeded")
    assert controller.world.noted("built", "b") == 1


async def test_an_outage_longer_than_the_lease_ends_no_build(
    expr: Expressions, controller: Controller, server: Server
) -> None:
    controller.start(lease=QUICK)
    await expr.create("a", "result=a build=gate")
    await controller.noted("build", "a")
    server.kill_api_server()
    await asyncio.sleep(2 * QUICK["duration"])
    await asyncio.to_thread(server.start_api_server)
    controller.world.open("a")
    await expr.reaches("a", "Succeeded")
    assert controller.world.noted("build cancelled", "a") == 0


async def test_a_lease_that_somebody_deletes_or_edits_stays_with_its_holder(
    expr: Expressions, controller: Controller
) -> None:
    controller.start(lease=SLOW)
    await held_by(expr.api, "first")
    before = await holder(expr.api)
    await expr.api.patch(LEASE, {"metadata": {"labels": {"a": "b"}}}, kind=MERGE_PATCH)
    expr.server.kubectl("delete", "lease", "cknix-controller", "-n", DRIVER_NAMESPACE)

    async def back() -> bool:
        return await holder(expr.api) == before

    await eventually(back)
    await expr.create("a", "result=a")
    await expr.reaches("a", "Succeeded")


@asynccontextmanager
async def holding(lease: Lease) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(lease.hold())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def make(server: Server, api: KubernetesApi) -> Callable[[str, Clock], Lease]:
    """Makes contenders for one Lease, gone afterwards."""
    return lambda name, clock: Lease(
        api, "default", "contested", name, timing=Timing(duration=15, deadline=10, retry=0.1), clock=clock
    )


async def test_a_write_waits_from_the_deadline_until_the_next_renewal(
    server: Server, api: KubernetesApi, make: Callable[[str, Clock], Lease]
) -> None:
    clock = Clock()
    lease = make("a", clock)
    body: Json = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "written"}}
    fenced = FencedApi(api, lease)
    try:
        await lease.acquire()
        clock.seconds = 10.0
        writing = asyncio.create_task(fenced.create("/api/v1/namespaces/default/configmaps", body))
        await asyncio.sleep(0.5)
        assert not writing.done()
        async with holding(lease):
            async with asyncio.timeout(10):
                await writing
        await lease.release()
        writing = asyncio.create_task(fenced.create("/api/v1/namespaces/default/configmaps", body))
        await asyncio.sleep(0.3)
        assert not writing.done()
        writing.cancel()
    finally:
        server.kubectl("delete", "-n", "default", "--ignore-not-found", "lease/contested", "cm/written")


async def test_expiry_is_judged_by_ones_own_clock_and_by_change_only(
    server: Server, api: KubernetesApi, make: Callable[[str, Clock], Lease]
) -> None:
    ours, theirs = Clock(), Clock()
    a, b = make("a", ours), make("b", theirs)
    path = "/apis/coordination.k8s.io/v1/namespaces/default/leases/contested"
    try:
        await a.acquire()
        # A holder whose clock is years behind holds it all the same, as long as something changes.
        old = {"spec": {"renewTime": "2001-01-01T00:00:00.000000Z", "acquireTime": "2001-01-01T00:00:00.000000Z"}}
        await api.patch(path, old, kind=MERGE_PATCH)
        taking = asyncio.create_task(b.acquire())
        await asyncio.sleep(0.5)
        theirs.seconds = 14.9
        await asyncio.sleep(0.5)
        assert not taking.done()
        await api.patch(path, {"metadata": {"labels": {"renewed": "again"}}}, kind=MERGE_PATCH)
        await asyncio.sleep(0.5)
        theirs.seconds = 29.0
        await asyncio.sleep(0.5)
        assert not taking.done()
        theirs.seconds = 30.0
        async with asyncio.timeout(10):
            await taking
        async with holding(a) as task, asyncio.timeout(10):
            await task
    finally:
        server.kubectl("delete", "-n", "default", "--ignore-not-found", "lease/contested")
