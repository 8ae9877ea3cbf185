"""Nix system names, and the machine names that Kubernetes and Linux use for them."""

from __future__ import annotations

KNOWN_SYSTEMS: tuple[str, ...] = (
    "x86_64-linux",
    "aarch64-linux",
    "armv6l-linux",
    "armv7l-linux",
    "i686-linux",
    "loongarch64-linux",
    "powerpc64le-linux",
    "riscv64-linux",
    "s390x-linux",
)

# Go's GOARCH, as in node.status.nodeInfo.architecture, and uname -m.
_BY_MACHINE = {
    "amd64": "x86_64-linux",
    "x86_64": "x86_64-linux",
    "arm64": "aarch64-linux",
    "aarch64": "aarch64-linux",
    "arm": "armv7l-linux",
    "armv7l": "armv7l-linux",
    "armv6l": "armv6l-linux",
    "386": "i686-linux",
    "i686": "i686-linux",
    "loong64": "loongarch64-linux",
    "loongarch64": "loongarch64-linux",
    "ppc64le": "powerpc64le-linux",
    "riscv64": "riscv64-linux",
    "s390x": "s390x-linux",
}


def system_of_machine(machine: str) -> str | None:
    """The Nix system of a ``uname -m`` or GOARCH name; None when it is not known."""
    return _BY_MACHINE.get(machine)
