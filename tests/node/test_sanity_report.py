"""csi-sanity's report is read as Ginkgo writes it; the sample is cut from a real one (csi-sanity 5.6.0)."""

from tests.node.sanity import parse_report

SAMPLE = """<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="6" disabled="3" errors="0" failures="1" time="0.15">
  <testsuite name="CSI Driver Test Suite" package="." tests="6" disabled="1" skipped="2" errors="0" failures="1">
    <testcase name="[BeforeSuite]" classname="CSI Driver Test Suite" status="passed" time="0.01"></testcase>
    <testcase name="[It] Identity Service Probe" classname="CSI Driver Test Suite" status="passed" time="0.01">
      <system-err>&gt; Enter [BeforeEach]</system-err>
    </testcase>
    <testcase name="[It] Node Service publish" classname="CSI Driver Test Suite" status="failed" time="0.01">
      <failure message="volume create failed" type="failed">[FAILED] Unexpected error</failure>
    </testcase>
    <testcase name="[It] Node Service stage" classname="CSI Driver Test Suite" status="skipped" time="0">
      <skipped message="skipped - NodeStageVolume not supported"></skipped>
    </testcase>
    <testcase name="[It] Controller Server list" classname="CSI Driver Test Suite" status="skipped" time="0">
      <skipped message="skipped"></skipped>
    </testcase>
    <testcase name="[It] Controller Server pages" classname="CSI Driver Test Suite" status="pending" time="0">
      <skipped message="pending"></skipped>
    </testcase>
  </testsuite>
</testsuites>
"""


def test_outcomes_are_told_apart() -> None:
    report = parse_report(SAMPLE)
    assert report.passed == ("[It] Identity Service Probe",)
    assert report.failed == {"[It] Node Service publish": "volume create failed [FAILED] Unexpected error"}
    assert report.skipped == {
        "[It] Node Service stage": "NodeStageVolume not supported",
        "[It] Controller Server list": "",
        "[It] Controller Server pages": "pending",
    }


def test_a_suite_that_broke_outside_a_spec_counts_as_failed() -> None:
    broken = SAMPLE.replace(
        'name="[BeforeSuite]" classname="CSI Driver Test Suite" status="passed"',
        'name="[BeforeSuite]" classname="CSI Driver Test Suite" status="panicked"',
    )
    assert "[BeforeSuite]" in parse_report(broken).failed
