"""`python -m tests.chaos [--short] [SCENARIO…]`: break parts of a cluster, and see what becomes of volumes."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence

from tests.chaos import images, play, podstart, scenarios  # noqa: F401 - importing them lists them
from tests.chaos.room import Room
from tests.chaos.scenario import SCENARIOS
from tests.cluster.harness.cache import progress
from tests.cluster.harness.components import build_components
from tests.cluster.harness.requirements import missing


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


def run(wanted: list[str], *, short: bool) -> int:
    """Play the scenarios in one cluster; after one that found something, the next has a new one."""
    build_components()
    started = time.monotonic()
    outcomes: list[play.Outcome] = []
    figure = ""
    with images.all_of_them() as archives, Room(archives) as room:
        for name in wanted:
            cluster = room.cluster()
            progress(f"chaos: {name}")
            if name == podstart.NAME:
                figure = podstart.measure(cluster, short=short)
                continue
            outcome = play.play(cluster, SCENARIOS[name], short=short)
            outcomes.append(outcome)
            took = ", ".join(f"{act} {seconds:.0f} s" for act, seconds in outcome.took.items())
            progress(f"chaos: {name}: {'ok' if outcome.good else 'FAILED'} ({took})")
            if not outcome.good:
                room.abandon()
    if outcomes:
        print(f"\n{play.table(outcomes)}")
    if figure:
        print(f"\n{figure}")
    print(f"\nin {time.monotonic() - started:.0f} s", flush=True)
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
