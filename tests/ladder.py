"""Climbs the rungs of the test ladder, from pure logic to a real cluster: ``python -m tests.ladder [RUNG…]``.

Each rung is a pytest process of its own, a long one several, and four run at a time, since much of a test is waiting.
At the end it says how many tests ran on each, and what was skipped and why.  With ``CI=true`` a skipped test, and a
rung without tests, is a failure.

Where the processors are shared, a deadline may pass because nobody got one.  So a test that failed is run once more
with nothing beside it: one that fails again has failed, one that passes is named at the end, to be mended.  When more
than a few fail, or a process ends as it should not, none is run again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

_DISK = """
mount -t tmpfs -o mode=755 tmpfs "$1"
truncate --size 64G "$1/image"
mkfs.ext4 -q -F "$1/image"
mount -t ext4 -o loop,noatime,noinit_itable "$1/image" "$1"
export TMPDIR="$1"
"""
"""For tests that need a disk's file system: one in memory, with the journal that a node's has."""

RUNGS = ("unit", "kernel", "nix", "node", "api", "cluster")
NEED_NIXES = {"nix", "node"}
NEED_COMPONENTS = {"node", "api", "cluster"}
NEED_PREPARATION = NEED_NIXES | NEED_COMPONENTS
IN_MEMORY = {
    # A place where Nix and its sandbox hide nothing, unlike /dev/shm.
    "nix": 'mount -t tmpfs -o mode=755 tmpfs "$1"',
    "kernel": _DISK,
    "node": _DISK,
}
"""How to mount what is faster than the machine's disk, where there is memory for it; it goes with its namespace."""
TESTS = Path(__file__).parent
AT_ONCE = 4
SHARES = {"kernel": 2, "nix": 2, "node": 3}
"""Between how many processes the files of a rung are shared out, where that costs little."""
LONGEST_FIRST = ("nix", "cluster", "api", "node", "kernel", "unit")
"""So that those that wait run beside those that compute, and none is left alone at the end."""
WAITING = {"cluster", "api"}
"""Rungs whose tests wait for programs with clocks of their own: those get a processor first, and are done sooner."""
MEMORY_NEEDED = 6 << 30
_LOOK_SECONDS = 0.2
_FEW = 3
"""So many failures may be the machine's."""


@dataclass(frozen=True, slots=True)
class Part:
    """The share of *number* (from 0) of a rung's test files, of *count* shares."""

    rung: str
    number: int = 0
    count: int = 1
    again: tuple[str, ...] = ()
    """Tests that failed and are run alone, instead of a share."""

    def __str__(self) -> str:
        if self.again:
            return f"{self.rung}, again and alone: {', '.join(self.again)}"
        return self.rung if self.count == 1 else f"{self.rung}, {self.number + 1} of {self.count}"

    @property
    def slug(self) -> str:
        # Short: sockets are below a directory of this name.
        return f"{self.rung}-{'a' if self.again else self.number}"

    def paths(self) -> list[str]:
        """What pytest is to run; shares of about the same size."""
        if self.again:
            return [
                f"{module.replace('.', '/')}.py::{test}"
                for module, _, test in (name.partition("::") for name in self.again)
            ]
        if self.count == 1:
            return [str(TESTS / self.rung)]
        files = sorted((TESTS / self.rung).glob("**/test_*.py"), key=lambda file: (-file.stat().st_size, file))
        return [str(file) for file in files[self.number :: self.count]]


@dataclass(frozen=True, slots=True)
class Result:
    rung: str
    seconds: float
    passed: int
    failed: int
    skipped: tuple[str, ...]
    """Name and reason of each skipped test."""
    failures: tuple[str, ...] = ()
    """Names of the tests that failed; none when something else did as well."""
    only_alone: tuple[str, ...] = ()
    """Names of those that have passed since."""


def main(wanted: Sequence[str]) -> int:
    unknown = [rung for rung in wanted if rung not in RUNGS]
    if unknown:
        print(f"unknown rungs: {', '.join(unknown)}; known are {', '.join(RUNGS)}", file=sys.stderr)
        return 2
    rungs = [rung for rung in RUNGS if not wanted or rung in wanted]
    strict = os.environ.get("CI") == "true"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cknix-") as directory:
        Path(directory).chmod(0o755)  # some tests are others than root
        results, prepared = _climb_all(rungs, Path(directory), _prepare(rungs))
        if len(rungs) > 1:
            results = _again(results, Path(directory))
    code = _report(results, time.monotonic() - started, strict)
    if not prepared:
        print("what the other rungs need could not be built; see above", file=sys.stderr)
        return 1
    return code


def _climb_all(
    rungs: Sequence[str], directory: Path, preparation: subprocess.Popen[bytes] | None
) -> tuple[list[Result], bool]:
    """What came of each of *rungs*, in their order, and whether all that they need could be prepared."""
    waiting = [part for rung in sorted(rungs, key=LONGEST_FIRST.index) for part in _parts(rung, alone=len(rungs) == 1)]
    running: dict[Future[Result], Part] = {}
    results: dict[str, Result] = {}
    prepared = preparation is None
    with ThreadPoolExecutor(AT_ONCE) as lanes:
        while waiting or running:
            if not prepared and preparation is not None and preparation.poll() is not None:
                if preparation.returncode != 0:
                    waiting = [part for part in waiting if part.rung not in NEED_PREPARATION]
                    preparation = None
                else:
                    prepared = True
            # Beside compilers there is no room for more.
            free = (AT_ONCE if prepared or preparation is None else 1) - len(running)
            for part in [part for part in waiting if prepared or part.rung not in NEED_PREPARATION][:free]:
                waiting.remove(part)
                running[lanes.submit(_climb, part, directory, alone=len(rungs) == 1)] = part
            done, _ = wait(running, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                rung, result = running.pop(future).rung, future.result()
                results[rung] = result if rung not in results else _together(results[rung], result)
            if not running:
                time.sleep(_LOOK_SECONDS)
    return [results[rung] for rung in rungs if rung in results], prepared


def _again(results: Sequence[Result], directory: Path) -> list[Result]:
    """*results*, after what failed in them has been run alone, if that is few."""
    if not 0 < sum(result.failed for result in results) <= _FEW:
        return list(results)
    return [_climb_again(result, directory) if result.failures else result for result in results]


def _climb_again(result: Result, directory: Path) -> Result:
    alone = _climb(Part(result.rung, again=result.failures), directory, alone=True)
    if alone.failed or alone.passed != result.failed:
        return result
    return replace(
        result,
        seconds=result.seconds + alone.seconds,
        passed=result.passed + alone.passed,
        failed=0,
        failures=(),
        only_alone=result.failures,
    )


def _parts(rung: str, *, alone: bool) -> list[Part]:
    """Of a rung that is *alone* what it prints is shown as it comes, so it stays whole."""
    files = list((TESTS / rung).glob("**/test_*.py"))
    count = 1 if alone else max(1, min(SHARES.get(rung, 1), len(files)))
    return [Part(rung, number, count) for number in range(count)]


def _together(one: Result, other: Result) -> Result:
    """Two parts of one rung."""
    return Result(
        one.rung,
        one.seconds + other.seconds,
        one.passed + other.passed,
        one.failed + other.failed,
        one.skipped + other.skipped,
        one.failures + other.failures if _all_named(one) and _all_named(other) else (),
    )


def _all_named(result: Result) -> bool:
    return len(result.failures) == result.failed


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


def _climb(part: Part, directory: Path, *, alone: bool) -> Result:
    """Run the tests of *part*; what they print is shown at once when it is *alone*, else at its end."""
    print(f"\n━━━ {part}", flush=True)
    started = time.monotonic()
    rung = part.rung
    report = directory / f"{part.slug}.xml"
    # -p no:cacheprovider: a clean clone stays clean.
    command = [
        sys.executable,
        "-m",
        "pytest",
        *part.paths(),
        f"--junitxml={report}",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    with ExitStack() as kept:
        if rung in IN_MEMORY and _has_memory():
            memory = directory / part.slug
            memory.mkdir()
            script = f'{IN_MEMORY[rung]}\nshift\nexec "$@"'
            command = ["unshare", "--mount", "sh", "-ec", script, "sh", str(memory), *command]
            command += [f"--basetemp={memory}/tests"]
        if not alone and rung not in WAITING:
            command = ["nice", "-n", "3", *command]
        output = None if alone else kept.enter_context((directory / f"{part.slug}.out").open("w+b"))
        code = subprocess.run(
            command, cwd=TESTS.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        ).returncode
        if output is not None:
            output.seek(0)
            print(f"\n━━━ {part}, at its end\n{output.read().decode(errors='replace')}", flush=True)
    seconds = time.monotonic() - started
    outcomes = _outcomes(report) if report.exists() else {}
    skipped = tuple(f"{name}: {reason}" for name, (outcome, reason) in outcomes.items() if outcome == "skipped")
    failures = tuple(name for name, (outcome, _) in outcomes.items() if outcome == "failed")
    passed, failed = len(outcomes) - len(failures) - len(skipped), len(failures)
    # Any other end than "passed", "some failed" and "none collected" is a failure of its own.
    if code not in {0, 5}:
        failed = max(failed, 1)
    return Result(rung, seconds, passed, failed, skipped, failures if code == 1 else ())


def _has_memory() -> bool:
    """True where stores may be in memory: they are made and removed there in two thirds of the time."""
    available = re.search(r"^MemAvailable: +([0-9]+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return os.geteuid() == 0 and available is not None and int(available[1]) * 1024 >= MEMORY_NEEDED


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
    for result in results:
        for name in result.only_alone:
            print(f"PASSED ONLY ALONE on {result.rung}: {name}: see above how it failed beside others")
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
