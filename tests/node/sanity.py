"""Kubernetes' own conformance suite for CSI drivers, csi-sanity, run against a socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

_SECONDS = 300.0


@dataclass(frozen=True)
class SanityReport:
    """Names of specs by outcome."""

    passed: tuple[str, ...]
    failed: Mapping[str, str]
    """With the suite's own words."""
    skipped: Mapping[str, str]
    """With the suite's reason."""


async def run_sanity(
    binary: Path,
    endpoint: Path,
    controller: Path,
    scratch: Path,
    *,
    parameters: Mapping[str, str],
) -> SanityReport:
    """Run csi-sanity (5.6.0 or newer), all of it; *scratch* is an empty directory of the caller.

    *endpoint* is the socket of the node's services, *controller* that of the Controller service; *parameters* are those
    of a StorageClass, for CreateVolume.
    """
    report = scratch / "junit.xml"
    command = [
        str(binary),
        f"--csi.endpoint=unix://{endpoint}",
        f"--csi.controllerendpoint=unix://{controller}",
        f"--csi.testvolumeparameters={scratch / 'parameters.yaml'}",
        # Both are made and removed by the suite for every spec: one directory that is left turns the rest red.
        f"--csi.mountdir={scratch / 'mount'}",
        f"--csi.stagingdir={scratch / 'staging'}",
        "--csi.testvolumesize=1048576",
        "--ginkgo.no-color",
        f"--ginkgo.junit-report={report}",
    ]
    (scratch / "parameters.yaml").write_text(json.dumps(dict(parameters)))  # JSON is YAML
    with (scratch / "output").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=asyncio.subprocess.STDOUT, start_new_session=True
        )
    try:
        async with asyncio.timeout(_SECONDS):
            await process.wait()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if not report.is_file():
        raise AssertionError(f"csi-sanity wrote no report:\n{(scratch / 'output').read_text()[-4000:]}")
    return parse_report(report.read_text())


def parse_report(junit: str) -> SanityReport:
    """Read Ginkgo's JUnit report; its bookkeeping nodes such as [AfterSuite] count only when they fail."""
    passed: list[str] = []
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name, status = case.attrib["name"], case.attrib["status"]
        if status == "passed":
            if name.startswith("[It]"):
                passed.append(name)
        elif status in {"skipped", "pending"}:
            reason = case.find("skipped")
            message = "" if reason is None else reason.get("message", "")
            skipped[name] = message.removeprefix("skipped").removeprefix(" - ")
        else:
            trouble = case.find("failure") if case.find("failure") is not None else case.find("error")
            failed[name] = status if trouble is None else f"{trouble.get('message', '')} {trouble.text or ''}".strip()
    return SanityReport(tuple(passed), failed, skipped)
