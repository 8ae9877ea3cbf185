"""What a closure's volumes share: one tree per closure and presentation, whatever the presentation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

from cknix_csi.api.closure import Closure
from cknix_csi.api.presentation import Presentation
from cknix_csi.volumes.mountinfo import Mount, MountTable

WriteState = Callable[[Closure, Path], Awaitable[None]]
"""Writes a Nix database with exactly a closure below a directory, as ``Closures.write_state`` does."""


class Trees(Protocol):
    """The shared trees of one presentation, one per closure: ``Views`` and ``Farms``.

    All may wait for a disk, and but for :meth:`build` belong in a worker thread.
    """

    @property
    def presentation(self) -> Presentation:
        """What they are."""

    @property
    def noun(self) -> str:
        """What one of them is called in messages."""

    def path(self, closure_id: str) -> str:
        """The directory of one tree and all that belongs to it."""

    def mountpoint(self, closure_id: str) -> str:
        """Where the overlay is mounted that read-only volumes share."""

    def layers(self, closure_id: str) -> tuple[str, str]:
        """The lower layers of every overlay of this closure, topmost first."""

    def source(self, closure_id: str) -> str:
        """What every overlay of this closure shows as its source in the mount table."""

    def closure_of(self, mount: Mount) -> str | None:
        """The closure whose tree *mount* shows; None for a mount that shows none of these."""

    def shown(self, table: MountTable) -> set[str]:
        """The closures whose trees any mount shows."""

    def in_use(self, closure_id: str, table: MountTable) -> bool:
        """True when a mount other than the shared overlay shows the tree, in a pod or on its way there."""

    def is_shown(self, closure_id: str) -> bool:
        """True when what is mounted at :meth:`mountpoint` is this tree."""

    def exists(self, closure_id: str) -> bool:
        """True when there is a tree, whole or not."""

    def trusts(self, closure_id: str) -> bool:
        """True when the tree is there and need not be looked at: it has been since it last was without a user."""

    def look(self, closure_id: str) -> str | None:
        """What is wrong with a tree that exists, None when it is whole; see :mod:`.soundness`.

        Raises StoreDamaged, VolumeFailed.
        """

    def flaw(self, closure_id: str) -> str | None:
        """:meth:`look`; what is whole is trusted from now on."""

    def distrust(self, closure_id: str) -> None:
        """Nobody uses the tree for a while: it must be looked at before it is used again."""

    def ids(self) -> Iterator[str]:
        """The closures that have a tree; anything else in the directory is not ours and not named."""

    def abandoned(self) -> Iterator[str]:
        """Paths of trees whose building ended half-way, in an earlier process."""

    async def build(self, closure: Closure, write_state: WriteState) -> None:
        """Make the tree of *closure*, which has none, beside the others and rename it into place.

        On failure and cancellation nothing is left but trash.  Raises StoreDamaged, OutOfSpace, VolumeFailed, and what
        *write_state* raises.
        """

    def abandon(self, building: str) -> None:
        """Throw away what was made at the path *building*.  Raises VolumeFailed."""

    def discard(self, closure_id: str) -> None:
        """Throw away the tree, if there is one; the caller knows that no mount uses it.  Raises VolumeFailed."""
