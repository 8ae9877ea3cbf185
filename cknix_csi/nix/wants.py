"""What somebody waits for who could not have it for want of space: to be deleted last, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cknix_csi.api.storepath import StorePath

PATIENCE_SECONDS = 300.0
"""For how long a failure says that somebody waits: kubelet asks again within two minutes, or gives up."""


@dataclass(frozen=True, slots=True)
class Wants:
    """What a collection is asked to leave."""

    closures: frozenset[StorePath] = frozenset()
    """What of these is whole stays."""
    since: float | None = None
    """Seconds since the epoch: what was registered then or later may be a part of a closure that is still to come, so
    it goes last; None: nothing is still to come."""


class WantedClosures:
    """Notes of who could not have which closure, each good for a few minutes; *clock* counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wanted: dict[StorePath, _Note] = {}

    def missed(self, closure: StorePath, began: float | None) -> None:
        """There was no room for *closure*.

        *began*: seconds since the epoch at which its fetch began, None when it was there and it is its volume that had
        no room.
        """
        self.now()  # what is over need not be kept in mind
        before = self._wanted.get(closure)
        began = min((time for time in (began, before.began if before else None) if time is not None), default=None)
        self._wanted[closure] = _Note(self._clock() + PATIENCE_SECONDS, began)

    def had(self, closure: StorePath) -> None:
        """It is in use now, or nobody asks for it any more."""
        self._wanted.pop(closure, None)

    def now(self) -> Wants:
        """What is wanted at this moment."""
        now = self._clock()
        self._wanted = {closure: note for closure, note in self._wanted.items() if note.until > now}
        begun = [note.began for note in self._wanted.values() if note.began is not None]
        return Wants(frozenset(self._wanted), min(begun, default=None))


@dataclass(frozen=True, slots=True)
class _Note:
    until: float
    """Of the clock."""
    began: float | None
