"""How much page cache the reading of some files takes: by a memory cgroup of its own, else by /proc/meminfo.

A page is charged to the cgroup that brings it in, so a fresh cgroup sees exactly what its readers brought; the
machine's own counter sees everybody's.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_READ = 'test -z "$1" || echo 0 >"$1"; shift; for file; do cat -- "$file" >/dev/null; done'


def taken(files: Sequence[Path], *originals: Path) -> tuple[int, str]:
    """Bytes that the page cache grows by when *files* are read one after the other, and how that was measured.

    *originals*: what holds their content on disk, dropped from the page cache before.
    """
    for original in originals:
        with original.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with _cgroup() as group:
        before = _meminfo()
        processes = "" if group is None else str(group / "cgroup.procs")
        subprocess.run(["sh", "-c", _READ, "sh", processes, *files], check=True)
        if group is None:
            return _meminfo() - before, "by /proc/meminfo"
        return _charged(group), "by cgroup"


@contextmanager
def _cgroup() -> Iterator[Path | None]:
    """A new cgroup that counts memory, or None where none can be had."""
    group = None
    for parent in _parents():
        group = parent / f"cknix-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            group = None
            continue
        if (group / "memory.stat").exists():
            break
        group.rmdir()
        group = None
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def _parents() -> Iterator[Path]:
    """Where a cgroup with memory accounting may be made: version 1's hierarchy, then version 2's."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield Path(f"/sys/fs/cgroup/memory{path}")
            yield Path("/sys/fs/cgroup/memory")
        if not controllers:
            yield Path(f"/sys/fs/cgroup{path}")
            yield Path("/sys/fs/cgroup")


def _charged(group: Path) -> int:
    values = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(values["total_cache"] if "total_cache" in values else values["file"])


def _meminfo() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Cached:"))
