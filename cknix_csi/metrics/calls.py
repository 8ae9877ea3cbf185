"""Counts of CSI calls, for Prometheus, in whatever process answers them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from cknix_csi.metrics.exposition import CALL_BUCKETS
from cknix_csi.metrics.ports import OK
from cknix_csi.settings import DRIVER_NAME


class CallCounts:
    """Of the calls of one process, in *registry*."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # Name, labels and spelling of the codes are those of kubernetes-csi/csi-lib-utils (metrics.go), so that
        # dashboards for CSI drivers have it; buckets are finer.
        self._operations = Histogram(
            "csi_plugin_operations_seconds",
            "Time of a CSI call.",
            ("driver_name", "method_name", "grpc_status_code"),
            buckets=CALL_BUCKETS,
            registry=registry,
        )
        self._errors = Counter(
            "cknix_rpc_errors_total",
            "CSI calls that were not answered with OK.",
            ("method", "reason"),
            registry=registry,
        )

    def rpc(self, method: str, code: str, reason: str, seconds: float) -> None:
        """See :meth:`~cknix_csi.metrics.ports.NodeMetrics.rpc`."""
        self._operations.labels(DRIVER_NAME, method, _as_go_says(code)).observe(seconds)
        if reason != OK:
            self._errors.labels(method.rpartition("/")[2], reason).inc()


def _as_go_says(code: str) -> str:
    """``RESOURCE_EXHAUSTED`` as ``ResourceExhausted`` (google.golang.org/grpc/codes, String)."""
    special = {"OK": "OK", "CANCELLED": "Canceled"}
    return special.get(code) or "".join(word.capitalize() for word in code.split("_"))
