"""The registry of one process and its page: what every role has in common.

Names and units follow https://prometheus.io/docs/practices/naming/; ``docs/metrics.md`` lists them all.  No label names
a pod, a volume, a closure or an Expression: there may be any number of those.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from cknix_csi import __version__
from cknix_csi.metrics.looking import Looking
from cknix_csi.metrics.pages import Answer
from cknix_csi.metrics.ports import CollectionMetrics

log = logging.getLogger(__name__)

# A known closure takes milliseconds, and kubelet gives a call two minutes.
CALL_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 50.0, 120.0)
"""Seconds of an RPC."""
WORK_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 150.0, 300.0, 600.0, 1800.0, 3600.0)
"""Seconds of what Nix does."""
_LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LAG_PERIOD = 1.0

_SCRAPE_SECONDS = 2.0
"""How long a scrape waits for what must be looked up; Prometheus gives up after 10."""

# Else each counter and histogram would have a second series with the time it was made at.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Exposition:
    """What a process shows; *role* is ``node``, ``controller`` or ``provisioner``, and *disk* its data root, if any."""

    def __init__(self, role: str, disk: Path | None) -> None:
        self.registry = CollectorRegistry()
        self._looked_up: list[_LookedUp] = []
        ProcessCollector(registry=self.registry)
        build = Gauge(
            "cknix_build_info", "Always 1; the version is a label.", ("version", "role"), registry=self.registry
        )
        build.labels(__version__, role).set(1)
        self._lag = Histogram(
            "cknix_event_loop_lag_seconds",
            "How much later than it asked for a task of the event loop runs.",
            buckets=_LAG_BUCKETS,
            registry=self.registry,
        )
        if disk is not None:
            self.look_up(lambda: _space(disk), [_gauge(name, words) for name, words in _SPACE])

    def look_up(self, look: Callable[[], Sequence[Metric]], families: Sequence[Metric]) -> None:
        """Have *look* say at each scrape how things are; it may block, and runs in a thread.

        When it fails or takes too long, its metrics are left out.  *families* are those, without samples.
        """
        source = _LookedUp(look, families)
        self._looked_up.append(source)
        self.registry.register(source)

    def show(self, look: Callable[[], Sequence[Metric]], families: Sequence[Metric]) -> None:
        """As :meth:`look_up`, but *look* is immediate, and called on the event loop."""
        self.registry.register(_Shown(look, families))

    async def page(self, accept: str) -> Answer:
        """All metrics now, in the format that *accept* (the HTTP header) prefers; the oldest if it makes no sense."""
        await asyncio.gather(*(source.refresh() for source in self._looked_up))
        try:
            return self._encoded(accept)
        except TypeError:  # prometheus_client's for a version that has more in it than numbers
            return self._encoded("")

    def _encoded(self, accept: str) -> Answer:
        encode, content_type = choose_encoder(accept)
        return Answer(encode(self.registry), content_type)

    async def watch_loop(self) -> None:
        """Measure the event loop's lag until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + _LAG_PERIOD
            await asyncio.sleep(_LAG_PERIOD)
            self._lag.observe(max(0.0, clock() - due))


class _Shown(Collector):
    def __init__(self, look: Callable[[], Sequence[Metric]], families: Sequence[Metric]) -> None:
        self._look = look
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._look()

    def describe(self) -> Sequence[Metric]:
        return self._families


class _LookedUp(Collector):
    def __init__(self, look: Callable[[], Sequence[Metric]], families: Sequence[Metric]) -> None:
        self._looking = Looking(look)
        self._families = families
        self._found: Sequence[Metric] = ()

    async def refresh(self) -> None:
        self._found = ()
        try:
            self._found = await self._looking.within(_SCRAPE_SECONDS)
        except Exception as error:  # whatever it is, the others are shown
            log.debug("left out of the metrics: %r", error)

    def collect(self) -> Sequence[Metric]:
        return self._found

    def describe(self) -> Sequence[Metric]:
        return self._families


_SPACE = (
    ("cknix_data_root_free_bytes", "Bytes free on the disk of the data root, for others than root."),
    ("cknix_data_root_size_bytes", "Bytes of the disk of the data root."),
    ("cknix_data_root_free_inodes", "Inodes free on the disk of the data root, for others than root."),
)


def _space(disk: Path) -> Sequence[Metric]:
    found = os.statvfs(disk)
    values = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize, found.f_favail
    return [_gauge(name, words, value) for (name, words), value in zip(_SPACE, values, strict=True)]


def _gauge(name: str, words: str, value: float | None = None) -> Metric:
    return GaugeMetricFamily(name, words, value=value)


class CollectionCounts(CollectionMetrics):
    """Of garbage collections."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "cknix_gc_duration_seconds",
            "Time of a garbage collection.",
            ("outcome",),
            buckets=WORK_BUCKETS,
            registry=registry,
        )
        self._bytes = Counter(
            "cknix_gc_freed_bytes_total", "Bytes by which the free space has grown in collections.", registry=registry
        )
        self._paths = Counter(
            "cknix_gc_deleted_paths_total", "Store paths that collections have deleted.", registry=registry
        )

    def collection(self, outcome: str, seconds: float, size: int, paths: int) -> None:
        self._seconds.labels(outcome).observe(seconds)
        self._bytes.inc(size)
        self._paths.inc(paths)
