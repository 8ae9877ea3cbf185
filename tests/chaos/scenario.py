"""What a scenario is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.chaos.stage import Stage

Fault = Callable[["Stage"], None]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fault, and what it is called."""

    name: str
    summary: str
    fault: Fault
    """Makes things fail and mends them; raises when something is not as it should be meanwhile."""
    reboots: bool
    """The pods of the second node are started anew by it, and what they had written is gone."""


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, *, reboots: bool = False) -> Callable[[Fault], Fault]:
    """Adds a function to `SCENARIOS`; the first line of its docstring is its summary."""

    def add(fault: Fault) -> Fault:
        assert name not in SCENARIOS, name
        summary = (fault.__doc__ or "").strip().splitlines()[0].rstrip(".")
        SCENARIOS[name] = Scenario(name, summary, fault, reboots)
        return fault

    return add
