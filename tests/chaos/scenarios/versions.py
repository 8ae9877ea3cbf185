"""The driver is replaced by its next version, and that by this one again, under running pods."""

from __future__ import annotations

from tests.chaos import images
from tests.chaos.scenario import scenario
from tests.chaos.stage import Stage
from tests.cluster import driver

WORKLOADS = {"daemonset/cknix-node": "node", "deployment/cknix-controller": "controller"}


@scenario("upgrade-downgrade")
def upgraded_and_downgraded(stage: Stage) -> None:
    """The driver is upgraded and downgraded by one version, whose ledger this one cannot read"""
    old = stage.built("old")
    of_this = [*stage.new(old), *stage.new(old, read_only=False)]
    stage.create(of_this)
    stage.started(of_this)

    run_version(stage, images.NEXT, images.NEXT_VERSION)
    new = stage.built("next")
    of_next = [*stage.new(new), *stage.new(old, read_only=False)]
    stage.create(of_next)
    stage.started(of_next)
    stage.delete(of_this[:1])

    run_version(stage, images.NOW, "")
    # Each unpublishes what the other has published.
    stage.delete([*of_this[1:], *of_next[:1]])
    again = [*stage.new(old), *stage.new(new)]
    stage.create(again)
    stage.started(again)


def run_version(stage: Stage, image: str, version: str) -> None:
    """Roll *image* out; *version* is what it says it is, if that is known."""
    for workload, container in WORKLOADS.items():
        stage.cluster.kubectl("set", "image", "-n", driver.SYSTEM, workload, f"{container}={image}")
    driver.rolled_out(stage.cluster)
    said = driver.on_daemon(stage.cluster, stage.victim, "cknix-csi", "--version")
    assert said.strip().endswith(version), said
