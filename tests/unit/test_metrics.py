"""Metrics: documented one by one, named by Prometheus' conventions, and cheap to keep."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from cknix_csi.api.errors import CknixError, OutOfSpace
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.measured import MeasuredStore
from cknix_csi.csi.readiness import Readiness, Step
from cknix_csi.metrics import exposition as expositions
from cknix_csi.metrics.controller import PHASES, CacheCounts, ControllerCounts
from cknix_csi.metrics.exposition import CollectionCounts, Exposition
from cknix_csi.metrics.looking import Looking
from cknix_csi.metrics.node import Holdings, NodeCounts, Notes
from cknix_csi.metrics.ports import State, outcome_of
from cknix_csi.monitoring import NodeMonitoring, ProvisionerMonitoring
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.collection import Collected, CollectionFailed, Space
from cknix_csi.nix.store import Store
from cknix_csi.nix.wants import Wants
from cknix_csi.volumes.failures import NodeUnusable
from cknix_csi.volumes.ledger import Ledger
from cknix_csi.volumes.volumes import Volumes

ROLES = ("node", "controller", "provisioner")
DOCUMENTED = Path(__file__).parents[2] / "docs/metrics.md"

Families = dict[str, Metric]


async def scraped(exposition: Exposition) -> Families:
    """What Prometheus' own parser makes of the page, by name; counters with their suffix."""
    answer = await exposition.page("")
    assert answer.content_type.startswith("text/plain; version=")
    found = text_string_to_metric_families(answer.body.decode())
    return {f"{family.name}_total" if family.type == "counter" else family.name: family for family in found}


def values(families: Families, name: str) -> dict[tuple[str, ...], float]:
    """Samples of a metric, or of a part of it such as ``x_count``, by their labels' values in alphabetical order."""
    family = next(families[each] for each in (name, name.removesuffix("_count")) if each in families)
    return {tuple(sample.labels.values()): sample.value for sample in family.samples if sample.name == name}


def busy_node(directory: Path) -> Exposition:
    """A node of which every metric has a sample."""
    exposition = Exposition("node", directory)
    metrics = NodeCounts(exposition)
    metrics.rpc("/csi.v1.Node/NodePublishVolume", "OK", "OK", 0.003)
    metrics.rpc("/csi.v1.Node/NodePublishVolume", "RESOURCE_EXHAUSTED", "OutOfSpace", 3.0)
    metrics.rpc("/csi.v1.Node/NodePublishVolume", "CANCELLED", "Cancelled", 3.0)
    metrics.publish("OK", "known", 0.002)
    metrics.unpublish("OK", 0.001)
    metrics.fetch("CacheUnavailable", 12.0)
    metrics.fetched_bytes(1234)
    metrics.show_fetches(lambda: (3, 2))
    metrics.show_holdings(lambda: Holdings({("redirect", True): 5, ("copy", False): 0}, 4, 1))
    metrics.show_ledger(lambda: Notes(5, 7, written=True))
    CollectionCounts(exposition.registry).collection("OK", 2.0, 4096, 17)
    return exposition


def busy_controller(directory: Path) -> Exposition:
    """A controller of which every metric has a sample."""
    exposition = Exposition("controller", directory)
    metrics = ControllerCounts(exposition)
    for work in ("evaluation", "build"):
        metrics.begin(work)
        metrics.begin(work)
        metrics.end(work, "BuildFailed", 1.0)
    metrics.failure("BuildFailed")
    metrics.lead(lambda: State({"Succeeded": 3}, waiting=2, served=1))
    cache = CacheCounts(exposition)
    cache.answered("nar", 200)
    cache.sent(100)
    CollectionCounts(exposition.registry).collection("OK", 2.0, 4096, 17)
    return exposition


def busy_provisioner() -> Exposition:
    """A provisioner of which every metric has a sample."""
    monitoring = ProvisionerMonitoring()
    monitoring.calls.rpc("/csi.v1.Controller/CreateVolume", "NOT_FOUND", "ExpressionNotFound", 0.3)
    return monitoring.exposition


@pytest.fixture
async def shown(tmp_path: Path) -> dict[str, Families]:
    """All metrics of our own, by role."""
    return {
        role: {name: family for name, family in (await scraped(made)).items() if not name.startswith("process_")}
        for role, made in zip(ROLES, (busy_node(tmp_path), busy_controller(tmp_path), busy_provisioner()), strict=True)
    }


@pytest.fixture
def families(shown: dict[str, Families]) -> Families:
    return {**shown["provisioner"], **shown["node"], **shown["controller"]}


def labels(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def documented() -> Iterator[tuple[str, str, set[str], str, str]]:
    """Name, type, labels, unit and where it is from, of each row of the table."""
    rows = [line for line in DOCUMENTED.read_text().splitlines() if re.match(r"\| `\w+` \| [a-z]+ \|", line)]
    assert len(rows) > 20
    for row in rows:
        name, kind, named, unit, where, _ = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        yield name.strip("`"), kind, set(re.findall(r"`(\w+)`", named)), unit, where


def test_the_documented_metrics_are_those_there_are(shown: dict[str, Families]) -> None:
    found = {
        (name, family.type, frozenset(labels(family)), role)
        for role, families in shown.items()
        for name, family in families.items()
    }
    rows = {
        (name, kind, frozenset(named), role)
        for name, kind, named, _, where in documented()
        for role in (ROLES if where == "all" else where.split(", "))
    }
    assert found == rows


def test_a_documented_unit_is_the_one_in_the_name() -> None:
    for name, _, _, unit, _ in documented():
        for base in ("seconds", "bytes"):
            assert (unit == base) == (base in name.removesuffix("_total").split("_")), name


def test_queries_and_alerts_name_metrics_and_labels_that_exist(families: Families) -> None:
    text = DOCUMENTED.read_text().partition("## Queries")[2]
    known = set(families) | {
        f"{name}_{part}"
        for name, family in families.items()
        if family.type == "histogram"
        for part in ("bucket", "count")
    }
    named = set(re.findall(r"\bcknix_\w+\b(?!\*)", text)) - {"cknix_build_queue_"}
    assert len(named) > 10
    assert named <= known
    for name, selector in re.findall(r"\b(cknix_\w+)\{([^}]+)\}", text):
        family = families[re.sub(r"_(bucket|count)$", "", name)]
        assert {part.partition("=")[0] for part in selector.split(",")} <= labels(family), name


# The rules of `promtool check metrics` (github.com/prometheus/client_golang, prometheus/testutil/promlint).
_ABBREVIATED = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
_NOT_BASE = {
    "milliseconds",
    "microseconds",
    "nanoseconds",
    "minutes",
    "hours",
    "days",
    "kilobytes",
    "megabytes",
    "bits",
}
_TYPES = {"counter", "gauge", "histogram", "summary", "untyped"}
_RESERVED = {"bucket", "count", "sum", "info", "created", "timestamp"}


def test_names_are_such_as_promtool_accepts(families: Families) -> None:
    for name, family in families.items():
        words = name.split("_")
        assert family.documentation.endswith("."), name
        assert re.fullmatch("[a-z][a-z0-9_]*", name), name
        assert (words[-1] == "total") == (family.type == "counter"), name
        assert not {*words} & (_ABBREVIATED | _NOT_BASE | _TYPES), name
        if name != "cknix_build_info":
            assert words[-1] not in _RESERVED, name
        if family.type == "histogram":
            assert words[-1] == "seconds", name
        for label in labels(family):
            assert re.fullmatch("[a-z][a-z0-9_]*", label), (name, label)
            assert label not in {"quantile", "job", "instance"}, (name, label)


def test_names_say_whose_they_are(families: Families) -> None:
    assert {name for name in families if not name.startswith("cknix_")} == {"csi_plugin_operations_seconds"}


def test_no_series_is_there_for_the_time_at_which_another_was_made(families: Families) -> None:
    assert not [sample for family in families.values() for sample in family.samples if "_created" in sample.name]


async def test_codes_are_spelled_as_other_drivers_do(tmp_path: Path) -> None:
    found = values(await scraped(busy_node(tmp_path)), "csi_plugin_operations_seconds_count")
    method = "/csi.v1.Node/NodePublishVolume"
    assert found == {("csi.cknix.cool", code, method): 1 for code in ("OK", "ResourceExhausted", "Canceled")}


async def test_only_a_call_that_failed_is_an_error(tmp_path: Path) -> None:
    found = values(await scraped(busy_node(tmp_path)), "cknix_rpc_errors_total")
    assert found == {("NodePublishVolume", "OutOfSpace"): 1, ("NodePublishVolume", "Cancelled"): 1}


async def test_every_phase_is_there_and_nothing_once_another_controller_works(tmp_path: Path) -> None:
    exposition = Exposition("controller", tmp_path)
    metrics = ControllerCounts(exposition)
    waiting = await scraped(exposition)
    assert values(waiting, "cknix_leader") == {(): 0}
    assert "cknix_expressions" not in waiting
    metrics.lead(lambda: State({"Failed": 2}, waiting=0, served=0))
    assert values(await scraped(exposition), "cknix_expressions") == {
        (phase,): 2 if phase == "Failed" else 0 for phase in PHASES
    }
    metrics.lead(None)
    assert "cknix_expressions" not in await scraped(exposition)


async def test_a_disk_that_hangs_costs_one_thread_and_its_own_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expositions, "_SCRAPE_SECONDS", 0.02)
    released, asked = threading.Event(), []
    exposition = Exposition("node", tmp_path)

    def look() -> list[Metric]:
        asked.append(1)
        released.wait()
        return [GaugeMetricFamily("cknix_hung", "x", value=1)]

    exposition.look_up(look, [GaugeMetricFamily("cknix_hung", "x")])
    try:
        for _ in range(3):
            families = await scraped(exposition)
            assert "cknix_hung" not in families
            assert "cknix_data_root_free_bytes" in families
        assert len(asked) == 1
    finally:
        released.set()
    while "cknix_hung" not in await scraped(exposition):
        await asyncio.sleep(0)


async def test_what_cannot_be_looked_up_is_left_out(tmp_path: Path) -> None:
    families = await scraped(Exposition("node", tmp_path / "gone"))
    assert "cknix_data_root_free_bytes" not in families
    assert "cknix_build_info" in families


async def test_those_who_look_at_the_same_time_share_one_look() -> None:
    asked: list[int] = []
    looking = Looking(lambda: asked.append(1))
    await asyncio.gather(*(looking.within(5) for _ in range(9)))
    assert len(asked) == 1
    await looking.within(5)
    assert len(asked) == 2


async def test_a_lagging_event_loop_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expositions, "_LAG_PERIOD", 0.001)
    exposition = Exposition("node", tmp_path)
    watching = asyncio.create_task(exposition.watch_loop())
    await asyncio.sleep(0)
    time.sleep(0.06)
    while not values(await scraped(exposition), "cknix_event_loop_lag_seconds_count")[()]:
        await asyncio.sleep(0)
    watching.cancel()
    lag = (await scraped(exposition))["cknix_event_loop_lag_seconds"]
    assert next(sample.value for sample in lag.samples if sample.name.endswith("_sum")) > 0.05


async def test_a_collection_is_counted_however_it_ends(tmp_path: Path) -> None:
    class Store:
        failure: CknixError | None = None

        async def space(self) -> Space:
            return Space(1, 2)

        async def collect(self, want: int, order: Sequence[StorePath], wants: Callable[[], Wants]) -> Collected:
            if self.failure is not None:
                raise self.failure
            return Collected(4096, 17, ())

    exposition, store = Exposition("node", tmp_path), Store()
    measured = MeasuredStore(store, CollectionCounts(exposition.registry))
    await measured.collect(1, (), Wants)
    store.failure = CollectionFailed("nix says no")
    with pytest.raises(CollectionFailed):
        await measured.collect(1, (), Wants)
    families = await scraped(exposition)
    assert values(families, "cknix_gc_duration_seconds_count") == {("OK",): 1, ("CollectionFailed",): 1}
    assert values(families, "cknix_gc_freed_bytes_total") == {(): 4096}
    assert values(families, "cknix_gc_deleted_paths_total") == {(): 17}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "OK"),
        (OutOfSpace("full"), "OutOfSpace"),
        (asyncio.CancelledError(), "Cancelled"),
        (KeyError("x"), "Unexpected"),
    ],
)
def test_an_outcome_is_a_reason_whatever_the_error(error: BaseException | None, outcome: str) -> None:
    assert outcome_of(error) == outcome


async def test_ready_is_who_has_done_every_step_and_can_still_mount() -> None:
    broken: list[CknixError] = []

    def check() -> None:
        for error in broken:
            raise error

    readiness = Readiness((Step.RECONCILED, Step.SERVED), check)
    readiness.reach(Step.RECONCILED)
    answer = await readiness.page("")
    assert answer.status == 503
    assert answer.body.decode().splitlines() == [
        "[+] what an earlier daemon left is in order",
        "[-] the CSI socket is served",
        "[+] disk and mount table can be used",
    ]
    readiness.reach(Step.SERVED)
    readiness.reach(Step.REGISTERED)  # nobody asked for it
    assert (await readiness.page("")).status == 200
    broken.append(NodeUnusable("the file system has become read-only"))
    answer = await readiness.page("")
    assert answer.status == 503
    assert "[-] disk and mount table can be used: the file system has become read-only" in answer.body.decode()
    broken.clear()
    readiness.leave(Step.SERVED, "it was\nremoved")
    answer = await readiness.page("")
    assert answer.status == 503
    assert "[-] the CSI socket is served: it was removed" in answer.body.decode().splitlines()


async def test_a_disk_that_does_not_answer_is_told_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    from cknix_csi.csi import readiness as module

    assert module.LOOK_SECONDS < 1
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    released = threading.Event()

    def hang() -> None:
        released.wait()

    try:
        with pytest.raises(NodeUnusable, match=r"has not answered for 0\.02 s"):
            await Readiness(check=hang).check()
    finally:
        released.set()


async def test_an_address_that_is_taken_is_told_by_the_name_of_its_setting(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path, StoreClosures(Store.chroot(tmp_path)))
    monitoring = NodeMonitoring(tmp_path, volumes, Ledger(tmp_path / "ledger"))
    refused = pytest.raises(CknixError, match="cannot listen where CKNIX_METRICS_LISTEN says: ")
    with socket.create_server(("127.0.0.1", 0)) as taken, refused as raised:
        async with monitoring.served(taken.getsockname()):
            pass
    assert raised.value.reason == "SocketUnavailable"


async def test_what_fails_while_it_is_served_is_not_taken_for_the_address(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path, StoreClosures(Store.chroot(tmp_path)))
    monitoring = NodeMonitoring(tmp_path, volumes, Ledger(tmp_path / "ledger"))
    for address in (None, ("127.0.0.1", 0)):
        with pytest.raises(OSError, match=r"^something else$"):
            async with monitoring.served(address):
                raise OSError("something else")


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=x;escaping=",
        "application/openmetrics-text;version=1.x",
        "text/plain;version=1.0.0-rc1",
    ],
)
async def test_a_header_that_makes_no_sense_gets_plain_text(accept: str, tmp_path: Path) -> None:
    answer = await busy_node(tmp_path).page(accept)
    assert answer.content_type.startswith("text/plain; version=0.0.4")
    assert b"cknix_build_info" in answer.body
