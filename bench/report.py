"""Results as text, as Markdown, and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.figures import MS, Figure, Results, Timing, median

_PREAMBLE = """# Results

By `make bench`, newest first. Every figure of a section is from one run on one machine; times are medians of warm runs.
Closures are generated in shapes of real systems (`bench/shapes.py`). What peers do is in `bench/peers.py`: the bare
steps, without the locks and checks of a driver, which the figures of cknix include.
"""
_SECTION = re.compile(r"^## ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Report:
    """One run."""

    when: str
    machine: Sequence[tuple[str, str]]
    results: Results
    whole: bool = True
    """False for what there was when somebody interrupted it."""

    def text(self) -> str:
        """For a terminal."""
        parts = [f"{self.when}\n" + "".join(f"  {name}: {value}\n" for name, value in self.machine)]
        parts += [_aligned(table) for table in self._tables()]
        return "\n".join(parts)

    def markdown(self) -> str:
        """A section for RESULTS.md."""
        parts = [f"## {self.when}\n", "".join(f"* {name}: {value}\n" for name, value in self.machine)]
        parts += [_markdown(table) for table in self._tables()]
        return "\n".join(parts)

    def json(self) -> str:
        return json.dumps(
            {
                "when": self.when,
                "machine": dict(self.machine),
                "figures": [asdict(figure) | {"met": figure.met} for figure in self.results.figures],
                "timings": [asdict(timing) for timing in self.results.timings],
            },
            indent=1,
        )

    def _tables(self) -> list[list[list[str]]]:
        tables = [_figures_table(self.results.figures)]
        if self.results.timings:
            tables.append(_methods_table(self.results.timings))
        return tables


def write(file: Path, section: str, *, replace: bool) -> None:
    """Put *section* first in *file*; with *replace*, instead of all sections that are there."""
    old = file.read_text() if file.exists() else ""
    found = _SECTION.search(old)
    kept = old[found.start() :] if found and not replace else ""
    file.write_text(f"{_PREAMBLE}\n{section}" + (f"\n{kept}" if kept else ""))


def number(value: float | None) -> str:
    """Three digits that matter."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _figures_table(figures: Iterable[Figure]) -> list[list[str]]:
    table = [["what", "closure", "figure", "measured", "to reach", ""]]
    row, closure = "", ""
    for figure in figures:
        new_row, new_closure = figure.row != row, (figure.row, figure.closure) != (row, closure)
        row, closure = figure.row, figure.closure
        target = ""
        if figure.target is not None:
            target = f"{'≥' if figure.at_least else '≤'} {number(figure.target)} {figure.unit}".rstrip()
        verdict = {None: "", True: "reached", False: "MISSED"}[figure.met]
        value = "" if figure.value is None else f"{number(figure.value)} {figure.unit}".rstrip()
        measured = ", ".join(part for part in (value, figure.note) if part)
        names = [row if new_row else "", closure if new_closure else ""]
        table.append([*names, figure.what, measured, target, verdict])
    return table


def _methods_table(timings: Sequence[Timing]) -> list[list[str]]:
    """A line for each method; milliseconds, and how much longer than our read-only volume it takes."""
    shapes = list(dict.fromkeys(timing.closure for timing in timings))
    methods = list(dict.fromkeys(timing.method for timing in timings))
    found = {(timing.method, timing.closure): timing for timing in timings}
    columns = [f"{shape}, {pod}" for shape in shapes for pod in ("first pod", "further pod")]
    table = [["method", *columns]]
    for method in methods:
        line = [method]
        for shape in shapes:
            ours, timing = found[methods[0], shape], found[method, shape]
            for our, seconds in ((ours.first, timing.first), (ours.further, timing.further)):
                if not seconds:
                    line.append(timing.note or "-")
                    continue
                times = f" ({number(median(seconds) / median(our))} x)" if timing is not ours else ""
                more = f", {timing.note}" if timing.note else ""
                line.append(f"{number(median(seconds) * MS)} ms{times}{more}")
        table.append(line)
    return table


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    ruled = [table[0], ["-" * width for width in widths], *table[1:]]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in ruled
    )


def _markdown(table: Sequence[Sequence[str]]) -> str:
    ruled = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in ruled)
