"""The node daemon's metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from cknix_csi.metrics.calls import CallCounts
from cknix_csi.metrics.exposition import CALL_BUCKETS, WORK_BUCKETS, Exposition
from cknix_csi.metrics.ports import Closure, NodeMetrics


@dataclass(frozen=True, slots=True)
class Holdings:
    """What volumes there are, and what for them: from the mount table and directories."""

    volumes: Mapping[tuple[str, bool], int]
    """Mounted in pods, by presentation and whether they are writable; zeros are there too."""
    views: int
    farms: int


@dataclass(frozen=True, slots=True)
class Notes:
    """What the ledger holds."""

    volumes: int
    closures: int
    written: bool
    """False when its file could not be written last time."""


NO_HOLDINGS = Holdings({}, 0, 0)
NO_NOTES = Notes(0, 0, True)


class NodeCounts(NodeMetrics):
    """:class:`NodeMetrics` in *exposition*."""

    def __init__(self, exposition: Exposition) -> None:
        self._exposition = exposition
        registry = exposition.registry
        self._calls = CallCounts(registry)
        self._publish = Histogram(
            "cknix_publish_duration_seconds",
            "Time of a publish, with its waiting for results and fetches.",
            ("closure", "outcome"),
            buckets=CALL_BUCKETS,
            registry=registry,
        )
        self._unpublish = Histogram(
            "cknix_unpublish_duration_seconds",
            "Time of an unpublish.",
            ("outcome",),
            buckets=CALL_BUCKETS,
            registry=registry,
        )
        self._fetch = Histogram(
            "cknix_fetch_duration_seconds",
            "Time of a fetch of a closure from caches, without waiting for its turn.",
            ("outcome",),
            buckets=WORK_BUCKETS,
            registry=registry,
        )
        self._fetched = Counter(
            "cknix_fetched_bytes_total", "Bytes of store paths, as NARs, that fetches have brought.", registry=registry
        )

    def rpc(self, method: str, code: str, reason: str, seconds: float) -> None:
        self._calls.rpc(method, code, reason, seconds)

    def publish(self, outcome: str, closure: Closure, seconds: float) -> None:
        self._publish.labels(closure, outcome).observe(seconds)

    def unpublish(self, outcome: str, seconds: float) -> None:
        self._unpublish.labels(outcome).observe(seconds)

    def fetch(self, outcome: str, seconds: float) -> None:
        self._fetch.labels(outcome).observe(seconds)

    def fetched_bytes(self, size: int) -> None:
        self._fetched.inc(size)

    def show_fetches(self, count: Callable[[], tuple[int, int]]) -> None:
        """*count* says how many fetches run and how many wait for their turn; immediate."""
        self._exposition.show(lambda: _fetches(*count()), _fetches(0, 0))

    def show_holdings(self, look: Callable[[], Holdings]) -> None:
        """*look* may block."""
        self._exposition.look_up(lambda: _holdings(look()), _holdings(NO_HOLDINGS))

    def show_ledger(self, look: Callable[[], Notes]) -> None:
        """*look* is immediate."""
        self._exposition.show(lambda: _ledger(look()), _ledger(NO_NOTES))


def _fetches(running: int, waiting: int) -> Sequence[Metric]:
    return [
        GaugeMetricFamily("cknix_fetches_running", "Fetches that run.", value=running),
        GaugeMetricFamily("cknix_fetches_waiting", "Fetches that wait for their turn.", value=waiting),
    ]


def _holdings(holdings: Holdings) -> Sequence[Metric]:
    volumes = GaugeMetricFamily(
        "cknix_volumes", "Volumes that are mounted in pods.", labels=("presentation", "writable")
    )
    for (presentation, writable), count in holdings.volumes.items():
        volumes.add_metric((presentation, "true" if writable else "false"), count)
    return [
        volumes,
        GaugeMetricFamily("cknix_views", "Views, in use or kept.", value=holdings.views),
        GaugeMetricFamily("cknix_farms", "Farms of hard links, in use or kept.", value=holdings.farms),
    ]


def _ledger(notes: Notes) -> Sequence[Metric]:
    return [
        GaugeMetricFamily("cknix_ledger_volumes", "Volumes in the ledger.", value=notes.volumes),
        GaugeMetricFamily(
            "cknix_ledger_closures", "Closures whose last use the ledger remembers.", value=notes.closures
        ),
        GaugeMetricFamily(
            "cknix_ledger_written", "1 when the last write of the ledger went well, else 0.", value=notes.written
        ),
    ]
