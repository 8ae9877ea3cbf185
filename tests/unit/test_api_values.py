"""Durations, progress and conditions."""

import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api import conditions
from cknix_csi.api.conditions import Status
from cknix_csi.api.durations import PATTERN, parse_duration
from cknix_csi.api.progress import Progress, humanise

NOW = datetime(2026, 3, 1, 12, 0, 0, 999_999, tzinfo=UTC)

parts = st.integers(0, 10**6)


@given(*(st.none() | parts for _ in "dhms"))
def test_a_duration_is_the_sum_of_its_parts(
    days: int | None, hours: int | None, minutes: int | None, seconds: int | None
) -> None:
    values = (days, hours, minutes, seconds)
    text = "".join(f"{value}{unit}" for value, unit in zip(values, "dhms", strict=True) if value is not None)
    expected = timedelta(days=days or 0, hours=hours or 0, minutes=minutes or 0, seconds=seconds or 0)
    if text:
        assert parse_duration(text) == expected.total_seconds()


@given(st.text(st.sampled_from("0123456789dhms ٣.-+")))
def test_a_duration_is_accepted_exactly_if_the_crd_accepts_it(text: str) -> None:
    accepted = bool(text) and re.fullmatch(PATTERN, text) is not None
    try:
        parse_duration(text)
    except ValueError as error:
        assert not accepted
        assert repr(text) in str(error)
    else:
        assert accepted


@pytest.mark.parametrize("text", ["", "1", "h", "1h ", "1m1h", "1w", "-1s", "1.5h", "1h1h", "1H", "1s\n"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; write for example 90s"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (60, "1m0s"), (130, "2m10s"), (3600, "1h0m"), (90_061, "25h1m")]
)
def test_times_are_told_as_kubectl_tells_ages(seconds: float, text: str) -> None:
    assert humanise(seconds) == text


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress(), "starting"),
        (Progress(0, 3), "0 of 3"),
        (Progress(1, 3, ("gcc", "zlib")), "1 of 3 (gcc, zlib)"),
        (Progress(building=("gcc",)), "gcc"),
    ],
)
def test_progress_reads_as_a_count_and_what_is_worked_on(progress: Progress, text: str) -> None:
    assert str(progress) == text


def put(
    old: list[conditions.Condition], status: Status, now: datetime, kind: str = "Ready"
) -> list[conditions.Condition]:
    return conditions.with_condition(old, kind, status, reason="Because", message="m", generation=7, now=now)


def test_a_first_condition_has_every_field_of_the_api() -> None:
    assert put([], "False", NOW) == [
        {
            "type": "Ready",
            "status": "False",
            "observedGeneration": 7,
            "lastTransitionTime": "2026-03-01T12:00:00Z",
            "reason": "Because",
            "message": "m",
        }
    ]


statuses: st.SearchStrategy[Status] = st.sampled_from(["True", "False", "Unknown"])


@given(st.lists(st.tuples(st.sampled_from(["Ready", "Built", "Evaluated"]), statuses), min_size=1))
def test_the_transition_time_moves_exactly_when_the_status_changes(history: list[tuple[str, Status]]) -> None:
    current: list[conditions.Condition] = []
    expected: dict[str, tuple[Status, str]] = {}
    for hour, (kind, status) in enumerate(history):
        now = NOW + timedelta(hours=hour)
        if kind not in expected or expected[kind][0] != status:
            expected[kind] = (status, conditions.timestamp(now))
        current = put(current, status, now, kind)
    assert {one["type"]: (one["status"], one["lastTransitionTime"]) for one in current} == expected
    assert [one["type"] for one in current] == list(expected), "a condition keeps its place"


def test_other_conditions_and_the_old_list_stay_as_they_were() -> None:
    old: list[conditions.Condition] = [
        {"type": "Built", "status": "True", "extra": 1},
        {"type": "Ready", "status": "True", "reason": "Old"},
    ]
    before = [dict(one) for one in old]
    new = put(old, "True", NOW)
    assert old == before
    assert new[0] == before[0]
    assert new[1]["reason"] == "Because"


def test_a_condition_somebody_wrote_without_a_time_gets_one() -> None:
    assert put([{"type": "Ready", "status": "True"}], "True", NOW)[0]["lastTransitionTime"] == "2026-03-01T12:00:00Z"


def test_messages_keep_within_the_limit_of_the_api() -> None:
    [one] = conditions.with_condition([], "Ready", "True", reason="R", message="x" * 99_999, generation=1, now=NOW)
    assert len(one["message"]) == 32_768


def test_timestamps_are_in_utc() -> None:
    assert conditions.timestamp(NOW.astimezone(timezone(timedelta(hours=5)))) == "2026-03-01T12:00:00Z"


@pytest.mark.parametrize(("status", "expected"), [("True", True), ("False", False), ("Unknown", False), (True, False)])
def test_only_the_text_true_is_true(status: object, expected: bool) -> None:
    assert (
        conditions.is_true([{"type": "Other", "status": "True"}, {"type": "Ready", "status": status}], "Ready")
        == expected
    )
    assert not conditions.is_true([], "Ready")
