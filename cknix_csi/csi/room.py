"""Whom to tell that a disk has no room, or has it again."""

from __future__ import annotations

from typing import Protocol

from cknix_csi.api.storepath import StorePath


class Room(Protocol):
    """Sees to room on the node's disk; satisfied by ``csi.housekeeping.Housekeeping``."""

    def out_of_space(
        self, closure: StorePath | None = None, *, needed: int | None = None, began: float | None = None
    ) -> None:
        """There was no room for *closure*, which is asked for again.

        *needed*: bytes that must be free, when they are known.  *began*: seconds since the epoch at which its fetch
        began; None when it was there, and its volume had no room.
        """

    def had(self, closure: StorePath) -> None:
        """There is no want of space for *closure* any more."""


class _NoMatter:
    def out_of_space(
        self, closure: StorePath | None = None, *, needed: int | None = None, began: float | None = None
    ) -> None: ...

    def had(self, closure: StorePath) -> None: ...


NO_MATTER: Room = _NoMatter()
"""Where nobody keeps room."""
