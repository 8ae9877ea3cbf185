"""What every benchmark gets: where to work, on which closures, how often, and where the figures go."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Results
from bench.progress import Progress
from bench.room import Room
from bench.shapes import Kind, Plan, Shape, entries
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.store import Store


@dataclass(frozen=True, slots=True)
class Effort:
    """How often things are measured."""

    firsts: int
    """First pods of a new closure, each on a new data root."""
    pods: int
    """Further pods of a known closure."""
    many: int
    """Pods of one closure at once."""
    closures: int
    """Closures at once."""
    copies: int
    """Publishes by methods that take seconds."""
    program: int
    """Bytes of the program in the page cache."""


FULL = Effort(firsts=15, pods=200, many=500, closures=200, copies=3, program=200_000_000)
QUICK = Effort(firsts=5, pods=50, many=100, closures=40, copies=1, program=50_000_000)


@dataclass(frozen=True, slots=True)
class Case:
    """One closure to publish."""

    shape: Shape
    store: Store
    plan: Plan

    @property
    def root(self) -> StorePath:
        return self.plan.root

    def require_shown(self, volume: Path) -> None:
        """Raise RuntimeError unless *volume* shows this closure as a pod wants it at ``/nix``."""
        shown = set(os.listdir(volume / "store")) - {".links"}
        if shown != {planned.path.basename for planned in self.plan.paths}:
            raise RuntimeError(f"{volume} does not show the closure of {self.root}")
        name = f"{self.root.basename}/{next(e.name for e in entries(self.plan.paths[-1]) if e.kind is Kind.FILE)}"
        if (volume / "store" / name).read_bytes() != (self.store.physical / name).read_bytes():
            raise RuntimeError(f"{volume}/store/{name} is not what is in the store")


@dataclass(frozen=True, slots=True)
class Bench:
    room: Room
    cases: list[Case]
    """At least one, smaller ones first."""
    effort: Effort
    progress: Progress
    results: Results

    @property
    def largest(self) -> Case:
        return self.cases[-1]
