"""Every way to publish, for every closure, in one run."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from bench.bench import Bench, Case
from bench.figures import MS, Timing, median
from bench.peers import PEERS, NixCsi, Peer, TooSlow
from bench.room import remove
from bench.volume import first_publishes, further_publishes, node

OURS = "cknix, read-only"
OURS_WRITABLE = "cknix, writable"
_RATIO_TARGETS = {"M": 100.0, "L": 100.0}


async def methods(bench: Bench) -> None:
    """First and further pods by all methods; ratios of nix-csi to us."""
    for case in bench.cases:
        bench.progress.step(f"reading {case.shape.name} into the page cache")
        _warm(case.store.physical)
        bench.progress.step(f"{OURS} and writable, {case.shape.name}")
        ours = await _ours(bench, case)
        theirs = []
        for peer in PEERS:
            bench.progress.step(f"{peer.name}, {case.shape.name}")
            theirs.append(_measured(bench, case, peer))
        bench.results.timings += [*ours, *theirs]
        _compare(bench, case, ours[0], theirs)


async def _ours(bench: Bench, case: Case) -> list[Timing]:
    effort, shape = bench.effort, case.shape
    first, _ = await first_publishes(bench.room, case.store, case.root, effort.firsts)
    async with node(bench.room, case.store) as known:
        await known.publish("first", case.root)
        read_only, _ = await further_publishes(known, case.root, effort.pods, writable=False)
        writable, _ = await further_publishes(known, case.root, effort.pods, writable=True)
        case.require_shown(known.target("first"))
        await known.unpublish("first")
    return [
        Timing(OURS, shape.name, shape.files, first, read_only),
        Timing(OURS_WRITABLE, shape.name, shape.files, [], writable),
    ]


def _measured(bench: Bench, case: Case, kind: type[Peer]) -> Timing:
    shape = case.shape
    if note := kind.absent():
        return Timing(kind.name, shape.name, shape.files, [], [], note)
    # What takes a minute is not done three times.
    count = bench.effort.copies if not kind.same_again or shape.files < 100_000 else 1
    first: list[float] = []
    further: list[float] = []
    for number in range(count):
        directory = bench.room.scratch / f"peer-{number}"
        peer = kind(case, directory / "files")
        targets = [_target(directory, pod) for pod in range(1 if kind.same_again else 4)]
        try:
            for at, target in enumerate(targets):
                began = time.perf_counter()
                (peer.further if at else peer.first)(target)
                (further if at else first).append(time.perf_counter() - began)
                case.require_shown(target)
            for target in targets:
                peer.unpublish(target)
        except TooSlow as error:
            note = f"{error}: it takes longer"
            first.append(time.perf_counter() - began)
        peer.close()
        remove(directory)
        bench.room.settle()
    return Timing(kind.name, shape.name, shape.files, first, first if kind.same_again else further, note)


def _target(directory: Path, pod: int) -> Path:
    parent = directory / f"pods/pod-{pod}"
    parent.mkdir(parents=True)
    return parent / "mount"


def _compare(bench: Bench, case: Case, ours: Timing, theirs: list[Timing]) -> None:
    row = "against nix-csi's sequence"
    target = _RATIO_TARGETS.get(case.shape.name)
    for timing in theirs:
        if timing.method != NixCsi.name:
            continue
        for what, our, their in (
            ("first pod", ours.first, timing.first),
            ("further pod", ours.further, timing.further),
        ):
            ratio = median(their) / median(our) if their else None
            bench.results.add(
                row, case.shape, f"times faster, {what}", ratio, "x", target=target, at_least=True, note=timing.note
            )
            if their:
                bench.results.add(row, case.shape, f"nix-csi's sequence, {what}", median(their) * MS, "ms")


def _warm(directory: Path) -> None:
    # Several at a time: it is the disk's latency that this waits for.
    command = "find . -type f -print0 | xargs --null --max-procs=4 --max-args=500 cat >/dev/null"
    subprocess.run(["sh", "-c", command], cwd=directory, check=True)
