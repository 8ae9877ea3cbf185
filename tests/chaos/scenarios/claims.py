"""Those who make volumes for claims are killed."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

from cknix_csi.settings import DRIVER_NAME
from tests.chaos.parts import PROVISIONER, parts
from tests.chaos.scenario import scenario
from tests.chaos.stage import Stage
from tests.chaos.workload import Pod

CLASS = f"""
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: cknix-chaos}}
provisioner: {DRIVER_NAME}
"""
PROGRAMS = ("csi-provisioner", "cknix-csi")


@scenario("provisioner-killed")
def killed_while_claims_are_made(stage: Stage) -> None:
    """The provisioner, and upstream's beside it, are killed in turn while claims come and go"""
    stage.cluster.apply(CLASS)
    expression = stage.built()
    previous: list[Pod] = []
    for number in range(stage.choose(short=2, full=12)):
        pods = [replace(pod, storage_class="cknix-chaos") for pod in stage.new(expression, 3)]
        stage.delete(previous, wait=False)
        stage.create(pods)
        time.sleep(random.uniform(0, 1))

        def find(program: str = PROGRAMS[number % 2]) -> int:
            return running(stage, program)

        stage.kill(killed := find())
        stage.successor(find, killed)
        stage.started(pods, timeout=120)
        previous = pods
    stage.delete(previous)
    stage.cluster.delete(CLASS)


def running(stage: Stage, program: str) -> int:
    """The process of a container of the provisioner's pod; 0 while there is none."""
    for part in parts(stage.cluster):
        for pid in part.node.pod_processes(part.uid) if part.component == PROVISIONER else ():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            if program in (word.decode(errors="replace").rpartition("/")[2] for word in command[:2]):
                return pid
    return 0
