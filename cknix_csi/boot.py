"""Which start of the kernel this is: what was made before it may be gone, or half written."""

from __future__ import annotations

from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The kernel's random name for the time since it was started, alike in all namespaces (random(4)).

    Raises OSError.
    """
    return _BOOT_ID.read_text().strip()
