"""Failures that repeat are told once, and their end is told."""

from __future__ import annotations

from cknix_csi.repeats import IDLE_SECONDS, REMINDER_SECONDS, Repeats


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_same_failure_is_told_once() -> None:
    repeats = Repeats(Clock())
    assert [repeats.failed("v1", "broken").aloud for _ in range(4)] == [True, False, False, False]


def test_another_failure_is_told_and_so_is_the_first_when_it_returns() -> None:
    repeats = Repeats(Clock())
    assert [repeats.failed("v1", words).aloud for words in ("a", "b", "b", "a")] == [True, True, False, True]


def test_each_volume_has_failures_of_its_own() -> None:
    repeats = Repeats(Clock())
    repeats.failed("v1", "broken")
    assert repeats.failed("v2", "broken").aloud
    assert repeats.over("v2") is not None
    assert not repeats.failed("v1", "broken").aloud


def test_a_failure_that_lasts_is_told_again_now_and_then() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    repeats.failed("v1", "broken")
    told = []
    for _ in range(20):
        clock.now += REMINDER_SECONDS / 10
        told.append(repeats.failed("v1", "broken").aloud)
    assert [number for number, aloud in enumerate(told, 1) if aloud] == [10, 20]


def test_its_end_knows_how_often_and_how_long_it_was() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    for _ in range(3):
        repeats.failed("v1", "broken", {"pod": "a/b"})
        clock.now += 5
    ended = repeats.over("v1")
    assert ended is not None
    assert (ended.count, ended.seconds, ended.words, ended.fields) == (3, 10.0, "broken", {"pod": "a/b"})
    assert repeats.over("v1") is None
    assert repeats.failed("v1", "broken").aloud


def test_what_nobody_meets_any_more_is_forgotten() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    repeats.failed("v1", "broken")
    clock.now += IDLE_SECONDS / 2
    repeats.failed("v2", "broken")
    clock.now += IDLE_SECONDS / 2
    assert [gone.words for gone in repeats.idle()] == ["broken"]
    assert repeats.over("v1") is None
    assert repeats.over("v2") is not None


def test_a_failure_is_told_again_when_its_words_change_and_after_a_while() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    began = clock.now
    aloud = [repeats.failed("work", words).aloud for words in ("a", "a", "b", "b", "a")]
    assert aloud == [True, False, True, False, True]
    clock.now = began + REMINDER_SECONDS - 1
    assert not repeats.failed("work", "a").aloud
    clock.now = began + REMINDER_SECONDS
    assert repeats.failed("work", "a").aloud
    ended = repeats.over("work")
    assert ended is not None
    assert ended.count == 7
    assert repeats.over("work") is None
    assert repeats.failed("work", "a").aloud
