"""Every kind of volume that there is, and one independent eye on all of them: rsync."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cknix_csi.api.closure import Closure
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.presentation import Presentation
from tests.kernel.node import run

READ_ONLY: dict[str, dict[str, Any]] = {
    "view": {},
    "farm": {"presentation": Presentation.HARDLINK},
    "farm without overlay": {"host_users": False},
    "copy": {"presentation": Presentation.COPY},
}
"""What to publish with, by a name for it."""
WRITABLE: dict[str, dict[str, Any]] = {
    "writable view": {"writable": True},
    "writable view on a disk of its own": {"writable": True, "limit": Limit(64 << 20)},
    "writable view in memory": {"writable": True, "limit": Limit(16 << 20, Medium.MEMORY)},
    "writable farm": {"writable": True, "presentation": Presentation.HARDLINK},
    "writable copy": {"writable": True, "presentation": Presentation.COPY},
}
KINDS = READ_ONLY | WRITABLE


def require_same(volume: Path, store: Path, closure: Closure) -> None:
    """*volume* holds the paths of *closure* and nothing else, all as in *store*: rsync finds nothing to do but .links.

    Contents, modes, owners, times to the nanosecond, links, extended attributes and which names are one file.
    """
    rules = volume.parent / f"{volume.name}.rules"
    rules.write_text("".join(f"+ /{info.path.basename}\n" for info in closure.paths) + "- /*\n")
    try:
        found = run(
            *("rsync", "--archive", "--hard-links", "--xattrs", "--checksum", "--modify-window=-1"),
            *("--delete", "--delete-excluded", "--dry-run", "--itemize-changes", f"--filter=merge {rules}"),
            *(f"{store}/", f"{volume}/store/"),
        ).splitlines()
    finally:
        rules.unlink()
    assert [line for line in found if not line.startswith(".d") or not line.endswith(" ./")] == ["*deleting   .links/"]
