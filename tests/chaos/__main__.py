"""`python -m tests.chaos [--short] [SCENARIO…]`: break parts of a cluster, and see what becomes of volumes."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack

from tests.chaos import images, play, podstart, scenarios  # noqa: F401 - importing them lists them
from tests.chaos.lane import Lane
from tests.chaos.room import Room
from tests.chaos.scenario import SCENARIOS
from tests.cluster.harness.cache import progress
from tests.cluster.harness.components import build_components
from tests.cluster.harness.requirements import missing

LANES = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when nothing was found, 1 when something was, 2 for bad arguments."""
    known = [*SCENARIOS, podstart.NAME]
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--short", action="store_true", help="each once, as briefly as it means something")
    parser.add_argument("--list", action="store_true", help="name the scenarios and end")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="only these (default: all)")
    options = parser.parse_args(arguments)
    if options.list:
        width = max(map(len, known))
        print(*(f"{name:<{width}}  {scenario.summary}" for name, scenario in SCENARIOS.items()), sep="\n")
        print(f"{podstart.NAME:<{width}}  {podstart.SUMMARY}")
        return 0
    if unknown := sorted(set(options.scenarios) - set(known)):
        print(f"unknown scenarios: {', '.join(unknown)}; known are {', '.join(known)}", file=sys.stderr)
        return 2
    if reasons := missing():
        print(*reasons, sep="\n", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    wanted = [name for name in known if not options.scenarios or name in options.scenarios]
    return run(wanted, short=options.short)


def run(wanted: Sequence[str], *, short: bool) -> int:
    """Play the scenarios: one at a time, in short two, since much of each is waiting.  The figure comes last."""
    build_components()
    started = time.monotonic()
    names = [name for name in wanted if name != podstart.NAME]
    waiting = deque(names)
    outcomes: dict[str, play.Outcome] = {}
    figure = ""
    with images.all_of_them() as archives, ExitStack() as rooms:
        lanes = [
            Lane(rooms.enter_context(Room(archives)), waiting, outcomes, short=short)
            for _ in range(LANES if short and len(names) > 1 else 1)
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        if podstart.NAME in wanted:
            for lane in lanes[1:]:
                lane.room.abandon()
            progress(f"chaos: {podstart.NAME}")
            figure = podstart.measure(lanes[0].room.cluster(), short=short)
    played = [outcomes.get(name, play.Outcome(name)) for name in names]
    if played:
        print(f"\n{play.table(played)}")
    if figure:
        print(f"\n{figure}")
    print(f"\nin {time.monotonic() - started:.0f} s", flush=True)
    return 0 if all(outcome.good for outcome in played) else 1


if __name__ == "__main__":
    sys.exit(main())
