"""What generated closures look like.  Pure and seeded: the same shape gives the same closure everywhere.

Distributions follow closures of real systems: a few store paths hold most of the files, most hold a handful; one file
in ten is executable, one in 25 empty; sizes are log-normal; there are some 8 symbolic links and 25 directories to 100
files; three store paths in 40 are themselves files or symbolic links.
"""

from __future__ import annotations

import enum
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cknix_csi.api.storepath import StorePath

RECIPE = 3
"""Goes up with every change that makes other closures: caches of older recipes are thrown away."""

_BASE32 = "0123456789abcdfghijklmnpqrsvwxyz"
_DEEPEST = 9


class Kind(enum.Enum):
    DIRECTORY = "directory"
    FILE = "file"
    LINK = "link"


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a closure is."""

    name: str
    paths: int
    files: int
    """Regular files in all."""
    size: int
    """Bytes in all, about."""
    others: int
    """How many further small closures share its paths."""

    def __str__(self) -> str:
        return f"{self.name} ({self.paths:,} paths, {self.files:,} files, {self.size / 1e6:,.0f} MB)"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 24, 400, 4_000_000, 12),
        Shape("S", 300, 33_000, 300_000_000, 200),
        Shape("M", 301, 26_000, 700_000_000, 200),
        Shape("L", 2_443, 376_000, 2_600_000_000, 200),
    )
}


@dataclass(frozen=True, slots=True)
class Planned:
    """One store path: *files* regular files of *size* bytes in all."""

    path: StorePath
    kind: Kind
    files: int
    size: int
    references: tuple[StorePath, ...]
    """Sorted; of paths that come earlier in the plan, and often itself."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something within a store path that is a directory."""

    name: str
    """Relative to the store path."""
    kind: Kind
    size: int = 0
    executable: bool = False
    target: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A closure's paths, those they refer to first and *root* last, and further roots that share them."""

    paths: tuple[Planned, ...]
    others: tuple[Planned, ...]

    @property
    def root(self) -> StorePath:
        return self.paths[-1].path


def store_path(name: str) -> StorePath:
    """A valid store path that only *name* gives."""
    digest = hashlib.sha256(name.encode()).digest()
    return StorePath("".join(_BASE32[byte % 32] for byte in digest), name)


def plan(shape: Shape) -> Plan:
    """The closure of *shape*; its root refers to every path, directly or not."""
    dice = random.Random(f"{RECIPE} {shape.name}")
    count = shape.paths - 1
    kinds = [_kind(number) for number in range(count)]
    directories = [number for number, kind in enumerate(kinds) if kind is Kind.DIRECTORY]
    loose = kinds.count(Kind.FILE)
    weights = {number: dice.paretovariate(0.9) for number in directories}
    files = _split(shape.files - loose - 1, [min(weights[number], 2_000) for number in directories])
    budget = dict(zip(directories, files, strict=True))
    heft = [dice.lognormvariate(0, 1) * budget.get(number, kind is Kind.FILE) for number, kind in enumerate(kinds)]
    sizes = _split(shape.size, heft)

    paths: list[Planned] = []
    unused: set[StorePath] = set()
    for number, kind in enumerate(kinds):
        path = store_path(f"{shape.name}-{number}-{_version(dice)}{'.sh' if kind is Kind.FILE else ''}")
        references = _references(dice, paths, kind)
        unused.difference_update(references)
        unused.add(path)
        if kind is Kind.DIRECTORY and dice.random() < 0.5:
            references.add(path)
        inside = budget.get(number, int(kind is Kind.FILE))
        paths.append(Planned(path, kind, inside, sizes[number], tuple(sorted(references))))
    root = store_path(f"{shape.name}-system")
    paths.append(Planned(root, Kind.DIRECTORY, 1, 1000, tuple(sorted(unused))))
    others = tuple(
        Planned(
            store_path(f"{shape.name}-other-{number}"),
            Kind.DIRECTORY,
            3,
            3000,
            tuple(sorted(one.path for one in dice.sample(paths[:-1], min(20, count)))),
        )
        for number in range(shape.others)
    )
    return Plan(tuple(paths), others)


def entries(planned: Planned) -> Iterator[Entry]:
    """What is in *planned*, a directory; parents come before what is in them."""
    dice = random.Random(f"{RECIPE} {planned.path}")
    depth = {"": 0}
    directories = [""]
    for number in range(max(1, planned.files // 4)):
        # One in three goes deeper from where the last one is, the others anywhere.
        parent = directories[-1] if dice.random() < 0.33 else dice.choice(directories)
        if depth[parent] >= _DEEPEST:
            parent = ""
        name = f"{parent}/d{number}" if parent else f"d{number}"
        depth[name] = depth[parent] + 1
        directories.append(name)
        yield Entry(name, Kind.DIRECTORY)
    wide = dice.choice(directories)
    weights = [0.0 if dice.random() < 0.04 else dice.lognormvariate(0, 1.8) for _ in range(planned.files)]
    for number, size in enumerate(_split(planned.size, weights)):
        parent = wide if dice.random() < 0.25 else dice.choice(directories)
        name = f"{parent}/file-{number}" if parent else f"file-{number}"
        yield Entry(name, Kind.FILE, size, executable=dice.random() < 0.1)
        if dice.random() < 0.08:
            yield Entry(f"{name}.link", Kind.LINK, target=f"file-{number}")


def _kind(number: int) -> Kind:
    match number % 40:
        case 7 | 30:
            return Kind.FILE
        case 17:
            return Kind.LINK
    return Kind.DIRECTORY


def _references(dice: random.Random, earlier: Sequence[Planned], kind: Kind) -> set[StorePath]:
    """Some of *earlier*: mostly what everything refers to, sometimes a neighbour."""
    if not earlier:
        return set()
    wanted = 1 if kind is Kind.LINK else min(len(earlier), 1 + int(dice.expovariate(0.2)))
    return {
        earlier[min(int(dice.expovariate(0.1)), len(earlier) - 1)].path
        if dice.random() < 0.6
        else earlier[max(0, len(earlier) - 1 - int(dice.expovariate(0.02)))].path
        for _ in range(wanted)
    }


def _version(dice: random.Random) -> str:
    return f"{dice.randrange(12)}.{dice.randrange(30)}"


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """*total* in whole parts proportional to *weights*, exactly."""
    whole = sum(weights)
    parts: list[int] = []
    passed, given = 0.0, 0
    for weight in weights:
        passed += weight
        upto = round(total * passed / whole) if whole else 0
        parts.append(upto - given)
        given = upto
    return parts
