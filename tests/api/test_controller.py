"""The controller process against a real API server, with the rights it is installed with; only Nix is a script."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from cknix_csi.api import conditions
from cknix_csi.api.expression import FINALIZER, Observed
from cknix_csi.kube.api import JSON_PATCH, MERGE_PATCH, Json, core, expressions
from cknix_csi.kube.client import KubernetesApi
from tests.api.conftest import Controller, Expressions, eventually
from tests.api.fakenix import store_path
from tests.api.server import DRIVER_NAMESPACE, Server


def condition(status: Json, kind: str) -> Any:
    return conditions.find(status["conditions"], kind)


def path(name: str) -> str:
    return str(store_path(name))


async def test_an_expression_goes_from_pending_over_running_to_succeeded(
    expr: Expressions, controller: Controller
) -> None:
    controller.start(max_builds=1)
    await expr.create("first", "result=first build=gate")
    await expr.reaches("first", "Running")
    await expr.create("hello", "result=hello build=gate")
    pending = await expr.shows("hello", lambda status: "build slot" in status.get("message", ""))
    assert pending["phase"] == "Pending"
    controller.world.open("first")
    running = await expr.shows("hello", lambda status: status.get("progress", {}).get("done") == 1)
    assert running["phase"] == "Running"
    assert running["progress"] == {"done": 1, "expected": 3, "building": ["hello"]}
    controller.world.open("hello")
    status = await expr.reaches("hello", "Succeeded")
    assert status["result"] == path("hello")
    assert status["results"] == [{"system": "x86_64-linux", "path": path("hello"), "closureSize": 1234, "paths": 1}]
    assert [(root["path"], root["generation"]) for root in status["gcRoots"]] == [(path("hello"), 1)]
    assert {c["type"]: c["status"] for c in status["conditions"]} == dict.fromkeys(
        ("Evaluated", "Built", "Published", "Ready"), "True"
    )
    assert "progress" not in status
    assert list(controller.roots().values()).count(path("hello")) == 1


async def test_kubectl_wait_for_ready_after_a_change_waits_for_the_changed_result(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("a", "result=one")
    await expr.reaches("a", "Succeeded")
    await expr.change("a", expr="result=two build=gate")
    waiting = asyncio.create_task(
        asyncio.to_thread(
            expr.server.kubectl, "wait", "--for=condition=Ready", "expr/a", "-n", expr.namespace, "--timeout=30s"
        )
    )
    status = await expr.reaches("a", "Running")
    assert condition(status, "Ready")["status"] == "True"
    assert not waiting.done()
    controller.world.open("two")
    await waiting
    assert (await expr.status("a"))["result"] == path("two")


async def test_a_failed_rebuild_keeps_the_last_good_result_and_says_so(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("a", "result=good")
    good = await expr.reaches("a", "Succeeded")
    await expr.change("a", expr="result=bad build=fail")
    status = await expr.reaches("a", "Failed")
    assert status["observedGeneration"] == 2
    assert status["result"] == path("good")
    assert status["results"] == good["results"]
    first, _, rest = status["message"].partition("\n\n")
    assert first.startswith("BuildFailed: builder for 'x' failed with exit code 1")
    assert rest.endswith("error: builder for 'x' failed with exit code 1")
    row = expr.server.kubectl("get", "expr", "a", "-n", expr.namespace, "-o", "wide").splitlines()[1]
    assert first in row
    assert condition(status, "Built")["reason"] == "BuildFailed"
    ready = condition(status, "Ready")
    assert (ready["status"], ready["reason"], ready["observedGeneration"]) == ("True", "LastGoodResult", 1)
    assert ready["message"].startswith("result of generation 1; generation 2 failed: builder for 'x' failed")
    assert ready["lastTransitionTime"] == condition(good, "Ready")["lastTransitionTime"]
    # The root of what was never built is gone again; that of the good result is not.
    await controller.keeps_only(path("good"))
    await expr.told("a", "BuildStarted", "Succeeded", "BuildFailed")


async def test_an_expression_that_cannot_be_evaluated_fails_with_nixs_own_words(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("a", "result=a evaluate=fail")
    status = await expr.reaches("a", "Failed")
    assert "attribute 'helo' missing" in status["message"]
    assert condition(status, "Ready")["status"] == "False"
    assert condition(status, "Ready")["reason"] == "EvaluationFailed"
    assert "result" not in status
    event = (await expr.told("a", "EvaluationFailed"))["EvaluationFailed"]
    assert event["type"] == "Warning"
    assert "attribute 'helo' missing" in event["message"]


async def test_a_failure_is_final_until_something_changes(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("a", "result=a build=fail")
    await expr.reaches("a", "Failed")
    await expr.annotate("a", unrelated="1")
    await expr.create("other", "result=other")
    await expr.reaches("other", "Succeeded")
    assert controller.world.noted("build", "a") == 1
    await expr.change("a", expr="result=a")
    await expr.reaches("a", "Succeeded", 2)


async def test_a_build_that_never_ends_is_reported_as_such(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("a", "result=a build=hang")
    status = await expr.reaches("a", "Failed")
    assert condition(status, "Built")["reason"] == "DeadlineExceeded"
    await eventually(lambda: _has(expr, "a", "DeadlineExceeded"))


async def test_a_full_disk_is_waited_out(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("a", "result=a build=full")
    status = await expr.shows("a", lambda status: "trying again" in status.get("message", ""))
    assert status["phase"] == "Pending"
    assert "No space left" in status["message"]
    await controller.noted("build", "a", 2)
    controller.world.open("a")
    await expr.reaches("a", "Succeeded")


async def test_a_bug_is_shown_and_retried_and_disturbs_nobody_else(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("a", "result=a evaluate=crash")
    await expr.shows("a", lambda status: "RuntimeError: a bug in the program" in status.get("message", ""))
    await controller.noted("evaluate", "a", 2)
    await expr.create("b", "result=b")
    await expr.reaches("b", "Succeeded")
    await expr.change("a", expr="result=a")
    await expr.reaches("a", "Succeeded", 2)


async def test_a_change_while_it_builds_cancels_what_is_obsolete(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("a", "result=old build=gate")
    await controller.noted("build", "old")
    await expr.change("a", expr="result=new")
    status = await expr.reaches("a", "Succeeded", 2)
    assert status["result"] == path("new")
    assert controller.world.noted("build cancelled", "old") == 1
    await controller.keeps_only(path("new"))


async def test_a_change_of_labels_disturbs_no_build(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("a", "result=a build=gate")
    await controller.noted("build", "a")
    await expr.api.patch(expressions(expr.namespace, "a"), {"metadata": {"labels": {"x": "y"}}}, kind=MERGE_PATCH)
    await expr.create("later", "result=later")
    await expr.reaches("later", "Succeeded")
    assert controller.world.noted("build cancelled", "a") == 0
    controller.world.open("a")
    await expr.reaches("a", "Succeeded")


async def test_deletion_releases_the_roots_and_the_finalizer(expr: Expressions, controller: Controller) -> None:
    controller.start()
    body = await expr.create("a", "result=a")
    await expr.create("b", "result=b")
    await expr.reaches("a", "Succeeded")
    await expr.reaches("b", "Succeeded")
    assert FINALIZER in (await expr.get("a"))["metadata"]["finalizers"]
    assert any(body["metadata"]["uid"] in name for name in controller.roots())
    expr.delete("a")
    await expr.gone("a")
    assert list(controller.roots().values()) == [path("b")]


async def test_deletion_in_the_middle_of_a_build_ends_the_build(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("a", "result=a build=gate")
    await controller.noted("build", "a")
    expr.delete("a")
    await expr.gone("a")
    assert controller.world.noted("build cancelled", "a") == 1
    assert controller.roots() == {}


async def test_an_expression_whose_finalizer_was_taken_away_by_hand_releases_its_roots(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("a", "result=a")
    await expr.reaches("a", "Succeeded")
    # As people do who are tired of waiting; the controller must not be quick enough to put it back.
    with controller.frozen():
        await expr.api.patch(expressions(expr.namespace, "a"), {"metadata": {"finalizers": None}}, kind=MERGE_PATCH)
        expr.delete("a")
        await expr.gone("a")
        assert list(controller.roots().values()) == [path("a")]

    async def released() -> bool:
        return controller.roots() == {}

    await eventually(released)


async def test_an_expression_recreated_under_its_name_starts_from_nothing(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("a", "result=one")
    await expr.reaches("a", "Succeeded")
    expr.delete("a")
    await expr.gone("a")
    await expr.create("a", "result=bad build=fail")
    status = await expr.reaches("a", "Failed")
    assert "result" not in status
    assert "gcRoots" not in status


async def test_history_keeps_so_many_results_and_no_more(expr: Expressions, controller: Controller) -> None:
    controller.start()
    spec = {"data": {"expr": "result=r1"}, "historyLimit": 2}
    await expr.create("a", spec)
    await expr.reaches("a", "Succeeded")
    for number in (2, 3):
        await expr.change("a", expr=f"result=r{number}")
        await expr.reaches("a", "Succeeded", number)
    status = await expr.status("a")
    assert [(root["path"], root["generation"]) for root in status["gcRoots"]] == [(path("r3"), 3), (path("r2"), 2)]

    async def pruned() -> bool:
        return sorted(controller.roots().values()) == sorted([path("r2"), path("r3")])

    await eventually(pruned)
    # The same result again is no new entry, but of the newer generation; an old one comes to the front.
    await expr.change("a", expr="result=r3 # again")
    status = await expr.reaches("a", "Succeeded", 4)
    assert [(root["path"], root["generation"]) for root in status["gcRoots"]] == [(path("r3"), 4), (path("r2"), 2)]
    await expr.change("a", expr="result=r2")
    status = await expr.reaches("a", "Succeeded", 5)
    assert [(root["path"], root["generation"]) for root in status["gcRoots"]] == [(path("r2"), 5), (path("r3"), 4)]
    await expr.told("a", "ResultChanged")


async def test_two_build_at_a_time_and_the_third_waits(expr: Expressions, controller: Controller) -> None:
    controller.start(max_builds=2)
    for name in ("a", "b"):
        await expr.create(name, f"result={name} build=gate")
        await controller.noted("build", name)
    await expr.create("c", "result=c build=gate")
    status = await expr.shows("c", lambda status: status.get("message") == "waiting for a build slot")
    assert status["phase"] == "Pending"
    await expr.create("d", "result=d build=gate")
    await expr.shows("d", lambda status: status.get("message") == "waiting for a build slot, 1 ahead")
    assert controller.world.noted("evaluate", "c") == 0
    controller.world.open("b")
    await controller.noted("build", "c")
    assert controller.world.noted("evaluate", "d") == 0
    for name in "acd":
        controller.world.open(name)
        await expr.reaches(name, "Succeeded")


async def test_annotations_stay_small_for_a_very_long_expression(expr: Expressions, controller: Controller) -> None:
    controller.start()
    text = "result=a #"
    await expr.create("a", text + "x" * (131_072 - len(text)))
    await expr.reaches("a", "Succeeded")
    await expr.change("a", historyLimit=4)
    await expr.reaches("a", "Succeeded", 2)
    annotations = (await expr.get("a"))["metadata"].get("annotations", {})
    assert sum(len(key) + len(value) for key, value in annotations.items()) < 2048


async def test_the_rebuild_annotation_starts_anew_once(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("a", "result=a build=fail")
    await expr.reaches("a", "Failed")
    await expr.annotate("a", cknix__x="y", **{"cknix.cool__rebuild": "now"})
    await controller.noted("build", "a", 2)
    status = await expr.shows(
        "a", lambda status: status.get("lastHandledRebuild") == "now" and status["phase"] == "Failed"
    )
    assert status["observedGeneration"] == 1
    controller.stop()
    controller.start()
    await expr.create("b", "result=b")
    await expr.reaches("b", "Succeeded")
    assert controller.world.noted("build", "a") == 2


async def test_a_store_path_and_what_is_not_in_any_store(expr: Expressions, controller: Controller) -> None:
    controller.start()
    (controller.world.valid / store_path("there").basename).touch()
    await expr.create("there", {"data": {"storePath": path("there")}, "systems": ["aarch64-linux"]})
    status = await expr.reaches("there", "Succeeded")
    # Nothing is built for it, so the controller's own system does not matter.
    assert [entry["system"] for entry in status["results"]] == ["aarch64-linux"]
    await expr.create("missing", {"data": {"storePath": path("missing")}})
    status = await expr.reaches("missing", "Failed")
    assert "no substituter has it" in status["message"]
    await controller.keeps_only(path("there"))


async def test_systems_that_cannot_be_built_are_named_and_the_others_built(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    both = {"data": {"expr": "result=a"}, "systems": ["aarch64-linux", "x86_64-linux"]}
    await expr.create("some", both)
    status = await expr.reaches("some", "Succeeded")
    assert [entry["system"] for entry in status["results"]] == ["x86_64-linux"]
    assert "not built for aarch64-linux" in status["message"]
    await expr.create("none", {"data": {"expr": "result=a"}, "systems": ["aarch64-linux"]})
    status = await expr.reaches("none", "Failed")
    assert condition(status, "Evaluated")["reason"] == "NoBuildableSystem"
    assert "spec.systems" in status["message"]


async def test_without_systems_it_is_built_for_those_of_the_clusters_nodes(
    expr: Expressions, controller: Controller, api: KubernetesApi
) -> None:
    names = []
    try:
        for arch in ("amd64", "arm64"):
            names.append(f"{expr.namespace}-{arch}")
            labels = {"kubernetes.io/arch": arch, "kubernetes.io/os": "linux"}
            metadata = {"name": names[-1], "labels": labels}
            await api.create(core("nodes"), {"apiVersion": "v1", "kind": "Node", "metadata": metadata})
        controller.start(systems=["x86_64-linux", "aarch64-linux"])
        await expr.create("a", "result=a")
        status = await expr.reaches("a", "Succeeded")
        assert [entry["system"] for entry in status["results"]] == ["x86_64-linux", "aarch64-linux"]
        assert len(controller.roots()) == 2
    finally:
        for name in names:
            expr.server.kubectl("delete", "node", name)


async def test_the_same_event_again_raises_its_count(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("a", "result=a build=fail")
    await expr.reaches("a", "Failed")
    await expr.annotate("a", **{"cknix.cool__rebuild": "1"})

    async def counted() -> bool:
        event = (await expr.events("a")).get("BuildFailed")
        return event is not None and event["count"] == 2

    await eventually(counted, lambda: expr.events("a"))
    event = (await expr.events("a"))["BuildFailed"]
    assert event["source"]["component"] == "cknix-controller"
    assert event["message"] in expr.server.kubectl("describe", "expr", "a", "-n", expr.namespace).replace("\n  ", "\n")


async def test_the_key_is_made_once_and_told_to_the_nodes(
    expr: Expressions, controller: Controller, api: KubernetesApi
) -> None:
    controller.start()
    secret = core("secrets", DRIVER_NAMESPACE, "cknix-cache-key")
    config = core("configmaps", DRIVER_NAMESPACE, "cknix-cache")
    await expr.create("a", "result=a")
    await expr.reaches("a", "Succeeded")
    first = (await api.get(secret))["data"]
    told = (await api.get(config))["data"]
    assert told["url"] == "http://cknix-cache.cknix-system.svc"
    assert told["publicKey"].startswith("cknix-cache-")
    controller.stop()
    await api.patch(config, {"data": {"publicKey": "somebody's:else"}}, kind=MERGE_PATCH)
    controller.start()

    async def right_again() -> bool:
        return bool((await api.get(config))["data"] == told)

    await eventually(right_again)
    assert (await api.get(secret))["data"] == first
    assert controller.world.noted("serving", told["publicKey"]) == 2


async def test_a_terminated_controller_ends_its_builds_and_exits_cleanly(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("a", "result=a build=gate")
    await controller.noted("build", "a")
    assert await asyncio.to_thread(controller.stop) == 0
    assert controller.world.noted("build cancelled", "a") == 1
    assert controller.world.noted("stopped") == 1


async def test_a_restart_resumes_what_was_running_and_leaves_alone_what_was_done(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("done", "result=done")
    await expr.create("failed", "result=failed build=fail")
    await expr.create("running", "result=running build=gate")
    await expr.reaches("done", "Succeeded")
    await expr.reaches("failed", "Failed")
    await expr.reaches("running", "Running")
    await controller.noted("build", "running")
    before = {name: (await expr.get(name))["metadata"]["resourceVersion"] for name in ("done", "failed")}
    controller.kill()
    for name in controller.roots():
        (controller.world.directory / "root/nix/var/nix/gcroots/cknix/expressions" / name).unlink()
    controller.start()
    await controller.noted("build", "running", 2)
    controller.world.open("running")
    await expr.reaches("running", "Succeeded")

    async def rooted() -> bool:
        return sorted(controller.roots().values()) == sorted([path("done"), path("running")])

    await eventually(rooted)
    assert controller.world.noted("evaluate", "done") == 1
    assert controller.world.noted("evaluate", "failed") == 1
    after = {name: (await expr.get(name))["metadata"]["resourceVersion"] for name in ("done", "failed")}
    assert after == before


async def test_a_result_that_the_store_lost_is_built_again_while_it_stays_shown(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("a", "result=a build=gate")
    controller.world.open("a")
    await expr.reaches("a", "Succeeded")
    controller.stop()
    controller.world.collect("a")
    (controller.world.directory / "gates/a").unlink()
    controller.start()
    await controller.noted("build", "a", 2)
    status = await expr.reaches("a", "Running")
    assert status["result"] == path("a")
    assert condition(status, "Ready")["status"] == "True"
    controller.world.open("a")
    await expr.reaches("a", "Succeeded")


async def last_good(expr: Expressions, controller: Controller) -> Json:
    """Two results, and a newest generation that does not build."""
    controller.start(node="node-0")
    await expr.create("a", "result=old")
    await expr.reaches("a", "Succeeded")
    await expr.change("a", expr="result=good")
    await expr.reaches("a", "Succeeded")
    await expr.change("a", expr="result=bad build=fail")
    status = await expr.reaches("a", "Failed")
    await controller.keeps_only(path("good"), path("old"))
    return status


def said(controller: Controller, level: str, words: str) -> int:
    return sum(f" {level} " in line and words in line for line in controller.log().splitlines())


async def test_a_controller_that_moves_says_what_it_has_lost_and_has_it_again_when_it_moves_back(
    expr: Expressions, controller: Controller, second: Controller
) -> None:
    before = await last_good(expr, controller)
    controller.stop()

    second.start(node="node-1")
    status = await expr.shows("a", lambda status: condition(status, "Ready")["reason"] == "ResultLost")
    # Nodes that have the closure go on with it: the result is named as ever.
    for field in ("phase", "result", "results", "observedGeneration", "message"):
        assert status[field] == before[field]
    assert Observed.parse(await expr.get("a")).results == {"x86_64-linux": store_path("good")}
    ready = condition(status, "Ready")
    assert (ready["status"], ready["observedGeneration"]) == ("False", 2)
    assert "the controller's store was left on node node-0" in ready["message"]
    assert "gcRoots" not in status
    assert status["lostResults"] == [{**root, "node": "node-0"} for root in before["gcRoots"]]
    for name in ("good", "old"):
        await second.noted("substitute", name)
    await second.keeps_only()
    described = expr.server.kubectl("get", "events", "-n", expr.namespace, "-o", "json")
    events = [event for event in json.loads(described)["items"] if event["reason"] == "ResultLost"]
    assert {event["type"] for event in events} == {"Warning"}
    for name, generation in (("good", 2), ("old", 1)):
        (message,) = [event["message"] for event in events if path(name) in event["message"]]
        assert message.startswith(
            f"{path(name)} of generation {generation} is lost: the controller's store was left on node node-0, "
            "and no substituter has it; move the controller back to node node-0, correct the Expression"
        )
        assert said(second, "WARNING", f"ResultLost: {path(name)}") == 1
    assert second.world.noted("build") == 0
    # It stays so after a restart, which does not know any more where it was before but by what it has written.
    second.stop()
    second.start(node="node-1")
    await second.noted("substitute", "good", 2)
    assert condition(await expr.status("a"), "Ready")["reason"] == "ResultLost"
    second.stop()

    builds = controller.world.noted("build")
    controller.start(node="node-0")
    status = await expr.shows("a", lambda status: condition(status, "Ready")["status"] == "True")
    assert condition(status, "Ready")["reason"] == "LastGoodResult"
    assert status["gcRoots"] == before["gcRoots"]
    assert "lostResults" not in status
    await controller.keeps_only(path("good"), path("old"))
    assert controller.world.noted("build") == builds
    await eventually(lambda: _has(expr, "a", "ResultFound"))


async def test_what_was_lost_is_had_again_by_correcting_the_expression(
    expr: Expressions, controller: Controller, second: Controller
) -> None:
    await last_good(expr, controller)
    controller.stop()
    second.start(node="node-1")
    await eventually(lambda: _has(expr, "a", "ResultLost"))
    await expr.change("a", expr="result=good")
    status = await expr.reaches("a", "Succeeded", 4)
    assert (condition(status, "Ready")["status"], condition(status, "Ready")["reason"]) == ("True", "Succeeded")
    assert [root["path"] for root in status["gcRoots"]] == [path("good")]
    assert [root["path"] for root in status["lostResults"]] == [path("old")]
    await second.keeps_only(path("good"))


async def test_what_a_substituter_has_is_not_lost_by_a_move(
    expr: Expressions, controller: Controller, second: Controller
) -> None:
    before = await last_good(expr, controller)
    controller.stop()
    for name in ("good", "old"):
        second.world.offer(name)
    second.start(node="node-1")
    await second.keeps_only(path("good"), path("old"))
    status = await expr.shows("a", lambda status: status.get("gcRoots") == before["gcRoots"])
    assert condition(status, "Ready")["reason"] == "LastGoodResult"
    assert "ResultLost" not in await expr.events("a")


async def test_a_result_that_a_collection_takes_at_once_is_built_again_before_it_counts(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("a", "result=a build=taken")
    await expr.reaches("a", "Succeeded")
    assert controller.world.noted("built", "a") == 2


async def test_changes_made_while_the_controller_was_away_are_seen(expr: Expressions, controller: Controller) -> None:
    controller.start()
    await expr.create("changed", "result=old")
    await expr.create("deleted", "result=deleted")
    await expr.reaches("changed", "Succeeded")
    await expr.reaches("deleted", "Succeeded")
    controller.kill()
    await expr.change("changed", expr="result=new")
    await expr.create("new", "result=made-meanwhile")
    expr.delete("deleted")
    controller.start()
    await expr.reaches("changed", "Succeeded", 2)
    await expr.reaches("new", "Succeeded")
    await expr.gone("deleted")
    assert path("deleted") not in controller.roots().values()


async def test_a_refresh_that_came_due_while_the_controller_was_away_is_made_up_for(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    for name in ("due", "later"):
        await expr.create(name, {"data": {"expr": f"result={name}"}, "refresh": "1h"})
        await expr.reaches(name, "Succeeded")
    controller.stop()
    status = await expr.status("due")
    condition(status, "Evaluated")["lastTransitionTime"] = "2020-01-01T00:00:00Z"
    await expr.api.patch(expressions(expr.namespace, "due", status=True), {"status": status}, kind=MERGE_PATCH)
    controller.start()
    await controller.noted("evaluate", "due", 2)
    status = await expr.shows(
        "due",
        lambda status: (
            status["phase"] == "Succeeded" and "2020" not in condition(status, "Evaluated")["lastTransitionTime"]
        ),
    )
    assert status["observedGeneration"] == 1
    assert controller.world.noted("evaluate", "due") == 2
    assert controller.world.noted("evaluate", "later") == 1


async def test_kills_at_random_moments_converge(expr: Expressions, controller: Controller) -> None:
    moments = random.Random(3)
    names = [f"e{number}" for number in range(4)]
    for name in names:
        controller.world.open(f"{name}-1")
        controller.world.open(f"{name}-2")
    for step in range(6):
        controller.start(max_builds=2)
        if step == 0:
            for name in names:
                await expr.create(name, f"result={name}-1 build=gate")
        if step == 3:
            for name in names:
                await expr.change(name, expr=f"result={name}-2 build=gate")
        # Starting takes about two seconds; the kill comes before, during and after the work.
        await asyncio.sleep(moments.uniform(1.0, 3.5))
        controller.kill()
    expr.delete(names[0])
    controller.start()
    await expr.gone(names[0])
    for name in names[1:]:
        status = await expr.reaches(name, "Succeeded", 2)
        assert status["result"] == path(f"{name}-2")

    async def exactly_the_roots_of_the_status() -> bool:
        wanted = [root["path"] for name in names[1:] for root in (await expr.status(name))["gcRoots"]]
        return sorted(wanted) == sorted(controller.roots().values())

    await eventually(exactly_the_roots_of_the_status)


async def test_roots_of_vanished_expressions_are_released_at_start_and_no_others(
    expr: Expressions, controller: Controller
) -> None:
    controller.start()
    await expr.create("a", "result=a")
    await expr.reaches("a", "Succeeded")
    controller.stop()
    gone = f"{expr.namespace}/gone/11111111-2222-3333-4444-555555555555-x86_64-linux-{store_path('gone').hash}"
    foreign = "by-hand/keep"
    controller.add_root(gone, store_path("gone"))
    controller.add_root(foreign, store_path("foreign"))
    controller.start()

    async def released() -> bool:
        return gone not in controller.roots()

    await eventually(released)
    assert sorted(controller.roots().values()) == sorted([path("a"), path("foreign")])


async def test_roots_are_kept_when_nobody_can_tell_which_expressions_exist(
    expr: Expressions, controller: Controller, server: Server
) -> None:
    gone = f"{expr.namespace}/gone/11111111-2222-3333-4444-555555555555-x86_64-linux-{store_path('gone').hash}"
    controller.add_root(gone, store_path("gone"))
    # Without the right to list Expressions, every other request works: the most tempting kind of ignorance.
    role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/cknix-controller"
    rules = (await expr.api.get(role))["rules"]
    index = next(i for i, rule in enumerate(rules) if rule["resources"] == ["expressions"])
    verbs = {"op": "replace", "path": f"/rules/{index}/verbs"}
    try:
        await expr.api.patch(role, [{**verbs, "value": ["get", "watch", "patch"]}], kind=JSON_PATCH)
        controller.start()

        async def refused() -> bool:
            return "GC roots of vanished Expressions cannot be looked for yet" in controller.log()

        await eventually(refused)
        assert gone in controller.roots()
    finally:
        await expr.api.patch(role, [{**verbs, "value": rules[index]["verbs"]}], kind=JSON_PATCH)

    async def released() -> bool:
        return gone not in controller.roots()

    await eventually(released)


async def test_a_build_survives_the_api_server_and_its_end_is_told_afterwards(
    expr: Expressions, controller: Controller, server: Server
) -> None:
    controller.start()
    await expr.create("a", "result=a build=gate")
    await controller.noted("build", "a")
    server.kill_api_server()
    controller.world.open("a")
    await controller.noted("built", "a")
    await asyncio.to_thread(server.start_api_server)
    status = await expr.reaches("a", "Succeeded")
    assert status["result"] == path("a")
    assert controller.world.noted("build", "a") == 1
    # And the watch works again.
    await expr.create("b", "result=b")
    await expr.reaches("b", "Succeeded")


async def _has(expr: Expressions, name: str, reason: str) -> bool:
    return reason in await expr.events(name)
