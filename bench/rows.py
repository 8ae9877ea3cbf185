"""The rows about the driver itself: what a publish takes, writes and keeps in memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench import pagecache
from bench.bench import Bench
from bench.daemon import Daemon, running
from bench.figures import MS, median, percentile
from bench.generate import provide_program
from bench.volume import Node, first_publishes, further_publishes, node, republishes, volume_id
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.store import Store

_FIRST_TARGETS = {"S": 15.0, "M": 30.0, "L": 100.0}
_MIB = float(1 << 20)


async def first(bench: Bench) -> None:
    """A new closure's first pod, by size, and where the time goes."""
    for case in bench.cases:
        bench.progress.step(f"first pod of a new closure, {case.shape.name}")
        seconds, stages = await first_publishes(bench.room, case.store, case.root, bench.effort.firsts)
        row = "new closure, first pod"
        target = _FIRST_TARGETS.get(case.shape.name)
        bench.results.add(row, case.shape, "median", median(seconds) * MS, "ms", target=target)
        bench.results.add(row, case.shape, "fastest", min(seconds) * MS, "ms")
        used = median([stage.seconds["CPU"] for stage in stages])
        bench.results.add(row, case.shape, "CPU time, all threads", used * MS, "ms")
        known = 0.0
        for name in ("GC root", "closure query", "database", "mounts"):
            spent = median([stage.seconds[name] for stage in stages])
            known += spent
            bench.results.add(row, case.shape, f"of it {name}", spent * MS, "ms")
        bench.results.add(row, case.shape, "of it view and the rest", (median(seconds) - known) * MS, "ms")
        again = await republishes(bench.room, case.store, case.root, bench.effort.firsts)
        bench.results.add(row, case.shape, "median, such views just deleted", median(again) * MS, "ms")


async def further(bench: Bench) -> None:
    """The next pod of a known closure, in process and through gRPC."""
    count = bench.effort.pods
    for case in bench.cases:
        bench.progress.step(f"next pod of a known closure, {case.shape.name}")
        async with node(bench.room, case.store) as known:
            await known.publish("first", case.root)
            for mode, writable, target in (("read-only", False, 1.0), ("writable", True, 2.0)):
                await further_publishes(known, case.root, 10, writable=writable)
                published, unpublished = await further_publishes(known, case.root, count, writable=writable)
                row = f"next pod, {mode}"
                bench.results.add(row, case.shape, "median", median(published) * MS, "ms", target=target)
                bench.results.add(row, case.shape, "p99", percentile(published, 99) * MS, "ms")
                bench.results.add(row, case.shape, "unpublish median", median(unpublished) * MS, "ms")
            await known.unpublish("first")
        pods = _Pods(bench.room.scratch / "daemon")
        async with running(pods.data, case.store) as daemon:
            await pods.publish(daemon, "first", case.root)
            for mode, writable in (("read-only", False), ("writable", True)):
                names = [f"{mode}-{number}" for number in range(count)]
                published = [await pods.publish(daemon, name, case.root, writable=writable) for name in names]
                row = f"next pod through gRPC, {mode}"
                bench.results.add(row, case.shape, "median", median(published) * MS, "ms", target=5.0)
                bench.results.add(row, case.shape, "p99", percentile(published, 99) * MS, "ms")
                for name in names:
                    await pods.unpublish(daemon, name)
            await pods.unpublish(daemon, "first")


async def written(bench: Bench) -> None:
    """What further pods write below the data root, by du."""
    count = 50
    for case in bench.cases:
        bench.progress.step(f"bytes and inodes written per pod, {case.shape.name}")
        async with node(bench.room, case.store) as known:
            await known.publish("first", case.root)
            for mode, writable in (("read-only", False), ("writable", True)):
                before = _usage(known, case.store)
                pods = [f"{mode}-{number}" for number in range(count)]
                for pod in pods:
                    await known.publish(pod, case.root, writable=writable)
                after = _usage(known, case.store)
                for what, unit, one, other in zip(("bytes", "inodes"), ("B", ""), before, after, strict=True):
                    target = None if writable else 0.0
                    row = f"written per further {mode} pod"
                    bench.results.add(row, case.shape, what, (other - one) / count, unit, target=target)
                for pod in pods:
                    await known.unpublish(pod)
            await known.unpublish("first")


async def many(bench: Bench) -> None:
    """Many pods of one closure, then none: latency and the daemon's memory."""
    case, count = bench.largest, bench.effort.many
    row = f"{count} pods of one closure, then {count} unpublished"
    bench.progress.step(row)
    pods = _Pods(bench.room.scratch / "daemon")
    async with running(pods.data, case.store) as daemon:
        # A round before: code that is loaded late and the heap's own size are not what grows with volumes.
        for number in range(count):
            await pods.publish(daemon, number, case.root)
        for number in range(count):
            await pods.unpublish(daemon, number)
        start = daemon.memory()
        await pods.publish(daemon, "first", case.root)
        published = []
        for number in range(count):
            published.append(await pods.publish(daemon, number, case.root))
            bench.progress.detail(row, number / count / 2)
        peak = daemon.memory()
        unpublished = []
        for number in range(count):
            unpublished.append(await pods.unpublish(daemon, number))
            bench.progress.detail(row, 0.5 + number / count / 2)
        await pods.unpublish(daemon, "first")
        end = daemon.memory()
    for what, seconds in (("publish", published), ("unpublish", unpublished)):
        p50, p99 = median(seconds), percentile(seconds, 99)
        bench.results.add(row, case.shape, f"{what} p50", p50 * MS, "ms")
        bench.results.add(row, case.shape, f"{what} p99", p99 * MS, "ms")
        bench.results.add(row, case.shape, f"{what} p99 / p50", p99 / p50, "x", target=3.0)
        fifth = max(1, count // 5)
        growth = median(seconds[-fifth:]) / median(seconds[:fifth])
        bench.results.add(row, case.shape, f"{what} last fifth / first fifth", growth, "x")
    bench.results.add(row, case.shape, "daemon's memory at start", start / _MIB, "MiB")
    bench.results.add(row, case.shape, "daemon's memory with all", peak / _MIB, "MiB", target=120.0)
    bench.results.add(row, case.shape, "daemon's memory at end", end / _MIB, "MiB", target=1.1 * start / _MIB)


async def closures(bench: Bench) -> None:
    """Many closures at once: how long a restarted daemon takes to find its way, and whether others notice."""
    case = bench.cases[0]
    others = [other.path for other in case.plan.others][: bench.effort.closures]
    row = f"{len(others)} different closures mounted"
    bench.progress.step(row)
    pods = _Pods(bench.room.scratch / "daemon")
    probes = bench.effort.pods
    async with running(pods.data, case.store) as daemon:
        await pods.publish(daemon, "known", case.root)
        bench.room.settle()  # else what was written before is written while the next are timed
        alone = await _probe(pods, daemon, case.root, probes)
        new = []
        for number, root in enumerate(others):
            new.append(await pods.publish(daemon, f"other-{number}", root))
            bench.progress.detail(row, number / len(others))
        bench.room.settle()
        beside = await _probe(pods, daemon, case.root, probes)
    async with running(pods.data, case.store) as daemon:
        reconciled = daemon.reconciled
        restarted = await _probe(pods, daemon, case.root, probes)
        for number in range(len(others)):
            await pods.unpublish(daemon, f"other-{number}")
        await pods.unpublish(daemon, "known")
    closure = f"small ones with paths of {case.shape.name}"
    bench.results.add(row, closure, "start-up reconciliation", reconciled, "s", target=2.0)
    bench.results.add(row, closure, "publish of each, median", median(new) * MS, "ms")
    bench.results.add(row, closure, "known closure, alone", median(alone) * MS, "ms")
    bench.results.add(row, closure, "known closure, beside them", median(beside) * MS, "ms")
    bench.results.add(row, closure, "known closure, beside them, after a restart", median(restarted) * MS, "ms")
    ratio = median(beside) / median(alone)
    bench.results.add(row, closure, "known closure, beside / alone", ratio, "x", target=1.25)


async def cached(bench: Bench) -> None:
    """One large program read in ten pods: how much of the page cache it takes."""
    size, count = bench.effort.program, 10
    row = f"page cache: {size / 1e6:.0f} MB program in {count} pods"
    bench.progress.step(row)
    store, program = provide_program(bench.room.stores, size)
    name = "store/" + program.path.basename + "/bin/program"
    physical = store.physical_path(program.path) / "bin/program"
    for mode, writable in (("read-only", False), ("writable", True)):
        async with node(bench.room, store) as known:
            for number in range(count):
                await known.publish(number, program.path, writable=writable)
            files = [known.target(number) / name for number in range(count)]
            used, how = pagecache.taken(files, physical)
            bench.results.add(row, program.path.name, f"{mode}, {how}", used / 1e6, "MB", target=1.05 * size / 1e6)
            for number in range(count):
                await known.unpublish(number)
    copies = [bench.room.scratch / f"copy-{number}" for number in range(2)]
    for copy in copies:
        command = ["rsync", "--archive", "--hard-links", str(store.physical_path(program.path)), f"{copy}/"]
        subprocess.run(command, check=True)
    files = [copy / program.path.basename / "bin/program" for copy in copies]
    used, how = pagecache.taken(files, *files)
    bench.results.add(row, program.path.name, f"nix-csi's rsync, only {len(copies)} pods, {how}", used / 1e6, "MB")


class _Pods:
    """Targets of pods beside a daemon's data root."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.data = path / "data"
        self.data.mkdir(parents=True, exist_ok=True)

    async def publish(self, daemon: Daemon, pod: object, root: StorePath, *, writable: bool = False) -> float:
        return await daemon.publish(volume_id(pod), self._target(pod), root, writable=writable)

    async def unpublish(self, daemon: Daemon, pod: object) -> float:
        return await daemon.unpublish(volume_id(pod), self._target(pod))

    def _target(self, pod: object) -> Path:
        parent = self._path / f"pods/{pod}"
        parent.mkdir(parents=True, exist_ok=True)
        return parent / "mount"


async def _probe(pods: _Pods, daemon: Daemon, root: StorePath, count: int) -> list[float]:
    seconds = []
    for number in range(count):
        seconds.append(await pods.publish(daemon, f"probe-{number}", root))
        await pods.unpublish(daemon, f"probe-{number}")
    return seconds


def _usage(known: Node, store: Store) -> tuple[int, int]:
    """Bytes and inodes of the data root and of the store's state, without what is mounted in them."""
    where = [known.data, store.state]
    return _du("--block-size=1", where), _du("--inodes", where)


def _du(what: str, where: list[Path]) -> int:
    command = ["du", "--one-file-system", "--summarize", "--total", what, *map(str, where)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.splitlines()[-1].split()[0])
