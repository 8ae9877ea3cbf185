"""What somebody who may create Expressions cannot reach: root, the inputs of others, the controller's own files."""

from __future__ import annotations

import pytest

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
