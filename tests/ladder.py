"""Climbs the rungs of the test ladder, from pure logic to a real cluster: ``python -m tests.ladder [RUNG…]``.

Each rung is a pytest process of its own.  At the end it says how many tests ran on each, and what was skipped and why.
With ``CI=true`` a skipped test, and a rung without tests, is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RUNGS = ("unit", "kernel", "nix", "node", "api", "cluster")
NEED_NIXES = {"nix", "node"}
NEED_COMPONENTS = {"node", "api", "cluster"}
TESTS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Result:
    rung: str
    seconds: float
    passed: int
    failed: int
    skipped: tuple[str, ...]
    """Name and reason of each skipped test."""


def main(wanted: Sequence[str]) -> int:
    unknown = [rung for rung in wanted if rung not in RUNGS]
    if unknown:
        print(f"unknown rungs: {', '.join(unknown)}; known are {', '.join(RUNGS)}", file=sys.stderr)
        return 2
    rungs = [rung for rung in RUNGS if not wanted or rung in wanted]
    strict = os.environ.get("CI") == "true"
    started = time.monotonic()
    preparation = _prepare(rungs)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="cknix-ladder-") as directory:
        for rung in rungs:
            if rung in NEED_NIXES | NEED_COMPONENTS and preparation is not None:
                if preparation.wait() != 0:
                    _report(results, time.monotonic() - started, strict)
                    print("what the other rungs need could not be built; see above", file=sys.stderr)
                    return 1
                preparation = None
            results.append(_climb(rung, Path(directory) / f"{rung}.xml"))
    return _report(results, time.monotonic() - started, strict)


def _prepare(rungs: Sequence[str]) -> subprocess.Popen[bytes] | None:
    """Build what later rungs need while the first ones run; cached, so usually a matter of moments."""
    modules = []
    if NEED_NIXES.intersection(rungs):
        modules.append("tests.nixes")
    if NEED_COMPONENTS.intersection(rungs):
        modules.append("tests.cluster.harness build")
    if not modules:
        return None
    script = " && ".join(f"{sys.executable} -m {module}" for module in modules)
    return subprocess.Popen(["sh", "-ec", script], cwd=TESTS.parent, stdin=subprocess.DEVNULL)


def _climb(rung: str, report: Path) -> Result:
    print(f"\n━━━ {rung}", flush=True)
    started = time.monotonic()
    # -p no:cacheprovider: a clean clone stays clean.
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(TESTS / rung),
        f"--junitxml={report}",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    code = subprocess.run(command, cwd=TESTS.parent, stdin=subprocess.DEVNULL, check=False).returncode
    seconds = time.monotonic() - started
    outcomes = _outcomes(report) if report.exists() else {}
    skipped = tuple(f"{name}: {reason}" for name, (outcome, reason) in outcomes.items() if outcome == "skipped")
    failed = sum(outcome == "failed" for outcome, _ in outcomes.values())
    passed = len(outcomes) - failed - len(skipped)
    # Any other end than "passed", "some failed" and "none collected" is a failure of its own.
    if code not in {0, 5}:
        failed = max(failed, 1)
    return Result(rung, seconds, passed, failed, skipped)


def _outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """Name of each test → passed, failed or skipped, and why, from a JUnit *report*.

    A test that fails and whose teardown fails as well is there twice.
    """
    outcomes: dict[str, tuple[str, str]] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes[name] = ("failed", "")
        elif skipped is not None:
            outcomes.setdefault(name, ("skipped", skipped.get("message") or "without a reason"))
        else:
            outcomes.setdefault(name, ("passed", ""))
    return outcomes


def _report(results: Sequence[Result], seconds: float, strict: bool) -> int:
    print(f"\n{'rung':<10}{'passed':>8}{'failed':>8}{'skipped':>9}{'time':>9}")
    for result in results:
        counts = f"{result.passed:>8}{result.failed:>8}{len(result.skipped):>9}"
        print(f"{result.rung:<10}{counts}{result.seconds:>8.0f}s")
    for result in results:
        for reason in result.skipped:
            print(f"SKIPPED on {result.rung}: {reason}")
    empty = [result.rung for result in results if not result.passed]
    for rung in empty:
        print(f"NOTHING RAN on {rung}")
    passed, failed = sum(result.passed for result in results), sum(result.failed for result in results)
    skipped = sum(len(result.skipped) for result in results)
    refused = strict and bool(skipped or empty)
    if refused:
        print("in CI a skipped test, and a rung on which nothing ran, is a failure")
    print(f"in {seconds:.0f} s")
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed or refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
