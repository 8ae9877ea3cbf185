"""How often an API server is asked, and how much of its answers is kept, on an API server in memory."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Mapping

import pytest

from cknix_csi.api.expression import Observed
from cknix_csi.kube.api import ApiError, Json, WatchEvent, expressions
from cknix_csi.kube.expressions import ExpressionWatch
from cknix_csi.kube.listwatch import list_and_watch
from tests.unit.fakeapi import FakeApi

UID = "01234567-89ab-cdef-0123-456789abcdef"
STORE_PATH = "/nix/store/7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb-hello"


class Spec(dict[str, object]):
    """Can be pointed to weakly."""


class Paged(FakeApi):
    """Has Expressions in pages of one; counts which of their specs are still in memory at the last."""

    def __init__(self, pages: int) -> None:
        super().__init__()
        self._pages = pages
        self.specs: list[weakref.ref[Spec]] = []
        self.sizes: set[str | None] = set()
        self.alive_at_the_end = 0

    async def get(self, path: str, *, query: Mapping[str, str] | None = None, metadata_only: bool = False) -> Json:
        self.sizes.add((query or {}).get("limit"))
        number = int((query or {}).get("continue", "0"))
        spec = Spec(data={"expr": "x"})
        self.specs.append(weakref.ref(spec))
        if number == self._pages - 1:
            gc.collect()
            self.alive_at_the_end = sum(each() is not None for each in self.specs)
        metadata = {"resourceVersion": "1"} | ({"continue": str(number + 1)} if number < self._pages - 1 else {})
        return {"kind": "ExpressionList", "metadata": metadata, "items": [expression(f"e{number}", spec)]}


def expression(name: str, spec: Spec) -> Json:
    return {
        "metadata": {"namespace": "n", "name": name, "uid": UID, "resourceVersion": "7", "generation": 3},
        "spec": spec,
        "status": {
            "observedGeneration": 2,
            "phase": "Succeeded",
            "message": "all is well",
            "history": [{"path": STORE_PATH}] * 3,
            "results": [{"system": "x86_64-linux", "path": STORE_PATH, "revision": "1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


async def test_what_everybody_writes_into_expressions_does_not_stay_in_memory() -> None:
    api = Paged(pages=20)
    watch = ExpressionWatch(api)
    running = asyncio.create_task(watch.run())
    async with asyncio.timeout(10):
        while ("WATCH", expressions()) not in api.requests:
            await asyncio.sleep(0)
    assert api.alive_at_the_end <= 2  # the page that came last, and the one before
    assert api.sizes == {"50"}
    for number in range(20):
        name = f"e{number}"
        assert await watch.get("n", name) == Observed.parse(expression(name, Spec()))
    running.cancel()
    await asyncio.wait({running})


class Forgetful(FakeApi):
    """Its list is of a version that it does not know a moment later."""

    def __init__(self, *, change: bool = False) -> None:
        super().__init__()
        self.objects["/x"] = {"kind": "XList", "metadata": {"resourceVersion": "1"}, "items": []}
        self._change = change

    async def watch(
        self, path: str, *, resource_version: str, timeout: float, query: Mapping[str, str] | None = None
    ) -> AsyncIterator[WatchEvent]:
        if self._change:
            yield WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": "2"}})
        raise ApiError("too old resource version", status=410)


async def asked(api: FakeApi, monkeypatch: pytest.MonkeyPatch, times: int) -> list[float]:
    """The pauses that are made when it is listed *times* times."""
    pauses: list[float] = []
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    def listed(items: list[Json]) -> None:
        if len(api.requests) == times:
            enough.set()
            raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await list_and_watch(api, "/x", listed=listed, changed=lambda kind, body: None)
    assert enough.is_set()
    return pauses


async def test_an_api_server_whose_lists_are_always_too_old_is_asked_less_and_less(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses = await asked(Forgetful(), monkeypatch, 20)
    assert len(pauses) == 19
    assert sum(pauses[:2]) < 1
    assert all(pause >= 7.5 for pause in pauses[8:])
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("too old resource version; following /x again in")


async def test_a_version_that_was_good_for_a_while_costs_no_more_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses = await asked(Forgetful(change=True), monkeypatch, 20)
    assert max(pauses) <= 0.2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
