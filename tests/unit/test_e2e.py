"""Upstream's end-to-end suite, without a cluster: what is left out is told with its reason, and all is counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.e2e import images, report, suite
from tests.e2e.__main__ import ALL_PASSED, SHORT_PASSED, conclude
from tests.e2e.applicability import EXCLUSIONS
from tests.e2e.suite import Run, Spec, Verdict

REPOSITORY = Path(__file__).parents[2]
STORE_PATH = f"/nix/store/{'0' * 32}-hello"
NAME = "External Storage [Driver: csi.cknix.cool] [Testpattern: Dynamic PV (default fs)]"
OTHER = "External Storage [Driver: csi.cknix.cool] [Testpattern: Dynamic PV (ntfs)] [Feature:Windows]"
JUNIT = f"""\
<testsuites><testsuite>
<testcase name="[It] [sig-node] Pods should be counted by others"><skipped message="skipped"/></testcase>
<testcase name="[It] {NAME} volumes should store data"/>
<testcase name="[It] {NAME} [Slow] subPath should fail [Slow]"><failure message="timed out"/></testcase>
<testcase name="[It] {NAME} volumes should mount"><skipped message="skipped - Driver cannot do it"/></testcase>
<testcase name="[It] {NAME} subPath should unmount [Disruptive]"><skipped message="skipped"/></testcase>
<testcase name="[It] {OTHER} subPath should unmount [Disruptive]"><skipped message="skipped - not known"/></testcase>
<testcase name="[It] {NAME} capacity should be told"><skipped message="skipped"/></testcase>
<testcase name="[It] {NAME} volumes should be slow [Slow]"><skipped message="skipped"/></testcase>
</testsuite></testsuites>
"""


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below *heading* in the documentation, without its head."""
    section = (REPOSITORY / "docs/conformance.md").read_text().partition(f"\n{heading}\n")[2]
    assert section, heading
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    lines = [re.split(r"(?<!\\)\|", line.strip()) for line in table[0].splitlines()[2:]]
    return [[cell.strip() for cell in line[1:-1]] for line in lines]


def test_every_exclusion_is_documented_with_its_reason_and_no_other() -> None:
    told = [(pattern.strip("`"), reason) for pattern, reason in rows("### Left out by name")]
    assert told == [(exclusion.claim, exclusion.reason) for exclusion in EXCLUSIONS]


def test_how_many_specs_pass_is_documented_as_it_is_asked_for() -> None:
    told = f"{ALL_PASSED} pass ({SHORT_PASSED} of the short run)"
    assert told in (REPOSITORY / "docs/conformance.md").read_text()


@pytest.mark.parametrize("topology", [False, True])
def test_every_capability_is_documented_as_the_suite_is_told(topology: bool) -> None:
    told = {name.strip("`"): answer for name, answer, _ in rows("### What it is told of the driver")}
    definition = yaml.safe_load(suite.defined(suite.DEFINITION.read_text(), STORE_PATH, topology=topology))
    capabilities = definition["DriverInfo"]["Capabilities"]
    words = {True: "yes", False: "no"}
    del told["topology"], capabilities["topology"]
    assert told == {name: words[has] for name, has in capabilities.items()}


def test_topology_is_told_with_its_key() -> None:
    for topology, keys in ((False, []), (True, ["cknix.cool/system"])):
        info = yaml.safe_load(suite.defined(suite.DEFINITION.read_text(), STORE_PATH, topology=topology))["DriverInfo"]
        assert (info["Capabilities"]["topology"], info["TopologyKeys"]) == (topology, keys)


def test_what_came_of_a_spec_is_read_from_the_report() -> None:
    specs = suite.outcomes(JUNIT, Run("test", r"External.Storage.*(volumes|subPath)", skip=(r"\[Slow\]",)))
    assert [(spec.suite, spec.claim, spec.verdict) for spec in specs] == [
        ("volumes", "should store data", Verdict.PASSED),
        ("subPath", "should fail [Slow]", Verdict.FAILED),
        ("volumes", "should mount", Verdict.SKIPPED),
        ("subPath", "should unmount [Disruptive]", Verdict.EXCLUDED),
        ("subPath", "should unmount [Disruptive]", Verdict.SKIPPED),
        ("capacity", "should be told", Verdict.NOT_SELECTED),
        ("volumes", "should be slow [Slow]", Verdict.NOT_SELECTED),
    ]
    assert [spec.why for spec in specs[1:3]] == ["timed out", "Driver cannot do it"]
    assert {spec.pattern for spec in specs} == {"Dynamic PV (default fs)", "Dynamic PV (ntfs)"}


def test_the_table_counts_what_ran_and_tells_why_the_rest_did_not() -> None:
    specs = [
        Spec("PV", "volumes", "should store", Verdict.PASSED, ""),
        Spec("PV", "volumes", "should mount", Verdict.SKIPPED, "cannot do it"),
        Spec("PV", "subPath", "should fail", Verdict.FAILED, "timed out"),
        Spec("PV", "capacity", "should tell", Verdict.NOT_SELECTED, ""),
    ]
    lines = [line.split() for line in report.text(specs).splitlines()]
    assert lines[1:4] == [["volumes", "1", "0", "1", "0"], ["subPath", "0", "1", "0", "0"], ["1", "1", "1", "0"]]
    assert ["1", "skipped:", "cannot", "do", "it"] in lines
    assert lines[-2:] == [["FAILED", "[PV]", "subPath", "should", "fail"], ["timed", "out"]]


@pytest.mark.parametrize(("passed", "failed", "code"), [(2, 0, 0), (3, 0, 0), (1, 0, 1), (2, 1, 1), (0, 0, 1)])
def test_a_failure_and_too_few_that_pass_are_failures(passed: int, failed: int, code: int) -> None:
    verdicts = [Verdict.PASSED] * passed + [Verdict.FAILED] * failed + [Verdict.SKIPPED, Verdict.EXCLUDED]
    assert conclude([Spec("PV", "volumes", "should", verdict, "") for verdict in verdicts], at_least=2) == code


def test_images_are_named_as_this_version_of_the_suite_names_them() -> None:
    listed = "registry.k8s.io/etcd:3.6\n{0}nginx:1.14-4\n{0}busybox:1.37.0-1\n{0}nginx:1.15-4\n{0}nautilus:1.7\n"
    assert images.names(listed.format(images.REPOSITORY)) == [
        f"{images.REPOSITORY}{image}" for image in ("busybox:1.37.0-1", "nginx:1.14-4", "nginx:1.15-4")
    ]
