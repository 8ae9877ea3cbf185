"""What is published where, as the kernel's mount table tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cknix_csi.api.limits import Limit
from cknix_csi.api.presentation import Presentation
from cknix_csi.volumes.copies import Copies
from cknix_csi.volumes.mountinfo import Mount, MountTable
from cknix_csi.volumes.private import PrivateLayers
from cknix_csi.volumes.sized import SizedStorage
from cknix_csi.volumes.trees import Trees
from cknix_csi.volumes.view import SOURCE

SHOWN = "/nix"
"""The directory of an overlay that enters a pod; its root would list the whole store."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What is mounted at a target."""

    closure_id: str
    writable: bool
    limit: Limit | None = None
    """In whole blocks, and None for a read-only volume."""
    presentation: Presentation = Presentation.REDIRECT

    def __str__(self) -> str:
        words = ["writable" if self.writable else "read-only"]
        words += [f"at most {self.limit}"] if self.limit else []
        words += [self.presentation.value] if self.presentation is not Presentation.REDIRECT else []
        return f"{self.closure_id} ({', '.join(words)})"


@dataclass(frozen=True, slots=True)
class Shown:
    """What a mount shows, as far as the mount table alone tells it."""

    closure_id: str
    writable: bool
    presentation: Presentation
    private: str | None
    """The directory of the volume whose limit holds for it, if any does."""


class Published:
    """Tells our mounts from others, and what they are."""

    def __init__(self, trees: Sequence[Trees], private: PrivateLayers, copies: Copies, sized: SizedStorage) -> None:
        self._trees = trees
        self._private = private
        self._copies = copies
        self._sized = sized

    def publication(self, mount: Mount, table: MountTable) -> Publication | None:
        """What a pod sees by *mount*, of *table*; None for a foreign one.

        Raises VolumeFailed, MountTableUnreadable.
        """
        shown = self.shown(mount, table)
        if shown is None:
            return None
        limit = None if shown.private is None else self._sized.limit(shown.private)
        return Publication(shown.closure_id, shown.writable, limit, shown.presentation)

    def everywhere(self, table: MountTable) -> dict[str, Shown]:
        """What pods see of ours, by target; where more than one is mounted, the last one."""
        mounts = (*table.sourced_like(SOURCE), *table.rooted(SHOWN))
        return {mount.target: shown for mount in mounts if (shown := self.shown(mount, table))}

    def shown(self, mount: Mount, table: MountTable) -> Shown | None:
        """:meth:`publication` without what is not in *table*.  Raises MountTableUnreadable."""
        if copy := self._copies.of(mount, table):
            return Shown(copy.closure_id, "rw" in mount.options, Presentation.COPY, copy.private)
        overlay = mount.fstype == "overlay"
        if overlay and mount.root != SHOWN:
            return None
        for trees in self._trees:
            if (closure_id := trees.closure_of(mount)) is not None:
                writable = overlay and mount.super_option("upperdir") is not None and "rw" in mount.options
                return Shown(closure_id, writable, trees.presentation, self._private.owner(mount) if writable else None)
        return None

    def private(self, mount: Mount, table: MountTable) -> str | None:
        """The directory of the volume that has what *mount*, of *table*, shows or writes to for itself; or None."""
        copy = self._copies.of(mount, table)
        return self._private.owner(mount) if copy is None else copy.private

    def uses(self, private: str, table: MountTable) -> bool:
        """True when a mount shows or writes to what the volume in the directory *private* has for itself."""
        mounts = (*table.sourced_like(SOURCE), *table.rooted(SHOWN))
        return any(self.private(mount, table) == private for mount in mounts)
