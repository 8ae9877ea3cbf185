"""A node goes down with all that runs on it, and comes back with its disk, or with an empty one."""

from __future__ import annotations

from tests.chaos.leaks import DATA_ROOT
from tests.chaos.scenario import scenario
from tests.chaos.stage import Stage
from tests.cluster import driver


@scenario("reboot", reboots=True)
def rebooted(stage: Stage) -> None:
    """A node is rebooted; it finds its data root as it left it"""
    stage.cluster.reboot(stage.victim)
    daemon_answers(stage)


@scenario("reboot-wiped", reboots=True)
def rebooted_with_an_empty_disk(stage: Stage) -> None:
    """A node is rebooted; its data root is empty afterwards"""
    stage.cluster.reboot(stage.victim, meanwhile=lambda: stage.victim.discard(DATA_ROOT))
    daemon_answers(stage)


def daemon_answers(stage: Stage) -> None:
    """The daemon on the victim runs since the reboot; before, kubelet tells what was before it."""
    stage.cluster.wait("the daemon runs", stage.daemon, timeout=120)
    stage.cluster.wait("its container answers", lambda: driver.on_daemon(stage.cluster, stage.victim, "true") == "")
