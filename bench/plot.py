"""Publish time against closure size, for all methods."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from bench.figures import MS, Timing, median


class NoPlot(Exception):
    """Nothing to draw with; the message says what helps."""


def draw(timings: Sequence[Timing], directory: Path) -> list[Path]:
    """Write ``publish-time.png`` and ``.svg``; returns their paths.  Raises :class:`NoPlot`."""
    try:
        mpl = importlib.import_module("matplotlib")  # an optional extra
    except ImportError:
        raise NoPlot("no plot without matplotlib: pip install --editable '.[bench]'") from None
    mpl.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")

    # Text stays text, and the same figures give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cknix"})
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    methods = list(dict.fromkeys(timing.method for timing in timings))
    for axis, title in ((axes[0], "first pod of a new closure"), (axes[1], "each further pod")):
        for at, method in enumerate(methods):
            points = sorted(
                (timing.files, median(seconds) * MS)
                for timing in timings
                if timing.method == method and (seconds := timing.first if axis is axes[0] else timing.further)
            )
            if points:
                files, times = zip(*points, strict=True)
                axis.plot(files, times, marker="o", color=f"C{at}", label=method)
        axis.set(title=title, xscale="log", yscale="log", xlabel="files in the closure")
        sizes = sorted({(timing.files, timing.closure) for timing in timings})
        axis.minorticks_off()
        axis.set_xticks([files for files, _ in sizes], [f"{name}\n{files / 1000:g}k" for files, name in sizes])
        axis.yaxis.set_major_formatter(_duration)
        axis.grid(visible=True, alpha=0.25)
    axes[0].set_ylabel("time until it is mounted (closure in the store, warm caches)")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
    written = [directory / "publish-time.png", directory / "publish-time.svg"]
    for file in written:
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else {})
    pyplot.close(figure)
    return written


def _duration(milliseconds: float, _position: int) -> str:
    return f"{milliseconds / MS:g} s" if milliseconds >= MS else f"{milliseconds:g} ms"
