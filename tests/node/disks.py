"""Small disks for whole nodes."""

from __future__ import annotations

import os
from pathlib import Path

from tests.nix.disks import MEBIBYTE
from tests.node.whole import WholeNode


def mount_small_disk(node: WholeNode, kind: str, mebibytes: int = 48) -> None:
    """A file system of so many MiB at the node's data root, gone with its namespace."""
    if kind == "tmpfs":
        node.namespace.run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "small-disk", node.data)
        return
    image = node.directory / "disk"
    with image.open("wb") as file:
        file.truncate(mebibytes * MEBIBYTE)
    # With the blocks of 1 KiB that so small a disk would have, SQLite's shared memory has holes in each page: on a full
    # disk whoever writes there is killed (SIGBUS).
    node.namespace.run("mkfs.ext4", "-q", "-F", "-b", "4096", image)
    node.namespace.run("mount", "-o", "loop", image, node.data)


def fill(data: Path, left: int) -> Path:
    """A file that leaves *left* bytes of the disk, also of what is reserved for root."""
    filler = data / "somebody-elses-data"
    with filler.open("wb") as file:
        while (excess := os.statvfs(data).f_bfree * os.statvfs(data).f_frsize - left) > 0:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), excess)
            except OSError:
                break
    return filler
