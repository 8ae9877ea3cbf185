"""``cknix-csi probe`` as an administrator runs it on a node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cknix_csi.volumes.probe import TITLES
from tests.kernel.node import mounts_below, run

REPOSITORY = Path(__file__).parents[2]


def probing(data_root: Path, *options: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-m", "cknix_csi.cli", "probe", "--data-root", str(data_root), *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)


def test_it_tells_every_property_and_what_volumes_are_made_of_and_leaves_nothing(scratch: Path) -> None:
    data = scratch / "not/there/yet"
    ran = probing(data)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert lines[0] == f"data root {data}"
    assert all(any(line.startswith(title) for line in lines) for title in TITLES.values())
    start = next(number for number, line in enumerate(lines) if line.startswith("volumes "))
    made = {line[:29].strip(): line[29:39].strip() for line in lines[start + 1 :]}
    assert made == {
        "read-only": "redirect",
        "writable": "redirect",
        "writable, with sizeLimit": "redirect",
        "read-only, hostUsers: false": "hardlink",
        "writable, hostUsers: false": "none",
    }
    assert lines[-1].count("`presentation: copy`") == 1
    assert os.listdir(scratch) == []
    assert mounts_below(scratch) == []


def test_as_json_it_says_the_same(scratch: Path) -> None:
    told = json.loads(probing(scratch, "--json").stdout)
    assert told["dataRoot"] == str(scratch)
    assert told["kernel"] == run("uname", "-r").strip()
    assert {name: entry["title"] for name, entry in told["properties"].items()} == TITLES
    assert told["properties"]["listing"]["ok"] is True
    by_kind = {volume["kind"]: volume for volume in told["volumes"]}
    assert by_kind["read-only"] == {
        "kind": "read-only",
        "presentation": "redirect",
        "overlay": True,
        "reason": "the default",
    }
    refused = by_kind["writable, hostUsers: false"]
    assert (refused["presentation"], refused["overlay"]) == (None, None)
    assert "`presentation: copy`" in refused["reason"]


def test_where_no_writable_volume_can_be_had_it_ends_with_1_and_says_why(scratch: Path) -> None:
    for name in ("lower", "upper", "work", "data"):
        (scratch / name).mkdir()
    layers = f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work"
    run("mount", "-t", "overlay", "overlay", "-o", layers, scratch / "data")
    ran = probing(scratch / "data")
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-3].startswith(
        "writable, with sizeLimit     none      a writable volume cannot be had"
    )
    assert (ran.stderr, os.listdir(scratch / "data")) == ("", [])
    run("umount", scratch / "data")


def test_where_nothing_can_be_tried_it_says_why_in_one_line(scratch: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", "ro", "none", scratch)
    ran = probing(scratch)
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"cknix-csi probe: cannot work in the data root {scratch}: Read-only file system")
    run("umount", scratch)


def test_whoever_may_not_mount_is_told_so() -> None:
    ran = probing(Path("/var/tmp"), before=("setpriv", "--bounding-set=-sys_admin"))
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("cknix-csi probe: cannot enter a mount namespace: Operation not permitted")
    assert "CAP_SYS_ADMIN" in line


def test_a_data_root_that_cannot_be_one_is_a_mistake_of_the_command_line() -> None:
    ran = probing(Path("/"))
    assert ran.returncode == 2
    assert ran.stderr == "cknix-csi probe: environment variable CKNIX_DATA_ROOT: '/' must be a directory below /\n"
