"""What a machine must have for a test cluster, and the Debian packages that bring it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .command import CommandFailed, run
from .components import COMPONENTS
from .namespaces import NAMESPACES

#: Debian packages of a machine that builds the components and the images, and runs a cluster of them.
DEBIAN_PACKAGES = (
    "ca-certificates",
    "debian-archive-keyring",  # to verify the packages of our own image
    "gcc",  # runc, pause
    "iproute2",  # node networks
    "iptables",  # kube-proxy, CNI
    "libc6-dev",
    "libseccomp-dev",  # runc
    "mmdebstrap",  # our own image
    "mount",
    "openssl",  # the cluster's certificates
    "pkg-config",  # runc
    "util-linux",  # unshare, nsenter, findmnt
)

PROGRAMS = ("findmnt", "gcc", "ip", "iptables", "mmdebstrap", "nsenter", "openssl", "pkg-config", "unshare")
BRIDGE_SETTING = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


def missing() -> list[str]:
    """Every reason why no cluster can be had here; none if one can."""
    reasons = [f"no program {name}" for name in PROGRAMS if shutil.which(name) is None]
    if reasons:
        reasons.append(f"these programs are in the Debian packages {' '.join(DEBIAN_PACKAGES)}")
    if os.geteuid() != 0:
        return [*reasons, "not root"]
    if not BRIDGE_SETTING.exists():
        reasons.append("the kernel filters no bridged traffic: modprobe br_netfilter")
    try:
        run(["unshare", *NAMESPACES, "--fork", "true"])
    except (CommandFailed, FileNotFoundError) as failed:
        reasons.append(f"no namespaces: {failed}")
    return reasons


def unbuilt() -> list[str]:
    """Components that are not in the cache; building them takes minutes."""
    return [component.name for component in COMPONENTS if not component.ready]
