"""The command line: ``python -m bench [names…]``."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from bench import machine, plot, report, rows
from bench.bench import FULL, QUICK, Bench, Case
from bench.figures import Results
from bench.generate import provide
from bench.methods import methods
from bench.peers import PEERS
from bench.progress import Progress
from bench.room import NoImage, Room, delete_cache, room
from bench.shapes import SHAPES

_BENCHMARKS: dict[str, tuple[str, Callable[[Bench], Awaitable[None]]]] = {
    "first": ("first pod of a new closure, and where the time goes", rows.first),
    "next": ("next pod of a known closure, in process and through gRPC", rows.further),
    "written": ("bytes and inodes that further pods write", rows.written),
    "many": ("500 pods of one closure: flat latency, daemon's memory", rows.many),
    "closures": ("200 closures at once: start-up reconciliation", rows.closures),
    "pagecache": ("a 200 MB program in 10 pods", rows.cached),
    "methods": ("against nix-csi's sequence, rsync --link-dest, bind per path, composefs", methods),
}
_PER_CASE = {"first": 1, "next": 1, "written": 1, "methods": 2 + len(PEERS)}
"""Steps for each closure; the others have one in all."""
_QUIET = 0.1
"""Share of the CPUs that others may use before they disturb the figures."""
_INTERRUPTED = 130


def main() -> int:
    options = _parse()
    if options.delete_cache:
        delete_cache(options.data_root)
        return 0
    if os.geteuid() != 0:
        print("mounting needs root", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with room(options.data_root, image=not options.no_image) as place:
            finished = _run(options, place)
    except BlockingIOError:
        print(f"another benchmark works in {options.data_root}", file=sys.stderr)
        return 1
    except NoImage as error:
        print(error, file=sys.stderr)
        return 1
    print(finished.text())
    if not finished.whole:
        print("interrupted: nothing is written", file=sys.stderr)
        return _INTERRUPTED
    _write(options, finished)
    return 0


def _parse() -> argparse.Namespace:
    known = "\n".join(f"  {name:10} {about}" for name, (about, _) in _BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        "python -m bench",
        description=f"Measures what volumes cost, and what peers take for the same.\n\nbenchmarks:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = Path(__file__).parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    parser.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks; default: all")
    parser.add_argument("--size", action="append", choices=SHAPES, help="which closures, repeatable; default: S M L")
    parser.add_argument("--quick", action="store_true", help="a minute: S and M, and everything less often")
    parser.add_argument("--data-root", type=Path, default=cache / "cknix-bench", help="default: %(default)s")
    parser.add_argument("--no-image", action="store_true", help="work on the data root's own file system")
    parser.add_argument("--delete-cache", action="store_true", help="delete generated closures, and do nothing else")
    parser.add_argument("--out", type=Path, help="where tables and plots go; default: out in the data root")
    parser.add_argument(
        "--write", nargs="?", const="append", choices=("append", "replace"), help=f"keep the result in {here.name}/"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(_BENCHMARKS)):
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(_BENCHMARKS)}")
    options.names = [name for name in _BENCHMARKS if not options.names or name in options.names]
    options.size = options.size or (["S", "M"] if options.quick else ["S", "M", "L"])
    options.data_root = options.data_root.absolute()
    options.out = here if options.write else (options.out or options.data_root / "out")
    return options


def _run(options: argparse.Namespace, place: Room) -> report.Report:
    shapes = [SHAPES[name] for name in SHAPES if name in options.size]
    progress = Progress(len(shapes) + sum(len(shapes) * _PER_CASE.get(name, 0) or 1 for name in options.names))
    others = machine.Others()
    cases = []
    for shape in shapes:
        progress.step(f"closure {shape}")
        store, plan = provide(place.stores, shape, partial(progress.detail, f"closure {shape}"))
        cases.append(Case(shape, store, plan))
    bench = Bench(place, cases, QUICK if options.quick else FULL, progress, Results())
    interrupted = False
    try:
        for name in options.names:
            asyncio.run(_one(name, bench))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        progress.close()
    described = machine.describe(place.filesystem)
    busy = f"others used {others.share():.0%} of the CPUs meanwhile"
    if others.share() > _QUIET:
        busy += ": the machine was NOT quiet; take times with care, ratios of one run are better"
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC") + (", --quick" if options.quick else "")
    return report.Report(when, [*described, ("load", busy)], bench.results, whole=not interrupted)


async def _one(name: str, bench: Bench) -> None:
    await _BENCHMARKS[name][1](bench)


def _write(options: argparse.Namespace, finished: report.Report) -> None:
    out: Path = options.out
    section = finished.markdown()
    if finished.results.timings:
        try:
            files = plot.draw(finished.results.timings, out)
            print(f"plots: {', '.join(str(file) for file in files)}", file=sys.stderr)
            section += "\n![publish time against closure size](publish-time.svg)\n"
        except plot.NoPlot as error:
            print(error, file=sys.stderr)
    if options.write:
        report.write(out / "RESULTS.md", section, replace=options.write == "replace")
        print(f"written to {out / 'RESULTS.md'}", file=sys.stderr)
    else:
        (out / "results.md").write_text(section)
        (out / "results.json").write_text(finished.json())
        print(f"tables: {out}/results.md, results.json", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
