"""Failures that come again and again, as retries make them, told once."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

REMINDER_SECONDS = 600.0
"""A failure that has not changed is told again after this long."""
IDLE_SECONDS = 600.0
"""Who has not asked again for this long has given up: kubelet's longest pause is 122 seconds."""


@dataclass(slots=True)
class Repeated:
    """One failure, from its first time until something else happens; times are seconds of the clock."""

    first: float
    words: str
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the lines about it carry."""
    count: int = 0
    last: float = 0.0
    told: float = 0.0
    aloud: bool = True
    """Whether the latest of them has to be told."""

    @property
    def seconds(self) -> float:
        """From the first to the latest."""
        return self.last - self.first


class Repeats:
    """What fails at the moment, by whatever names the work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failing: dict[Hashable, Repeated] = {}

    def failed(self, key: Hashable, words: str, fields: Mapping[str, str] | None = None) -> Repeated:
        """Count a failure of *key*; it is to be told aloud when *words* are new, or were last told long ago."""
        now = self._clock()
        known = self._failing.setdefault(key, Repeated(now, words))
        known.aloud = known.count == 0 or known.words != words or now - known.told >= REMINDER_SECONDS
        known.count += 1
        known.words, known.fields, known.last = words, fields or {}, now
        if known.aloud:
            known.told = now
        return known

    def fails(self, key: Hashable) -> bool:
        """True when the latest that was told of *key* is a failure."""
        return key in self._failing

    def over(self, key: Hashable) -> Repeated | None:
        """What failed of *key* until now and fails no longer."""
        return self._failing.pop(key, None)

    def idle(self) -> list[Repeated]:
        """Failures that nobody has met again for :data:`IDLE_SECONDS`; they are forgotten."""
        now = self._clock()
        gone = [key for key, known in self._failing.items() if now - known.last >= IDLE_SECONDS]
        return [self._failing.pop(key) for key in gone]
