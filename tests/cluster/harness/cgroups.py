"""Control groups of a node: one of its own in every hierarchy, under which its kubelet keeps its pods."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")


def hierarchies() -> dict[Path, str]:
    """Mount points of the cgroup hierarchies and their kinds: one `cgroup2`, or many `cgroup` (v1), or both."""
    mounts = [line.split() for line in MOUNTINFO.read_text().splitlines()]
    kinds = {Path(fields[4]): fields[fields.index("-") + 1] for fields in mounts}
    return {path: kind for path, kind in kinds.items() if kind in {"cgroup", "cgroup2"}}


def create(name: str) -> None:
    """Make the group *name* in every hierarchy, fit to hold processes and to be divided further."""
    for hierarchy, kind in hierarchies().items():
        if kind == "cgroup2":
            delegate(hierarchy)
        group = hierarchy / name
        group.mkdir()
        for setting in ("cpuset.cpus", "cpuset.mems"):  # a v1 group without these takes no process
            if kind == "cgroup" and (hierarchy / setting).exists():
                (group / setting).write_text((hierarchy / setting).read_text())


def delegate(hierarchy: Path) -> None:
    """Let the groups of a v2 *hierarchy* use every controller that there is."""
    for controller in (hierarchy / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):  # some kinds (as of yet "rdma") refuse; kubelet names what it misses
            (hierarchy / "cgroup.subtree_control").write_text(f"+{controller}")


def processes(name: str, inner: str) -> set[int]:
    """Ids of the processes in those groups within *name* that are called *inner*, or within these."""
    found: set[int] = set()
    for hierarchy in hierarchies():
        for file in (hierarchy / name).glob(f"**/{inner}/**/cgroup.procs"):
            with contextlib.suppress(OSError):  # the group has gone in the meantime
                found.update(map(int, file.read_text().split()))
        if found:  # it is the same in every hierarchy that is used
            break
    return found


def remaining(prefix: str) -> list[Path]:
    """Groups whose name starts with *prefix*, in any hierarchy."""
    return [group for hierarchy in hierarchies() for group in hierarchy.glob(f"{prefix}*")]


def remove(prefix: str, *, timeout: float = 20) -> None:
    """Remove the groups whose name starts with *prefix*; their processes may still be on their way out."""
    deadline = time.monotonic() + timeout
    while groups := remaining(prefix):
        try:
            for group in groups:
                for inner in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
                    inner.rmdir()
                group.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
