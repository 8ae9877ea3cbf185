"""Delays between tries: growing, capped, and jittered so that many clients do not come back together."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """A series of delays in seconds.

    The n-th one is between half of and all of ``min(cap, first * factor**n)`` ("equal jitter": never so short that a
    failing server is hammered).
    """

    first: float
    cap: float
    factor: float = 2.0
    draw: Callable[[], float] = random.random
    """A number in [0, 1)."""
    tries: int = 0

    def next(self) -> float:
        """The delay before the next try."""
        # The exponent is bounded: an outage of weeks must not overflow the power.
        full = min(self.cap, self.first * self.factor ** min(self.tries, 64))
        self.tries += 1
        return full * (0.5 + 0.5 * self.draw())

    def reset(self) -> None:
        """After a success."""
        self.tries = 0
