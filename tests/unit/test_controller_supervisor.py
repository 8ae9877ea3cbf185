"""The supervisor and what it runs, with Nix, the store and the API server in memory."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

from cknix_csi.api import conditions
from cknix_csi.api.closure import Closure, PathInfo
from cknix_csi.api.conditions import timestamp
from cknix_csi.api.errors import BuildFailed, CacheUnavailable, CknixError
from cknix_csi.api.expression import Data
from cknix_csi.api.progress import Progress
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.controller.nodes import ClusterSystems
from cknix_csi.controller.ports import Options
from cknix_csi.controller.queue import BuildQueue
from cknix_csi.controller.reconcile import Services, Wanted, size
from cknix_csi.controller.status import STEPS
from cknix_csi.controller.supervisor import Supervisor
from cknix_csi.kube.api import ApiError, Json, core, expressions
from cknix_csi.kube.events import EventRecorder, Subject
from cknix_csi.nix.nix import Evaluation
from tests.unit.fakeapi import FakeApi

UID = "01234567-89ab-cdef-0123-456789abcdef"
HASH = "7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb"


def path_of(name: str) -> StorePath:
    """What an expression comes to."""
    return StorePath(hashlib.sha256(name.encode()).hexdigest()[:32].replace("e", "z"), name)


class Nix:
    """The expression's text is the name of the result; how a build goes is set per name."""

    def __init__(self, valid: set[StorePath]) -> None:
        self.valid = valid
        self.evaluated: list[str] = []
        self.building: list[str] = []
        self.cancelled: list[str] = []
        self.builds: dict[str, Callable[[], Awaitable[None]]] = {}
        self.offered: set[str] = set()
        """What a substituter has."""
        self.away = False
        """No substituter can be asked."""
        self.sought: list[str] = []

    async def evaluate(self, data: Data, system: str) -> Evaluation:
        self.evaluated.append(data.text)
        return Evaluation(path_of(data.text), ("drv",))

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

    async def substitute(self, path: StorePath) -> None:
        self.sought.append(path.name)
        if self.away:
            raise CacheUnavailable("no route to the cache")
        if path.name not in self.offered:
            raise BuildFailed("no substituter has it")
        self.valid.add(path)


class Closures:
    def __init__(self) -> None:
        self.valid: set[StorePath] = set()
        self.unreadable = False
        self.looked = 0

    async def is_valid(self, path: StorePath) -> bool:
        self.looked += 1
        if self.unreadable:
            raise CknixError("the database is locked", Situation.NIX_DATABASE_UNREADABLE)
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
    def __init__(self, node: str = "node-0") -> None:
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
                    "cknix-system", "http://cache", node, ("x86_64-linux",), 2, retry_first=0.01, retry_cap=0.02
                ),
                now=lambda: self.now,
            )
        )

    def check_soon(self) -> None:
        """From the next Expression on, look at the store again and again."""
        services = self.supervisor._services
        self.supervisor._services = replace(services, options=replace(services.options, check_seconds=0.01))

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


async def test_a_failure_that_repeats_is_told_aloud_once_and_its_cause_stays_shown_during_the_next_try(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "cknix_csi.controller")
    gate = asyncio.Event()

    async def down() -> None:
        if len(world.nix.building) == 4:
            await gate.wait()
            return
        raise CacheUnavailable("no route to the cache")

    world.nix.builds["a"] = down
    world.apply("a", 1)
    await world.until(lambda: len(world.nix.building) == 4 and world.status["message"].startswith("building"))
    assert world.status["message"] == "building; the last try: no route to the cache"
    built = conditions.find(world.status["conditions"], "Built")
    assert built is not None
    assert (built["reason"], built["message"]) == ("Building", "the last try: no route to the cache")
    gate.set()
    await world.reaches("Succeeded", 1)
    assert [conditions.find(world.status["conditions"], kind)["message"] for kind in STEPS] == ["", "", ""]  # type: ignore[index]
    told = [(record.levelname, record.getMessage()) for record in caplog.records if "no route" in record.getMessage()]
    assert [level for level, _ in told] == ["WARNING", "DEBUG", "DEBUG"]
    assert all("trying again in" in message for _, message in told)
    assert "n/a: ended after 3 failed tries" in caplog.text


def ready(world: World) -> tuple[str, str]:
    found = conditions.find(world.status.get("conditions", []), "Ready")
    return ("", "") if found is None else (found["status"], found["reason"])


async def failed_after_success(world: World) -> None:
    async def broken() -> None:
        raise BuildFailed("no")

    world.nix.builds["bad"] = broken
    world.apply("good", 1)
    await world.reaches("Succeeded", 1)
    world.apply("bad", 2)
    await world.reaches("Failed", 2)


async def taken_over(world: World, node: str = "node-1") -> tuple[World, asyncio.Task[None]]:
    """A controller on *node*, with a store of its own and the same API server."""
    other = World(node)
    other.api.objects = world.api.objects
    other.nix.builds = world.nix.builds
    task = asyncio.create_task(_both(other))
    await other.until(lambda: other.supervisor._tasks is not None)
    return other, task


async def _both(world: World) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(world.supervisor.run())
        tasks.create_task(world.events.run())


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def test_a_last_good_result_is_taken_from_a_substituter_where_the_store_is_another(world: World) -> None:
    await failed_after_success(world)
    other, task = await taken_over(world)
    other.nix.offered = {"good"}
    other.supervisor.observe(other.api.objects[expressions("n", "a")])
    await other.until(lambda: [path.name for path in other.roots.found.values()] == ["good"])
    await other.until(lambda: ready(other) == ("True", "LastGoodResult"))
    assert other.nix.building == []
    assert "lostResults" not in other.status
    assert "ResultLost" not in other.event_reasons()
    await ended(task)


async def test_a_substituter_that_is_away_is_asked_again_and_the_loss_told_once(world: World) -> None:
    await failed_after_success(world)
    other, task = await taken_over(world)
    other.check_soon()
    other.nix.away = True
    other.supervisor.observe(other.api.objects[expressions("n", "a")])
    await other.until(lambda: len(other.nix.sought) >= 3)
    assert ready(other) == ("False", "ResultLost")
    await other.until(lambda: "ResultLost" in other.event_reasons())
    (event,) = [body for key, body in other.api.objects.items() if "/events/" in key and body["reason"] == "ResultLost"]
    assert event["count"] == 1
    assert "no route to the cache" in event["message"]
    other.nix.away = False
    other.nix.offered = {"good"}
    await other.until(lambda: ready(other) == ("True", "LastGoodResult"))
    await ended(task)


async def test_one_that_no_substituter_has_is_asked_for_once(world: World) -> None:
    await failed_after_success(world)
    other, task = await taken_over(world)
    other.check_soon()
    other.supervisor.observe(other.api.objects[expressions("n", "a")])
    await other.until(lambda: "ResultLost" in other.event_reasons())
    await asyncio.sleep(0.1)
    assert other.nix.sought == ["good"]
    assert other.roots.found == {}
    assert other.status["result"].endswith("-good")
    # Somebody brings it back.
    other.closures.valid.add(path_of("good"))
    await other.until(lambda: ready(other) == ("True", "LastGoodResult"))
    assert [path.name for path in other.roots.found.values()] == ["good"]
    await other.until(lambda: "ResultFound" in other.event_reasons())
    await ended(task)


async def test_a_result_that_the_store_loses_under_a_running_controller_is_built_again(world: World) -> None:
    world.check_soon()
    world.apply("a", 1)
    await world.reaches("Succeeded", 1)
    world.closures.valid.clear()
    await world.until(lambda: world.nix.building == ["a", "a"])
    await world.reaches("Succeeded", 1)
    assert world.nix.sought == []


async def test_what_the_store_itself_has_lost_was_not_left_on_another_node(world: World) -> None:
    config = core("configmaps", "cknix-system", "cknix-cache")
    world.api.objects[config] = {"data": {"node": "node-0", "nodeBefore": "node-9"}}
    world.check_soon()
    await failed_after_success(world)
    world.closures.valid.clear()
    await world.until(lambda: ready(world) == ("False", "ResultLost"))
    found = conditions.find(world.status["conditions"], "Ready")
    assert found is not None
    assert "the controller's store lost it; correct the Expression" in found["message"]
    assert "node" not in world.status["lostResults"][0]
    # A store that never had it is another matter.
    other, task = await taken_over(world)
    other.api.objects[expressions("n", "a")]["status"]["lostResults"] = []
    other.supervisor.observe(other.api.objects[expressions("n", "a")])
    await other.until(lambda: other.status["lostResults"])
    assert other.status["lostResults"][0]["node"] == "node-0"
    await ended(task)


async def test_a_rebuild_that_fails_on_another_node_leaves_the_result_where_it_was(world: World) -> None:
    async def broken() -> None:
        raise BuildFailed("it is not what it was")

    world.api.objects[core("configmaps", "cknix-system", "cknix-cache")] = {"data": {"node": "node-0"}}
    world.apply("a", 1)
    await world.reaches("Succeeded", 1)
    other, task = await taken_over(world)
    other.nix.builds["a"] = broken
    other.supervisor.observe(other.api.objects[expressions("n", "a")])
    await other.reaches("Failed", 1)
    await other.until(lambda: ready(other) == ("False", "ResultLost"))
    assert other.status["lostResults"][0]["node"] == "node-0"
    await other.until(lambda: other.roots.found == {} and other.nix.sought == ["a"])
    await ended(task)


async def test_what_has_been_built_stays_rooted_while_the_rest_is_tried_again(world: World) -> None:
    async def down() -> None:
        raise CacheUnavailable("down")

    world.apply("good", 1)
    await world.reaches("Succeeded", 1)
    world.nix.builds["a"] = down
    world.apply("a", 2)
    await world.until(lambda: len(world.nix.building) > 2)
    while len(world.nix.building) < 12:
        assert {path.name for path in world.roots.found.values()} == {"good", "a"}
        await asyncio.sleep(0.002)


async def test_a_rebuild_that_is_not_to_be_had_for_now_makes_the_result_lost_for_now(world: World) -> None:
    world.apply("a", 1)
    await world.reaches("Succeeded", 1)
    other, task = await taken_over(world)
    down = True

    async def flaky() -> None:
        if down:
            raise CacheUnavailable("down")

    other.nix.builds["a"] = flaky
    other.supervisor.observe(other.api.objects[expressions("n", "a")])
    await other.until(lambda: ready(other) == ("False", "ResultLost") and other.nix.sought == ["a"])
    down = False
    await other.reaches("Succeeded", 1)
    assert ready(other) == ("True", "Succeeded")
    await ended(task)


async def test_a_store_that_cannot_be_looked_at_is_no_sign_of_a_loss(world: World) -> None:
    await failed_after_success(world)
    before = world.status
    again, task = await taken_over(world)
    again.check_soon()
    again.closures.valid.update(world.closures.valid)
    again.supervisor.observe(again.api.objects[expressions("n", "a")])
    await again.until(lambda: again.roots.found)
    again.closures.unreadable = True
    looked = again.closures.looked
    await again.until(lambda: again.closures.looked > looked + 3)
    assert again.status == before
    assert again.nix.evaluated == []
    await ended(task)


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
