"""The rules of an Expression's status."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api import conditions
from cknix_csi.api.expression import BUILT, EVALUATED, PUBLISHED, READY, Data, Observed, Spec
from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import StorePath
from cknix_csi.controller.status import (
    MAX_HEADLINE_BYTES,
    MAX_MESSAGE_BYTES,
    QUEUED,
    RETRYING,
    STEPS,
    ExpressionStatus,
    Loss,
    Result,
    Root,
    bounded,
    headline,
    is_settled,
    kept,
    phase,
    told,
    until_refresh,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HASH = "7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb"


def path(name: str) -> StorePath:
    return StorePath(HASH, name)


def result(name: str, system: str = "x86_64-linux") -> Result:
    return Result(system, path(name), 10, 2)


def succeeded(status: ExpressionStatus, generation: int, name: str, now: datetime = NOW) -> ExpressionStatus:
    status = status.begun(generation, "", now)
    for kind in STEPS:
        status = status.with_step(kind, "True", "Done", "", now)
    return status.with_results([result(name)], primary="x86_64-linux", history_limit=3, now=now).settled(now)


def failed(status: ExpressionStatus, generation: int, message: str, now: datetime = NOW) -> ExpressionStatus:
    status = status.begun(generation, "", now).with_step(EVALUATED, "True", "Evaluated", "", now)
    status = status.with_step(BUILT, "False", "BuildFailed", message, now)
    return replace(status, message=message).settled(now)


def test_nothing_done_is_pending() -> None:
    assert phase((), 1) == "Pending"
    assert ExpressionStatus().begun(1, "", NOW).phase == "Pending"


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_failed_is_failed(step: str) -> None:
    status = succeeded(ExpressionStatus(), 1, "a").with_step(step, "False", "Anything", "", NOW)
    assert status.phase == "Failed"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("reason", "expected"), [("Building", "Running"), (QUEUED, "Pending"), (RETRYING, "Pending")])
def test_an_unfinished_step_tells_by_its_reason_whether_work_goes_on(step: str, reason: str, expected: str) -> None:
    status = succeeded(ExpressionStatus(), 1, "a").with_step(step, "Unknown", reason, "", NOW)
    assert status.phase == expected


def test_steps_of_an_older_generation_say_nothing() -> None:
    steps = succeeded(ExpressionStatus(), 1, "a").steps
    assert phase(steps, 1) == "Succeeded"
    assert phase(steps, 2) == "Pending"


@given(
    st.lists(st.sampled_from(["True", "False", "Unknown"]), min_size=3, max_size=3),
    st.lists(st.sampled_from([1, 2]), min_size=3, max_size=3),
)
def test_only_three_current_steps_that_are_true_make_success(states: list[str], generations: list[int]) -> None:
    steps = [
        {"type": kind, "status": state, "observedGeneration": generation, "reason": "Building"}
        for kind, state, generation in zip(STEPS, states, generations, strict=True)
    ]
    assert (phase(steps, 2) == "Succeeded") == (states == ["True"] * 3 and generations == [2] * 3)


def test_ready_is_false_until_there_is_a_result_and_gives_the_reason_of_the_failure() -> None:
    ready = conditions.find(failed(ExpressionStatus(), 1, "no").render(NOW)["conditions"], READY)
    assert ready is not None
    assert (ready["status"], ready["reason"], ready["message"]) == ("False", "BuildFailed", "no")


def test_a_failed_generation_leaves_ready_true_for_the_one_the_result_is_from() -> None:
    status = failed(succeeded(ExpressionStatus(), 3, "a"), 4, "error: it broke")
    shown = status.render(NOW)
    assert shown["phase"] == "Failed"
    assert shown["result"] == str(path("a"))
    ready = conditions.find(shown["conditions"], READY)
    assert ready is not None
    assert (ready["status"], ready["reason"], ready["observedGeneration"]) == ("True", "LastGoodResult", 3)
    assert ready["message"] == "result of generation 3; generation 4 failed: it broke"


def test_ready_keeps_its_transition_time_through_rebuilds() -> None:
    status = succeeded(ExpressionStatus(), 1, "a")
    later = NOW + timedelta(hours=1)
    status = succeeded(failed(status, 2, "no", later), 3, "b", later)
    ready = conditions.find(status.render(later)["conditions"], READY)
    assert ready is not None
    assert ready["lastTransitionTime"] == "2026-01-02T03:04:05Z"
    assert ready["observedGeneration"] == 3


def test_what_is_written_is_read_back_the_same() -> None:
    status = failed(succeeded(ExpressionStatus(), 1, "a"), 2, "no")
    status = replace(status, rebuild="again")
    assert ExpressionStatus.parse({"status": status.render(NOW)}) == status


def lost(status: ExpressionStatus, name: str, node: str = "far") -> ExpressionStatus:
    return status.with_losses({path(name): Loss(node)}).settled(NOW)


def test_a_lost_result_stays_the_result_and_is_not_ready_until_the_store_has_it_again() -> None:
    good = failed(succeeded(ExpressionStatus(), 3, "a"), 4, "error: it broke")
    gone = lost(good, "a")
    shown, before = gone.render(NOW), good.render(NOW)
    for field in ("phase", "message", "result", "results", "observedGeneration"):
        assert shown[field] == before[field]
    assert "gcRoots" not in shown
    assert shown["lostResults"] == [{**before["gcRoots"][0], "node": "far"}]
    ready = conditions.find(shown["conditions"], READY)
    assert ready is not None
    assert (ready["status"], ready["reason"], ready["observedGeneration"]) == ("False", "ResultLost", 3)
    assert ready["message"].startswith(f"{path('a')} of generation 3: the controller's store was left on node far; ")
    assert "move the controller back to node far" in ready["message"]
    # A pod on a node that has it is given it still.
    observed = Observed.parse({"metadata": {"generation": 4}, "status": shown})
    assert observed.results == {"x86_64-linux": path("a")}
    assert not observed.ready
    assert gone.with_losses({}).settled(NOW).render(NOW) == before


def test_a_lost_result_of_before_takes_nothing_away_from_the_newest() -> None:
    status = lost(succeeded(succeeded(ExpressionStatus(), 1, "a"), 2, "b"), "a")
    shown = status.render(NOW)
    assert [root["path"] for root in shown["gcRoots"]] == [str(path("b"))]
    assert [root["path"] for root in shown["lostResults"]] == [str(path("a"))]
    assert conditions.is_true(shown["conditions"], READY)


def test_what_is_lost_is_read_back_in_its_place_and_keeps_where_it_was_left() -> None:
    status = ExpressionStatus()
    for generation, name in enumerate("abc", 1):
        status = succeeded(status, generation, name, NOW + timedelta(hours=generation))
    status = lost(status, "b", "first")
    again = ExpressionStatus.parse({"status": status.render(NOW)})
    assert again == status
    assert [root.path.name for root in again.roots] == ["c", "b", "a"]
    # Lost already; that the controller has moved on since does not matter.
    assert [root.lost for root in lost(again, "b", "second").roots] == [None, Loss("first"), None]


def test_a_result_that_is_built_again_is_lost_no_longer() -> None:
    status = succeeded(lost(succeeded(ExpressionStatus(), 1, "a"), "a"), 2, "a")
    assert status.lost == ()
    assert conditions.is_true(status.render(NOW)["conditions"], READY)


def test_lost_results_count_as_history_and_are_as_few() -> None:
    status = ExpressionStatus()
    for generation, name in enumerate("abcde", 1):
        status = succeeded(status, generation, name)
        status = status.with_losses({root.path: Loss() for root in status.roots})
    assert [root.path.name for root in status.lost] == ["e", "d", "c"]


def test_a_result_whose_root_somebody_took_from_the_status_gets_it_again_with_its_generation() -> None:
    shown = failed(succeeded(ExpressionStatus(), 3, "a"), 4, "no").render(NOW)
    del shown["gcRoots"]
    status = ExpressionStatus.parse({"status": shown}).with_all_rooted(NOW)
    assert [(root.path.name, root.generation) for root in status.roots] == [("a", 3)]
    assert status.with_all_rooted(NOW) is status


def test_malformed_entries_of_a_status_count_as_absent() -> None:
    status = ExpressionStatus.parse(
        {
            "status": {
                "result": "nonsense",
                "results": [{"system": "x"}, {"path": "/nix/store/x", "system": "x"}, "text", None],
                "gcRoots": [{"path": str(path("a")), "system": "x", "generation": "x", "createdAt": ""}],
                "lostResults": [{"path": "nonsense"}, "text", None],
                "conditions": ["text", {"type": "Other", "status": "True"}],
            }
        }
    )
    assert status == ExpressionStatus()


def test_a_consumer_reads_what_the_controller_writes() -> None:
    body = {
        "metadata": {"namespace": "n", "name": "a", "uid": "u", "generation": 2},
        "status": failed(succeeded(ExpressionStatus(), 1, "a"), 2, "no").render(NOW),
    }
    observed = Observed.parse(body)
    assert observed.ready
    assert observed.phase == "Failed"
    assert observed.results == {"x86_64-linux": path("a")}


def test_progress_is_bounded_and_gone_when_it_is_over() -> None:
    status = replace(ExpressionStatus(), progress=Progress(1, 2, tuple("x" * 300 for _ in range(40))))
    building = status.render(NOW)["progress"]["building"]
    assert len(building) == 16
    assert {len(name) for name in building} == {255}
    assert "progress" not in succeeded(status, 1, "a").render(NOW)


def test_the_primary_system_gives_the_result_and_else_the_first() -> None:
    results = [result("arm", "aarch64-linux"), result("intel")]
    status = ExpressionStatus().begun(1, "", NOW)
    assert status.with_results(results, primary="x86_64-linux", history_limit=1, now=NOW).result == path("intel")
    assert status.with_results(results, primary="riscv64-linux", history_limit=1, now=NOW).result == path("arm")


def test_a_system_that_is_dropped_keeps_no_roots() -> None:
    both = [result("arm", "aarch64-linux"), result("intel")]
    status = ExpressionStatus().begun(1, "", NOW).with_results(both, primary="x86_64-linux", history_limit=3, now=NOW)
    status = status.begun(2, "", NOW).with_results(both[1:], primary="x86_64-linux", history_limit=3, now=NOW)
    assert [root.system for root in status.roots] == ["x86_64-linux"]


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=12), st.integers(1, 4))
def test_history_is_the_newest_distinct_results_newest_first(names: list[str], limit: int) -> None:
    roots: tuple[Root, ...] = (Root("aarch64-linux", path("other"), 1, "t"),)
    for generation, name in enumerate(names, 1):
        roots = kept(roots, result(name), generation, limit, f"t{generation}")
    newest_first = list(dict.fromkeys(reversed(names)))[:limit]
    own = [root for root in roots if root.system == "x86_64-linux"]
    assert [root.path.name for root in own] == newest_first
    for root in own:
        assert root.generation == max(number for number, name in enumerate(names, 1) if name == root.path.name)
    assert [root.path.name for root in roots if root.system == "aarch64-linux"] == ["other"]


def test_a_result_that_stays_the_newest_keeps_its_age() -> None:
    roots = kept((), result("a"), 1, 3, "then")
    assert kept(roots, result("a"), 2, 3, "now") == (Root("x86_64-linux", path("a"), 2, "then"),)


def test_settled_is_the_same_generation_and_rebuild_at_its_end() -> None:
    done = succeeded(ExpressionStatus(), 2, "a")
    assert is_settled(done, 2, "")
    assert is_settled(failed(done, 2, "no"), 2, "")
    assert not is_settled(done, 3, "")
    assert not is_settled(done, 2, "again")
    assert not is_settled(done.begun(2, "", NOW), 2, "")


def spec(refresh: int | None) -> Spec:
    return Spec(Data("expr", "1"), refresh=refresh)


def test_refresh_counts_from_the_end_of_the_last_evaluation() -> None:
    status = succeeded(ExpressionStatus(), 1, "a", NOW)
    assert until_refresh(status, spec(None), NOW) is None
    assert until_refresh(status, spec(600), NOW + timedelta(seconds=100)) == 500
    assert until_refresh(status, spec(600), NOW + timedelta(hours=5)) == 0
    assert until_refresh(ExpressionStatus(), spec(600), NOW) == 0


def test_a_clock_that_was_wrong_does_not_put_refresh_off_for_ever() -> None:
    status = succeeded(ExpressionStatus(), 1, "a", NOW + timedelta(days=9999))
    assert until_refresh(status, spec(600), NOW) == 600


def test_each_evaluation_moves_the_time_it_is_counted_from() -> None:
    later = NOW + timedelta(hours=1)
    status = succeeded(succeeded(ExpressionStatus(), 1, "a"), 1, "a", later)
    assert until_refresh(status, spec(600), later) == 600


@given(st.text(max_size=3000), st.integers(200, 4000))
def test_a_bounded_text_fits_and_a_short_one_is_untouched(text: str, limit: int) -> None:
    assert len(bounded(text, limit).encode()) <= limit
    if len(text.encode()) <= limit:
        assert bounded(text, limit) == text


def test_a_long_log_keeps_its_first_line_and_its_end() -> None:
    log = "builder failed\n" + "\n".join(f"line {number}" for number in itertools.islice(itertools.count(), 5000))
    short = bounded(log)
    assert short.startswith("builder failed\n")
    assert short.endswith("line 4999")
    assert len(short.encode()) > MAX_MESSAGE_BYTES - 100


FAILED_BUILD = """\
cc main.c
main.c:1: error: expected ';'
error: builder for '/nix/store/7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb-x.drv' failed with exit code 1"""


@pytest.mark.parametrize(
    ("text", "first", "rest"),
    [
        ("", "BuildFailed", ""),
        ("no result", "BuildFailed: no result", ""),
        ("no result\nlook at it", "BuildFailed: no result", "look at it"),
        (
            "error:\n       … while evaluating\n\n       error: undefined variable 'x'\n       at a.nix:1:2:",
            "BuildFailed: undefined variable 'x', at a.nix:1:2",
            "error:\n       … while evaluating\n\n       error: undefined variable 'x'\n       at a.nix:1:2:",
        ),
        (
            FAILED_BUILD,
            "BuildFailed: builder for '/nix/store/7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb-x.drv' failed with exit code 1: "
            "main.c:1: error: expected ';'",
            FAILED_BUILD,
        ),
    ],
)
def test_a_message_says_it_all_in_its_first_line_and_nothing_twice(text: str, first: str, rest: str) -> None:
    assert told(text, reason="BuildFailed") == (f"{first}\n\n{rest}" if rest else first)


def test_the_first_line_says_what_happens_next() -> None:
    assert told("the disk is full\nof logs", then="trying again in 5s") == (
        "the disk is full; trying again in 5s\n\nof logs"
    )


@given(st.text(max_size=2000))
def test_a_headline_is_one_short_line(text: str) -> None:
    line = headline(text)
    assert len(line.encode()) <= MAX_HEADLINE_BYTES
    assert len(line.splitlines()) <= 1


def test_published_is_the_last_step() -> None:
    assert STEPS[-1] == PUBLISHED
