"""The test ladder itself, on a ladder of a few tiny tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tests.ladder

PASS = "def test_passes(): pass\n"
FAIL = "def test_fails(): assert False\n"
SKIP = "import pytest\ndef test_skips(): pytest.skip('no moon tonight')\n"
TEARDOWN = """
import pytest
@pytest.fixture
def thing():
    yield
    raise RuntimeError
def test_fails_twice(thing): assert False
"""
TOGETHER = """
import pathlib, time
def test_sees_the_other_rung():
    pathlib.Path({mine!r}).touch()
    deadline = time.monotonic() + 60
    while not pathlib.Path({other!r}).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    print({mine!r})
"""
BROKEN = "import nowhere_to_be_found\n"
UNSTEADY = """
import pathlib
def test_unsteady():
    seen = pathlib.Path("seen")
    assert seen.exists() or seen.touch()
"""
CRASH = "import os\ndef test_crashes(): os._exit(3)\n"


class Ladder:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "tests").mkdir()
        (directory / "tests/__init__.py").touch()
        shutil.copy(tests.ladder.__file__, directory / "tests")
        (directory / "pytest.ini").write_text("[pytest]\n\n")

    def rung(self, name: str, *texts: str) -> None:
        directory = self.directory / "tests" / name
        directory.mkdir()
        for number, text in enumerate(texts):
            (directory / f"test_{name}_{number}.py").write_text(text)

    def module(self, name: str, text: str) -> None:
        """What a preparation runs: ``python -m`` *name*."""
        directory = self.directory / name.replace(".", "/")
        directory.mkdir(parents=True)
        (directory / "__init__.py").touch()
        (directory / "__main__.py").write_text(text)

    def climb(self, *rungs: str, ci: bool = False) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST")}
        environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        if ci:
            environ["CI"] = "true"
        command = [sys.executable, "-m", "tests.ladder", *rungs]
        return subprocess.run(
            command, cwd=self.directory, env=environ, capture_output=True, text=True, check=False, timeout=120
        )


@pytest.fixture
def ladder(tmp_path: Path) -> Ladder:
    return Ladder(tmp_path)


def test_every_test_is_counted_once_and_the_last_line_tells(ladder: Ladder) -> None:
    ladder.rung("unit", PASS, FAIL, SKIP, TEARDOWN)
    ladder.rung("kernel", PASS)
    ran = ladder.climb("kernel", "unit")
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-1] == "2 passed, 2 failed, 1 skipped"
    table = [line.split()[:4] for line in ran.stdout.splitlines() if line.startswith(("unit ", "kernel "))]
    assert table == [["unit", "1", "2", "1"], ["kernel", "1", "0", "0"]]
    assert "SKIPPED on unit: tests.unit.test_unit_2::test_skips: no moon tonight" in ran.stdout


def test_a_long_rung_runs_in_shares_and_is_told_as_one(ladder: Ladder) -> None:
    ladder.rung("unit", PASS)
    ladder.rung("kernel", PASS, FAIL, PASS, SKIP, PASS)
    ran = ladder.climb("unit", "kernel")
    assert "━━━ kernel, 1 of 2" in ran.stdout
    assert "━━━ kernel, 2 of 2" in ran.stdout
    table = [line.split()[:4] for line in ran.stdout.splitlines() if line.startswith("kernel ")]
    assert table == [["kernel", "3", "1", "1"]]


@pytest.mark.parametrize(("ci", "code"), [(False, 0), (True, 1)])
def test_a_skipped_test_is_a_failure_in_ci_only(ladder: Ladder, ci: bool, code: int) -> None:
    ladder.rung("unit", PASS, SKIP)
    ran = ladder.climb("unit", ci=ci)
    assert ran.returncode == code
    assert ran.stdout.splitlines()[-1] == "1 passed, 0 failed, 1 skipped"
    assert ("in CI a skipped test" in ran.stdout) == ci


@pytest.mark.parametrize("texts", [(), ("",), (SKIP,)])
def test_a_rung_on_which_nothing_ran_is_a_failure_in_ci(ladder: Ladder, texts: tuple[str, ...]) -> None:
    ladder.rung("unit", PASS)
    ladder.rung("kernel", *texts)
    ran = ladder.climb("unit", "kernel", ci=True)
    assert ran.returncode == 1
    assert "NOTHING RAN on kernel" in ran.stdout


def test_all_is_well_when_all_pass(ladder: Ladder) -> None:
    ladder.rung("unit", PASS)
    ran = ladder.climb("unit", ci=True)
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "1 passed, 0 failed, 0 skipped")


@pytest.mark.parametrize("text", [BROKEN, CRASH])
def test_a_rung_that_does_not_come_to_its_end_has_failed(ladder: Ladder, text: str) -> None:
    ladder.rung("unit", PASS, text)
    ran = ladder.climb("unit")
    assert ran.returncode == 1
    assert ", 1 failed, " in ran.stdout.splitlines()[-1]


def test_an_unknown_rung_is_named_with_those_that_are_known(ladder: Ladder) -> None:
    ran = ladder.climb("unit", "moon")
    assert ran.returncode == 2
    assert ran.stderr == "unknown rungs: moon; known are unit, kernel, nix, node, api, cluster\n"


def test_what_a_rung_needs_is_made_before_it(ladder: Ladder) -> None:
    ladder.module("tests.nixes", "import pathlib, time; time.sleep(1); pathlib.Path('made').touch()")
    ladder.rung("nix", "import pathlib\ndef test_is_made(): assert pathlib.Path('made').exists()\n")
    ran = ladder.climb("nix")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "1 passed, 0 failed, 0 skipped")


def test_when_that_cannot_be_made_the_rungs_before_it_are_still_told(ladder: Ladder) -> None:
    ladder.module("tests.nixes", "raise SystemExit('no disk')")
    ladder.rung("unit", PASS)
    ladder.rung("nix", PASS)
    ran = ladder.climb("unit", "nix")
    assert ran.returncode == 1
    assert "no disk" in ran.stderr
    assert "could not be built" in ran.stderr
    assert ran.stdout.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"


def test_two_rungs_run_at_once_and_what_they_print_is_not_mixed(ladder: Ladder) -> None:
    ladder.rung("unit", TOGETHER.format(mine="one", other="two") + FAIL)
    ladder.rung("kernel", TOGETHER.format(mine="two", other="one") + FAIL)
    ran = ladder.climb("unit", "kernel")
    assert ran.stdout.splitlines()[-1] == "2 passed, 2 failed, 0 skipped"
    for rung in ("unit", "kernel"):
        (shown,) = re.findall(f"━━━ {rung}, at its end\n(.*?)(?=\n━━━|\nrung )", ran.stdout, re.DOTALL)
        assert re.findall(r"FAILED tests/(\w+)/", shown) == [rung]


def test_what_fails_beside_others_and_passes_alone_is_named_and_no_failure(ladder: Ladder) -> None:
    ladder.rung("unit", PASS)
    ladder.rung("kernel", PASS, UNSTEADY, PASS)
    ran = ladder.climb("unit", "kernel", ci=True)
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "4 passed, 0 failed, 0 skipped")
    assert "PASSED ONLY ALONE on kernel: tests.kernel.test_kernel_1::test_unsteady" in ran.stdout
    assert "assert (False or None)" in ran.stdout, "how it failed is shown"


def test_what_fails_again_has_failed(ladder: Ladder) -> None:
    ladder.rung("unit", FAIL)
    ladder.rung("kernel", UNSTEADY)
    ran = ladder.climb("unit", "kernel")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (1, "1 passed, 1 failed, 0 skipped")
    assert "━━━ unit, again and alone: tests.unit.test_unit_0::test_fails" in ran.stdout


@pytest.mark.parametrize("texts", [(FAIL, FAIL, FAIL, UNSTEADY), (UNSTEADY, CRASH), (UNSTEADY, BROKEN)])
def test_where_many_fail_or_something_else_does_nothing_is_run_again(ladder: Ladder, texts: tuple[str, ...]) -> None:
    ladder.rung("unit", *texts)
    ladder.rung("kernel", PASS)
    ran = ladder.climb("unit", "kernel")
    assert ran.returncode == 1
    assert "PASSED ONLY ALONE" not in ran.stdout


def test_a_rung_by_itself_has_nothing_beside_it(ladder: Ladder) -> None:
    ladder.rung("unit", UNSTEADY)
    assert ladder.climb("unit").returncode == 1
