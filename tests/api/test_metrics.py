"""What the controller tells Prometheus while it works, and while it waits for its turn."""

from __future__ import annotations

import socket

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from cknix_csi import __version__
from tests.api.conftest import Controller, Expressions, eventually

Values = dict[tuple[str, ...], float]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


async def scrape(port: int) -> dict[str, Values]:
    """Samples that are not 0, by name and the values of their labels; none while nobody listens."""
    found: dict[str, Values] = {}
    try:
        async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}/metrics") as answer:
            text = await answer.text()
    except aiohttp.ClientConnectionError:
        return found
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.value:
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


async def becomes(port: int, name: str, values: Values) -> None:
    async def holds() -> bool:
        return (await scrape(port)).get(name, {}) == values

    async def seen() -> str:
        return str((await scrape(port)).get(name, {}))

    await eventually(holds, seen)


async def test_what_is_scraped_is_what_the_controller_does(
    expr: Expressions, controller: Controller, second: Controller
) -> None:
    port, other = free_port(), free_port()
    controller.start(max_builds=1, port=port)
    await becomes(port, "cknix_leader", {(): 1})
    await expr.create("a", "result=a build=gate")
    await expr.reaches("a", "Running")
    await expr.create("b", "result=b build=fail")
    await becomes(port, "cknix_build_queue_length", {(): 1})
    running = await scrape(port)
    assert running["cknix_builds_running"] == {(): 1}
    assert running["cknix_build_queue_served"] == {(): 1}
    assert running["cknix_expressions"] == {("Running",): 1, ("Pending",): 1}
    controller.world.open("a")
    await expr.reaches("b", "Failed")
    await becomes(port, "cknix_expressions", {("Succeeded",): 1, ("Failed",): 1})
    done = await scrape(port)
    assert done["cknix_evaluation_duration_seconds_count"] == {("OK",): 2}
    assert done["cknix_build_duration_seconds_count"] == {("OK",): 1, ("BuildFailed",): 1}
    assert done["cknix_expression_failures_total"] == {("BuildFailed",): 1}
    assert not {"cknix_builds_running", "cknix_evaluations_running", "cknix_build_queue_served"} & set(done)

    second.start(port=other)
    await becomes(other, "cknix_build_info", {("controller", __version__): 1})
    waiting = await scrape(other)
    assert not {"cknix_leader", "cknix_expressions"} & set(waiting)
    controller.stop()
    second.world.open("a")  # it has a store of its own
    await becomes(other, "cknix_leader", {(): 1})
    await becomes(other, "cknix_expressions", {("Succeeded",): 1, ("Failed",): 1})
