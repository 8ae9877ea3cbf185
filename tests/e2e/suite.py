"""One run of upstream's tests: the command, and what its JUnit report says of each spec."""

from __future__ import annotations

import os
import re
import signal
import string
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.cluster.harness import Cluster
from tests.cluster.harness.cache import progress
from tests.cluster.harness.command import Argument
from tests.cluster.harness.components import KUBERNETES, KUBERNETES_E2E
from tests.e2e.applicability import EXCLUSIONS

DEFINITION = Path(__file__).with_name("test-driver.yaml")
REPORT = "junit.xml"
OF_EXTERNAL_DRIVERS = r"External.Storage"
AT_ONCE = 4
TOPOLOGY_KEY = "cknix.cool/system"
_HEARTBEAT = 30.0
_SPEC = re.compile(
    r"External Storage \[Driver: [^]]+\] \[Testpattern: (?P<pattern>[^]]+)\](?: \[[^]]+\])* "
    r"(?P<suite>\S+) (?P<claim>.*)"
)
_NO_REASON = "skipped"


class Verdict(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """By the suite, for what the driver is said to be or not to be able to."""
    EXCLUDED = "excluded"
    """By us."""
    NOT_SELECTED = "not selected"


@dataclass(frozen=True, slots=True)
class Spec:
    """One of upstream's tests of external storage drivers, and what came of it."""

    pattern: str
    """Kind of volume, as upstream calls it."""
    suite: str
    claim: str
    verdict: Verdict
    why: str
    """It was skipped, excluded or failed."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is run in one go."""

    name: str
    focus: str
    """A regular expression: the specs whose names have it."""
    skip: tuple[str, ...] = ()
    """Regular expressions: but for these."""
    topology: bool = False
    """The driver is said to have topology; some specs then do not apply."""


def perform(cluster: Cluster, run: Run, store_path: str, directory: Path) -> list[Spec]:
    """What came of the specs of external storage drivers; the report and all output are left in *directory*."""
    directory.mkdir(parents=True, exist_ok=True)
    definition = directory / "test-driver.yaml"
    definition.write_text(defined(DEFINITION.read_text(), store_path, topology=run.topology))
    report = directory / REPORT
    report.unlink(missing_ok=True)
    _watched(cluster.network_command(command(cluster, run, definition, directory)), environment(cluster), directory)
    if not report.exists():
        said = (directory / "output").read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{run.name}: the suite has left no report; the end of what it printed:\n{said}")
    return outcomes(report.read_text(), run)


def defined(template: str, store_path: str, *, topology: bool) -> str:
    """The driver's definition, for the suite."""
    keys = f"[{TOPOLOGY_KEY}]" if topology else "[]"
    return string.Template(template).substitute(storePath=store_path, topology=str(topology).lower(), topologyKeys=keys)


def command(cluster: Cluster, run: Run, definition: Path, directory: Path) -> list[Argument]:
    """The suite's own runner with *run*."""
    skip = "|".join([*run.skip, *(exclusion.pattern for exclusion in EXCLUSIONS)])
    programs = KUBERNETES_E2E.programs
    return [
        *(programs / "ginkgo", f"--procs={AT_ONCE}", f"--focus={run.focus}", f"--skip={skip}", "--timeout=60m"),
        *(f"--output-dir={directory}", f"--junit-report={REPORT}", "--no-color", "--silence-skips"),
        *(programs / "e2e.test", "--", f"--storage.testdriver={definition}", f"--kubeconfig={cluster.kubeconfig}"),
        *("--provider=local", f"--kubectl-path={KUBERNETES.programs / 'kubectl'}", f"--e2e-output-dir={directory}"),
        "--disable-log-dump",
    ]


def environment(cluster: Cluster) -> dict[str, str]:
    """What the suite finds in its environment: its cluster, and nothing of the machine's own proxies."""
    return {**cluster.environment(), "HOME": str(cluster.directory), "TMPDIR": str(cluster.directory)}


def _watched(argv: Sequence[Argument], env: dict[str, str], directory: Path) -> None:
    """Run *argv* to its end; what it found is in its report, so its exit status does not matter."""
    output = directory / "output"
    began = time.monotonic()
    with output.open("wb") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=env,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    process.wait(_HEARTBEAT)
                    break
                except subprocess.TimeoutExpired:
                    done = output.read_text(errors="replace").count("•")
                    progress(f"e2e: {done} specs are through after {time.monotonic() - began:.0f} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def outcomes(report: str, run: Run) -> list[Spec]:
    """The specs of external storage drivers in the JUnit *report* of *run*."""
    specs = []
    for case in ET.fromstring(report).iter("testcase"):
        found = _SPEC.search(case.get("name", ""))
        if found is None:
            continue
        verdict, why = _verdict(case, found[0], run)
        specs.append(Spec(found["pattern"], found["suite"], found["claim"], verdict, why))
    return specs


def _verdict(case: ET.Element, name: str, run: Run) -> tuple[Verdict, str]:
    skipped = case.find("skipped")
    failure = case.find("failure")
    if failure is None:
        failure = case.find("error")
    if failure is not None:
        return Verdict.FAILED, failure.get("message", "")
    if skipped is None:
        return Verdict.PASSED, ""
    why = skipped.get("message", _NO_REASON)
    if why != _NO_REASON:
        return Verdict.SKIPPED, why.removeprefix(f"{_NO_REASON} - ")
    if not re.search(run.focus, name) or any(re.search(pattern, name) for pattern in run.skip):
        return Verdict.NOT_SELECTED, ""
    for exclusion in EXCLUSIONS:
        if re.search(exclusion.pattern, name):
            return Verdict.EXCLUDED, exclusion.reason
    return Verdict.NOT_SELECTED, ""
