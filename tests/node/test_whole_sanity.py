"""Kubernetes' own conformance suite for CSI drivers against the whole daemon."""

from __future__ import annotations

from tests.cluster.harness.components import CSI_SANITY
from tests.node.sanity import NODE_ONLY, run_sanity
from tests.node.whole import WholeNode


async def test_csi_sanity_passes(whole: WholeNode) -> None:
    CSI_SANITY.build()
    scratch = whole.directory / "sanity"
    scratch.mkdir()
    await whole.start()
    report = await run_sanity(CSI_SANITY.programs / "csi-sanity", whole.endpoint, scratch, skip=NODE_ONLY)
    assert not report.failed, report.failed
    assert len(report.passed) >= 13, report
    print(len(report.passed), report.skipped)
