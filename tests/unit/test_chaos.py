"""The chaos suite's own words: its scenarios are documented, its arguments are checked, its table tells what failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chaos import play, podstart
from tests.chaos.__main__ import main
from tests.chaos.scenario import SCENARIOS

REPOSITORY = Path(__file__).parents[2]


def test_every_scenario_is_documented_and_no_other() -> None:
    section = (REPOSITORY / "docs/operations.md").read_text().partition("## What is tested under faults")[2]
    rows = [line.split("|")[1] for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    assert sorted(re.findall("`([^`]+)`", "".join(rows))) == sorted([*SCENARIOS, podstart.NAME])


def test_an_unknown_scenario_is_refused_before_anything_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--short", "reboot", "rebot"]) == 2
    assert capsys.readouterr().err.startswith("unknown scenarios: rebot; known are ")


def test_the_table_shows_what_failed_and_what_was_not_reached() -> None:
    good = play.Outcome("good", dict.fromkeys(play.ACTS, play.OK), {"fault": 3.0})
    bad = play.Outcome("bad")
    bad.acts |= {"setting": play.OK, "fault": play.OK, "already running": play.FAILED}
    early = play.Outcome("early")
    early.acts["setting"] = play.FAILED
    header, *lines = (line.split() for line in play.table([good, bad, early]).splitlines())
    assert lines == [
        ["good", "ok", "ok", "ok", "ok", "3"],
        ["bad", "ok", "FAILED", "-", "-", "0"],
        ["early", "FAILED", "-", "-", "-", "0"],
    ]
    assert header[0] == "scenario"
    assert [outcome.good for outcome in (good, bad, early)] == [True, False, False]
