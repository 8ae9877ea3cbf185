"""The controller's metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from cknix_csi.api.expression import FAILED, PENDING, RUNNING, SUCCEEDED
from cknix_csi.metrics.exposition import WORK_BUCKETS, Exposition
from cknix_csi.metrics.ports import CacheMetrics, ControllerMetrics, State, Work

PHASES = (PENDING, RUNNING, SUCCEEDED, FAILED)


class ControllerCounts(ControllerMetrics):
    """:class:`ControllerMetrics` in *exposition*."""

    def __init__(self, exposition: Exposition) -> None:
        registry = exposition.registry
        self._state: Callable[[], State] | None = None
        self._seconds: Mapping[str, Histogram] = {
            work: Histogram(
                f"cknix_{work}_duration_seconds",
                words,
                ("outcome",),
                buckets=WORK_BUCKETS,
                registry=registry,
            )
            for work, words in (
                ("evaluation", "Time of an evaluation of an Expression for one system."),
                ("build", "Time of a build for one system, or of finding that there is nothing to build."),
            )
        }
        self._running: Mapping[str, Gauge] = {
            work: Gauge(f"cknix_{work}s_running", words, registry=registry)
            for work, words in (("evaluation", "Evaluations that run."), ("build", "Builds that run."))
        }
        self._failures = Counter(
            "cknix_expression_failures_total",
            "Tries to bring an Expression to its result that failed, for good or until the next try.",
            ("reason",),
            registry=registry,
        )
        self._leader = Gauge(
            "cknix_leader", "1 while this process holds the controller's Lease, else 0.", registry=registry
        )
        exposition.show(self._expressions, _states(State({}, 0, 0)))

    def begin(self, work: Work) -> None:
        self._running[work].inc()

    def end(self, work: Work, outcome: str, seconds: float) -> None:
        self._running[work].dec()
        self._seconds[work].labels(outcome).observe(seconds)

    def failure(self, reason: str) -> None:
        self._failures.labels(reason).inc()

    def lead(self, state: Callable[[], State] | None) -> None:
        self._state = state
        self._leader.set(state is not None)

    def _expressions(self) -> Sequence[Metric]:
        """Nothing, unless this is the controller that knows."""
        return [] if self._state is None else _states(self._state())


def _states(state: State) -> Sequence[Metric]:
    expressions = GaugeMetricFamily("cknix_expressions", "Expressions.", labels=("phase",))
    for phase in PHASES:
        expressions.add_metric((phase,), state.phases.get(phase, 0))
    return [
        expressions,
        GaugeMetricFamily(
            "cknix_build_queue_length", "Expressions that wait for their turn to be worked on.", value=state.waiting
        ),
        GaugeMetricFamily("cknix_build_queue_served", "Expressions that are worked on.", value=state.served),
    ]


class CacheCounts(CacheMetrics):
    """:class:`CacheMetrics` in *exposition*."""

    def __init__(self, exposition: Exposition) -> None:
        self._requests = Counter(
            "cknix_cache_requests_total",
            "Requests that the binary cache has answered.",
            ("kind", "code"),
            registry=exposition.registry,
        )
        self._sent = Counter(
            "cknix_cache_sent_bytes_total", "Bytes of NARs that the cache has sent.", registry=exposition.registry
        )

    def answered(self, kind: str, code: int) -> None:
        self._requests.labels(kind, str(code)).inc()

    def sent(self, size: int) -> None:
        self._sent.inc(size)
