"""What was measured, as values: samples, figures, and whether a figure reaches what the project has promised."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

MS = 1e3


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least *percent* of all do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the result table."""

    row: str
    """What was done."""
    closure: str
    """Of which size, as the table shows it."""
    what: str
    """What the number is, such as ``p50``."""
    value: float | None
    """None where it could not be measured; *note* says why."""
    unit: str
    target: float | None = None
    at_least: bool = False
    """The target is a lower bound rather than an upper one."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None without a target or a value."""
        if self.target is None or self.value is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Timing:
    """What one way to publish took for one closure, in seconds; empty lists where it is not here."""

    method: str
    closure: str
    """The shape's name."""
    files: int
    first: Sequence[float]
    """The first pod of a closure that is in the store."""
    further: Sequence[float]
    """Each further pod."""
    note: str = ""


@dataclass(slots=True)
class Results:
    figures: list[Figure] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def add(
        self,
        row: str,
        closure: object,
        what: str,
        value: float | None,
        unit: str,
        *,
        target: float | None = None,
        at_least: bool = False,
        note: str = "",
    ) -> None:
        self.figures.append(Figure(row, str(closure), what, value, unit, target, at_least, note))
