"""The supervisor and what it runs, with Nix, the store and the API server in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

from cknix_csi.api import conditions
from cknix_csi.api.closure import Closure, PathInfo
from cknix_csi.api.conditions import timestamp
from cknix_csi.api.errors import BuildFailed, CacheUnavailable
from cknix_csi.api.expression import Data
from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import StorePath
from cknix_csi.controller.nodes import ClusterSystems
from cknix_csi.controller.ports import Options
from cknix_csi.controller.queue import BuildQueue
from cknix_csi.controller.reconcile import Services, Wanted, size
from cknix_csi.controller.supervisor import Supervisor
from cknix_csi.kube.api import ApiError, Json, core, expressions
from cknix_csi.kube.events import EventRecorder, Subject
from cknix_csi.nix.nix import Evaluation
from tests.unit.fakeapi import FakeApi

UID = "01234567-89ab-cdef-0123-456789abcdef"
HASH = "7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb"


class Nix:
    """The expression's text is the name of the result; how a build goes is set per name."""

    def __init__(self, valid: set[StorePath]) -> None:
        self.valid = valid
        self.evaluated: list[str] = []
        self.building: list[str] = []
        self.cancelled: list[str] = []
        self.builds: dict[str, Callable[[], Awaitable[None]]] = {}

    async def evaluate(self, data: Data, system: str) -> Evaluation:
        self.evaluated.append(data.text)
        return Evaluation(StorePath(HASH, data.text), ("drv",))

    async def build(self, evaluation: Evaluation, *, progress: Callable[[Progress], None]) -> None:
        name = evaluation.result.name
        self.building.append(name)
        try:
            if name in self.builds:
                await self.builds[name]()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        self.valid.add(evaluation.result)


class Closures:
    def __init__(self) -> None:
        self.valid: set[StorePath] = set()

    async def is_valid(self, path: StorePath) -> bool:
        return path in self.valid

    async def query(self, root: StorePath) -> Closure:
        return Closure(root, (PathInfo(root, "sha256:" + "0" * 64, 100, ()),))


class Roots:
    def __init__(self) -> None:
        self.found: dict[str, StorePath] = {}
        self.broken = False

    def add(self, name: str, path: StorePath) -> None:
        if self.broken:
            raise OSError("disk error")
        self.found[name] = path

    def remove(self, name: str) -> None:
        self.found.pop(name, None)

    def list(self) -> dict[str, StorePath]:
        return dict(self.found)


class World:
    def __init__(self) -> None:
        self.api = FakeApi()
        self.api.objects[core("nodes")] = {"kind": "NodeList", "metadata": {"resourceVersion": "1"}, "items": []}
        self.closures = Closures()
        self.roots = Roots()
        self.nix = Nix(self.closures.valid)
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.events = EventRecorder(self.api, component="c", instance="i")
        self.supervisor = Supervisor(
            Services(
                api=self.api,
                nix=self.nix,
                closures=self.closures,
                roots=self.roots,
                queue=BuildQueue(2),
                cluster=ClusterSystems(self.api),
                events=self.events,
                options=Options(
                    "cknix-system", "http://cache", "node-0", ("x86_64-linux",), 2, retry_first=0.01, retry_cap=0.02
                ),
                now=lambda: self.now,
            )
        )

    def apply(self, text: str, generation: int, **spec: Any) -> Json:
        """The user applies this; the watch shows it."""
        path = expressions("n", "a")
        body = self.api.objects.setdefault(path, {"metadata": {"namespace": "n", "name": "a", "uid": UID}})
        body["metadata"]["generation"] = generation
        body["spec"] = {"data": {"expr": text}, **spec}
        self.supervisor.observe(body)
        return body

    @property
    def status(self) -> Json:
        found: Json = self.api.objects[expressions("n", "a")].get("status", {})
        return found

    async def until(self, holds: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                await asyncio.sleep(0.005)

    async def reaches(self, phase: str, generation: int) -> None:
        await self.until(
            lambda: self.status.get("phase") == phase and self.status.get("observedGeneration") == generation
        )

    def event_reasons(self) -> list[str]:
        return [body["reason"] for path, body in self.api.objects.items() if "/events/" in path]


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    tasks = {asyncio.create_task(world.supervisor.run()), asyncio.create_task(world.events.run())}
    await asyncio.sleep(0)
    yield world
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def forever() -> None:
    await asyncio.Event().wait()


async def test_the_same_observation_again_changes_nothing(world: World) -> None:
    body = world.apply("a", 1)
    await world.reaches("Succeeded", 1)
    requests = len([request for request in world.api.requests if request[0] == "PATCH"])
    for _ in range(5):
        world.supervisor.observe(body)
        world.supervisor.observe({**body, "status": {}})
    await asyncio.sleep(0.05)
    assert world.nix.evaluated == ["a"]
    assert len([request for request in world.api.requests if request[0] == "PATCH"]) == requests


async def test_an_old_observation_that_comes_late_changes_nothing(world: World) -> None:
    world.apply("a", 1)
    world.apply("b", 2)
    await world.reaches("Succeeded", 2)
    old = dict(world.api.objects[expressions("n", "a")])
    old["metadata"] = {**old["metadata"], "generation": 1}
    world.supervisor.observe(old)
    await asyncio.sleep(0.05)
    assert world.nix.evaluated[-1] == "b"
    assert world.nix.evaluated.count("a") <= 1


async def test_many_changes_in_a_row_end_with_the_last_and_never_two_at_a_time(world: World) -> None:
    slow_end = asyncio.Event()

    async def unwilling() -> None:
        try:
            await forever()
        finally:
            await slow_end.wait()

    world.nix.builds["one"] = unwilling
    world.apply("one", 1)
    await world.until(lambda: world.nix.building == ["one"])
    world.apply("two", 2)
    world.apply("three", 3)
    await asyncio.sleep(0.05)
    # The first has not ended yet: nothing else may run beside it.
    assert world.nix.building == ["one"]
    slow_end.set()
    await world.reaches("Succeeded", 3)
    assert world.nix.building == ["one", "three"]


async def test_what_was_published_before_a_change_stays_the_last_good_result(world: World) -> None:
    async def broken() -> None:
        raise BuildFailed("no")

    world.nix.builds["bad"] = broken
    world.apply("good", 1)
    await world.reaches("Succeeded", 1)
    # The watch is behind: it shows the new generation with the status of before.
    body = world.apply("bad", 2)
    body_of_before = {**body, "status": {}}
    world.supervisor.observe(body_of_before)
    await world.reaches("Failed", 2)
    assert world.status["result"].endswith("-good")


async def test_a_late_status_never_lands_on_a_newer_generation(world: World) -> None:
    gate = asyncio.Event()
    world.nix.builds["a"] = gate.wait  # type: ignore[assignment]
    world.apply("a", 1)
    await world.reaches("Running", 1)
    # The user changes it; the watch has not told yet.
    world.api.objects[expressions("n", "a")]["metadata"]["generation"] = 2
    gate.set()
    await world.until(lambda: ("GET", expressions("n", "a")) in world.api.requests)
    await asyncio.sleep(0.02)
    assert world.status["phase"] == "Running"
    world.apply("b", 2)
    await world.reaches("Succeeded", 2)
    assert [root["path"][-2:] for root in world.status["gcRoots"]] == ["-b", "-a"]


async def test_infrastructure_that_fails_is_tried_again_and_the_slot_given_back(world: World) -> None:
    failures = [CacheUnavailable("down"), CacheUnavailable("down")]

    async def flaky() -> None:
        if failures:
            raise failures.pop()

    world.nix.builds["a"] = flaky
    world.apply("a", 1)
    await world.reaches("Succeeded", 1)
    assert world.nix.building == ["a", "a", "a"]
    await world.until(lambda: "CacheUnavailable" in world.event_reasons())


async def test_roots_that_cannot_be_made_are_tried_again(world: World) -> None:
    world.roots.broken = True
    world.apply("a", 1)
    await world.until(lambda: "disk error" in world.status.get("message", ""))
    assert world.status["phase"] == "Pending"
    world.roots.broken = False
    await world.reaches("Succeeded", 1)
    assert [path.name for path in world.roots.found.values()] == ["a"]


async def test_nodes_that_cannot_be_listed_are_no_reason_to_build_for_nothing(world: World) -> None:
    world.api.fail = lambda method, path: ApiError("away", status=None) if path == core("nodes") else None
    world.apply("a", 1)
    await world.until(lambda: "away" in world.status.get("message", ""))
    assert world.nix.evaluated == []
    world.api.fail = lambda method, path: None
    await world.reaches("Succeeded", 1)


async def test_a_status_that_cannot_be_written_does_not_hold_up_the_build(world: World) -> None:
    world.api.fail = lambda method, path: ApiError("away", status=503) if method == "PATCH" else None
    world.apply("a", 1)
    await world.until(lambda: world.nix.building == ["a"] and world.closures.valid)
    world.api.fail = lambda method, path: None
    await world.reaches("Succeeded", 1)


async def test_events_that_cannot_be_posted_break_nothing(world: World) -> None:
    world.api.fail = lambda method, path: ApiError("no", status=403) if "/events" in path else None
    world.apply("a", 1)
    await world.reaches("Succeeded", 1)
    assert world.event_reasons() == []


async def test_a_spec_that_is_invalid_fails_for_good_with_every_problem(world: World) -> None:
    world.apply("", 1, historyLimit=0)
    await world.reaches("Failed", 1)
    assert "spec.data.expr" in world.status["message"]
    assert "spec.historyLimit" in world.status["message"]
    assert conditions.find(world.status["conditions"], "Evaluated")["reason"] == "InvalidInput"  # type: ignore[index]


async def test_deletion_waits_for_the_build_to_end_before_roots_go(world: World) -> None:
    world.nix.builds["a"] = forever
    body = world.apply("a", 1)
    await world.until(lambda: world.nix.building == ["a"])
    assert len(world.roots.found) == 1
    body["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    world.supervisor.observe(body)
    await world.supervisor.release(Subject("n", "a", UID))
    assert world.nix.cancelled == ["a"]
    assert world.roots.found == {}


async def test_releasing_one_expression_leaves_the_roots_of_others(world: World) -> None:
    other = "n/a/11111111-2222-3333-4444-555555555555-x86_64-linux-x"
    world.roots.found = {other: StorePath(HASH, "o"), "strange": StorePath(HASH, "s")}
    await world.supervisor.release(Subject("n", "a", UID))
    assert sorted(world.roots.found) == sorted([other, "strange"])


async def test_an_expression_that_vanished_unseen_is_released_with_its_build(world: World) -> None:
    world.nix.builds["a"] = forever
    world.apply("a", 1)
    await world.until(lambda: world.nix.building == ["a"])
    await world.supervisor.release_all_but({UID})
    assert world.nix.cancelled == []
    await world.supervisor.release_all_but(set())
    assert world.nix.cancelled == ["a"]
    assert world.roots.found == {}


async def test_a_refresh_that_is_due_is_done_and_the_next_one_waited_for(world: World) -> None:
    world.apply("a", 1, refresh="1h")
    await world.reaches("Succeeded", 1)
    body = world.api.objects[expressions("n", "a")]
    # Another process, 61 minutes later.
    later = World()
    later.now = world.now + timedelta(minutes=61)
    later.api.objects[expressions("n", "a")] = body
    later.closures.valid.update(world.closures.valid)
    task = asyncio.create_task(later.supervisor.run())
    await asyncio.sleep(0)
    later.supervisor.observe(body)
    await later.until(lambda: later.nix.evaluated == ["a"])
    await later.reaches("Succeeded", 1)
    evaluated = conditions.find(later.status["conditions"], "Evaluated")
    assert evaluated is not None
    assert evaluated["lastTransitionTime"] == timestamp(later.now)
    await asyncio.sleep(0.05)
    assert later.nix.evaluated == ["a"]
    task.cancel()
    await asyncio.wait({task})


async def test_a_refresh_that_is_not_due_leaves_a_result_alone(world: World) -> None:
    world.apply("a", 1, refresh="1h")
    await world.reaches("Succeeded", 1)
    await asyncio.sleep(0.05)
    assert world.nix.evaluated == ["a"]


def test_a_novel_in_the_rebuild_annotation_is_kept_as_a_digest() -> None:
    def rebuild(text: str) -> str:
        return Wanted.parse({"metadata": {"annotations": {"cknix.cool/rebuild": text}}}).rebuild

    assert rebuild("now") == "now"
    assert len(rebuild("x" * 5000)) == 64
    assert rebuild("x" * 5000) != rebuild("y" * 5000)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (31_560_000, "30.1 MiB"), (2**50, "1024.0 TiB")],
)
def test_sizes_are_for_people(count: int, shown: str) -> None:
    assert size(count) == shown
