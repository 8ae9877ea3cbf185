"""What somebody who may create Expressions cannot reach: root, the inputs of others, the controller's own files."""

from __future__ import annotations

import pytest

from cknix_csi.privileges import CONTROLLER_KEEPS, NODE_KEEPS
from tests.cluster import driver
from tests.cluster.harness import Cluster

PROBE = """\
with import <cknix-demo> {};
derivation {
  name = "probe";
  system = builtins.currentSystem;
  builder = "${busybox}/bin/sh";
  PATH = "${busybox}/bin";
  args = [ "-c" ''
    {
      awk '{ print "outer user", $2 }' /proc/self/uid_map
      (cat /proc/sys/kernel/core_pattern > /proc/sys/kernel/core_pattern) 2>/dev/null && echo kernel settings writable
      (chmod u+w ${webroot} && touch ${webroot}/mine) 2>/dev/null && echo inputs writable
      echo end
    } > $out
  '' ];
}
"""


def test_a_build_is_not_root_and_changes_neither_its_inputs_nor_the_kernel(
    installed: Cluster, applied: driver.Apply
) -> None:
    applied(driver.expression("probe", PROBE))
    driver.built(installed, "probe")
    applied(driver.pod("probe", {"expression": "probe"}, "cat /nix/var/result"))
    user, *rest = driver.printed(installed, "probe").splitlines()
    assert user.startswith("outer user ")
    assert int(user.split()[-1]) > 30_000
    assert rest == ["end"]


@pytest.mark.parametrize("directory", ["/etc", "/var/lib/cknix/controller/nix/var/nix/db", "/proc/self/root/etc"])
def test_a_flake_reference_reads_no_file_of_the_controller(
    installed: Cluster, applied: driver.Apply, directory: str
) -> None:
    applied(driver.expression("spy", f"path:{directory}", kind="flakeRef"))
    installed.wait("it fails", lambda: driver.phase(installed, "spy") == "Failed", timeout=60)
    assert f"'path:{directory}' is refused" in installed.kubectl("describe", "expr", "spy")


def test_an_expression_of_another_namespace_cannot_be_had_by_its_name(
    installed: Cluster, applied: driver.Apply
) -> None:
    theirs = driver.expression("theirs", driver.demo("hello"))
    applied(theirs.replace("{name: theirs}", "{name: theirs, namespace: kube-public}"))
    installed.kubectl("wait", "-n", "kube-public", "--for=condition=Ready", "expr/theirs", "--timeout=60s")
    applied(driver.pod("curious", {"expression": "theirs"}))
    refusal = 'Expression "default/theirs" does not exist'
    installed.wait("it is refused", lambda: refusal in driver.events(installed, "curious"), timeout=60)


@pytest.mark.parametrize("read_only", [True, False], ids=["read-only", "writable"])
def test_the_group_that_a_pod_asks_for_changes_nothing_in_the_store(
    installed: Cluster, applied: driver.Apply, read_only: bool
) -> None:
    applied(driver.expression("grouped", driver.demo("hello")))
    path = driver.built(installed, "grouped")
    look = "stat -c %u:%g:%a $(find /nix/store/*-* ! -type l) | sort -u; id -G; /nix/var/result/bin/hello"
    group = "  securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 4321}\n"
    pod = driver.pod("grouped", {"expression": "grouped"}, look, read_only=read_only)
    applied(pod.replace("  restartPolicy", f"{group}  restartPolicy"))
    *modes, groups, said = driver.printed(installed, "grouped").splitlines()
    assert set(modes) <= {"0:0:444", "0:0:555"}
    assert "4321" in groups.split()
    assert said.startswith(f"Hello from {path}:")


def test_containers_have_given_up_what_they_do_not_need_and_cannot_change_their_image(installed: Cluster) -> None:
    for pod, kept in (
        (driver.controller_pod(installed), CONTROLLER_KEEPS),
        (driver.daemon_pod(installed, installed.node(0)), NODE_KEEPS),
    ):
        script = "grep -E '^(CapBnd|NoNewPrivs)' /proc/1/status; touch /usr/bin/mine 2>&1; true"
        told = installed.kubectl("exec", "-n", driver.SYSTEM, pod, "--", "sh", "-c", script)
        assert f"CapBnd:\t{sum(1 << each for each in kept):016x}\nNoNewPrivs:\t1\n" in told
        assert "Read-only file system" in told
