"""What each capability that a node keeps is for: without it something that pods or the kernel need is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cknix_csi.privileges import CONTROLLER_KEEPS, NODE_KEEPS, Capability

_GIVE_UP = """
import os, sys
from cknix_csi.privileges import Capability, give_up_all_but
give_up_all_but(frozenset(Capability(int(number)) for number in sys.argv[1].split()))
"""
_THEN_RUN = f"{_GIVE_UP}os.execvp(sys.argv[2], sys.argv[2:])"
_REDUCED_TO_NOTHING = b"\0\0\0\2" + b"\0" * 16
"""``struct vfs_cap_data`` of version 2 without any capability."""


def reduced(keep: frozenset[Capability], *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run *command* as a process that keeps *keep*."""
    numbers = " ".join(str(int(each)) for each in keep)
    argv = [sys.executable, "-c", _THEN_RUN, numbers, *map(str, command)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "keep", [NODE_KEEPS, CONTROLLER_KEEPS, frozenset[Capability]()], ids=["node", "controller", "none"]
)
def test_what_is_given_up_is_gone_for_good(keep: frozenset[Capability]) -> None:
    done = reduced(keep, "grep", "-E", "^(Cap|NoNewPrivs)", "/proc/self/status")
    mask = f"{sum(1 << each for each in keep):016x}"
    told = dict(line.split(":\t") for line in done.stdout.splitlines())
    assert told == {
        "CapInh": "0" * 16,
        "CapPrm": mask,
        "CapEff": mask,
        "CapBnd": mask,
        "CapAmb": "0" * 16,
        "NoNewPrivs": "1",
    }
    assert done.stderr == ""


def test_what_cannot_be_given_up_or_was_never_there_is_told_and_no_reason_to_stop() -> None:
    mine = frozenset({Capability.CHOWN})
    numbers = str(int(Capability.KILL))
    again = [sys.executable, "-c", f"{_GIVE_UP}print('goes on')", numbers]
    done = reduced(mine, *again)
    assert done.stdout == "goes on\n"
    assert done.stderr.splitlines() == [
        "capabilities that are not needed stay within reach: CAP_SETPCAP is missing to give them up",
        "this process lacks capabilities that it may need: KILL",
    ]


@pytest.fixture
def layers(scratch: Path) -> Iterator[Path]:
    """Layers of an overlay with a file and a directory of another user's."""
    for name in ("lower", "upper", "work", "merged"):
        (scratch / name).mkdir()
    (scratch / "lower/mine").write_text("")
    (scratch / "lower/foreign").write_text("")
    (scratch / "lower/closed").mkdir(mode=0o500)
    for name in ("foreign", "closed"):
        os.chown(scratch / "lower" / name, 1000, 1000)
    yield scratch


def mounted(layers: Path, keep: frozenset[Capability]) -> Path:
    """An overlay of *layers*, mounted by a process that keeps *keep*."""
    options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
    done = reduced(keep, "mount", "-t", "overlay", "-o", options, "overlay", layers / "merged")
    if done.returncode != 0:
        raise PermissionError(done.stderr)
    return layers / "merged"


def chown(volume: Path) -> None:
    os.chown(volume / "mine", 1000, 1000)


def change_what_is_not_ones_own(volume: Path) -> None:
    (volume / "foreign").chmod(0o600)


def write_where_only_root_may(volume: Path) -> None:
    (volume / "closed/new").write_text("")


def keep_the_group_bit(volume: Path) -> None:
    (volume / "foreign").chmod(0o2755)
    if not (volume / "foreign").stat().st_mode & stat.S_ISGID:
        raise PermissionError("the set-group-ID bit has been dropped")


def make_a_device(volume: Path) -> None:
    os.mknod(volume / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))


def give_a_file_capabilities(volume: Path) -> None:
    os.setxattr(volume / "mine", "security.capability", _REDUCED_TO_NOTHING)


POWERS: dict[Capability, Callable[[Path], None]] = {
    Capability.CHOWN: chown,
    Capability.DAC_OVERRIDE: write_where_only_root_may,
    Capability.FOWNER: change_what_is_not_ones_own,
    Capability.FSETID: keep_the_group_bit,
    Capability.MKNOD: make_a_device,
    Capability.SETFCAP: give_a_file_capabilities,
    Capability.SYS_ADMIN: lambda volume: None,  # the mount itself
}
"""What root in a pod may do in a writable volume if the process that mounted it has the capability."""


def test_a_pod_may_do_in_a_writable_volume_what_it_could_without_a_node_that_gives_up_powers(layers: Path) -> None:
    volume = mounted(layers, NODE_KEEPS)
    for act in POWERS.values():
        act(volume)


@pytest.mark.parametrize("capability", POWERS, ids=lambda capability: capability.name)
def test_without_the_nodes_power_a_pod_has_none(layers: Path, capability: Capability) -> None:
    with pytest.raises(PermissionError):
        POWERS[capability](mounted(layers, NODE_KEEPS - {capability}))


@pytest.mark.parametrize("capability", [Capability.SETUID, Capability.SETGID], ids=lambda capability: capability.name)
def test_without_power_over_ids_no_user_namespace_can_be_tried(capability: Capability) -> None:
    """As the probe does, to see whether mounts can be id-mapped: a map of more than one id, which is not one's own."""
    kind = "uid" if capability is Capability.SETUID else "gid"
    script = f"""
        unshare --user sleep 60 &
        until [ "$(readlink /proc/$!/ns/user)" != "$(readlink /proc/$$/ns/user)" ]; do :; done
        echo 0 100000 65536 > /proc/$!/{kind}_map
        code=$?
        kill $!
        exit $code
    """
    assert reduced(NODE_KEEPS, "sh", "-c", script).returncode == 0
    assert reduced(NODE_KEEPS - {capability}, "sh", "-c", script).returncode != 0


def test_all_that_a_node_keeps_is_accounted_for() -> None:
    assert {*POWERS, Capability.SETUID, Capability.SETGID} == NODE_KEEPS
