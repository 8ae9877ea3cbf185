"""One piece of work that fails again and again: told aloud once, and now and then again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

REMINDER_SECONDS = 600.0
"""A failure that has not changed is told again after this long."""


@dataclass(slots=True)
class Failing:
    """From the first failure until :meth:`over`."""

    clock: Callable[[], float] = time.monotonic
    count: int = 0
    """How often it has failed."""
    _words: str = ""
    _told: float = 0.0

    def again(self, words: str) -> bool:
        """Count a failure; True when it is to be told aloud: *words* are new, or were last told long ago."""
        now = self.clock()
        aloud = self.count == 0 or words != self._words or now - self._told >= REMINDER_SECONDS
        self.count += 1
        self._words = words
        if aloud:
            self._told = now
        return aloud

    def over(self) -> int:
        """It fails no longer; gives how often it had."""
        count, self.count = self.count, 0
        return count
