"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import time


def describe(filesystem: str) -> list[tuple[str, str]]:
    """Name and value, for the report."""
    return [
        ("CPU", f"{_cpu_model()}, {os.cpu_count()} cores"),
        ("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"),
        ("kernel", platform.release()),
        ("file system", filesystem),
        ("Nix", _first_line("nix", "--version")),
        ("rsync", _first_line("rsync", "--version")),
        ("Python", platform.python_version()),
    ]


class Others:
    """How much of the CPUs others use, from when it is made: whether figures were disturbed."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._used = _used_by_others()

    def share(self) -> float:
        """Of all CPUs' time, 0 to 1.  The kernel's own work in the background counts as others'."""
        elapsed = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return max(0.0, (_used_by_others() - self._used) / elapsed)


def _used_by_others() -> float:
    """Seconds of CPU time since boot that neither this process nor its ended children used."""
    with open("/proc/stat") as lines:
        user, nice, system, _, _, irq, softirq, steal = map(int, lines.readline().split()[1:9])
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - (own.user + own.system + own.children_user + own.children_system)


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in {"model name", "Model"}:
                return value.strip()
    return platform.machine()


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not here"
    return " ".join(done.stdout.splitlines()[0].split())
