"""Results that are remembered for the time without an API server."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.attributes import FromExpression
from cknix_csi.api.errors import CknixError, NotFound
from cknix_csi.api.expression import FAILED, RUNNING, SUCCEEDED
from cknix_csi.api.situations import Situation
from cknix_csi.csi import remembered, resolve
from cknix_csi.csi.remembered import RememberedResults
from cknix_csi.csi.resolve import Resolver
from tests.node.fakes import HELLO, OTHER, SYSTEM, FakeExpressions, expression

EXPRESSION = FromExpression("default", "hello")
AWAY = CknixError("connection refused", Situation.KUBERNETES_UNAVAILABLE)


async def _seen(file: Path, **state: Any) -> None:
    """A daemon on *file* resolves the Expression in *state*, and ends."""
    results = RememberedResults(file, SYSTEM)
    expressions = FakeExpressions()
    await expressions.put(expression(**state))
    async with results.kept():
        await Resolver(SYSTEM, expressions, results).resolve(EXPRESSION, budget=10)


async def _next(file: Path, expressions: FakeExpressions, *, system: str = SYSTEM, budget: float = 10) -> Any:
    """What the next daemon makes of the Expression."""
    results = RememberedResults(file, system)
    async with results.kept():
        return await Resolver(system, expressions, results).resolve(EXPRESSION, budget=budget)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state/results.json"


async def test_the_next_process_knows_a_result_when_no_api_server_answers(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await _seen(file, phase=SUCCEEDED, results={SYSTEM: HELLO})
    assert await _next(file, FakeExpressions(failure=AWAY)) == HELLO
    assert f"using the last known result of Expression default/hello, {HELLO}: connection refused" in caplog.text


async def test_an_api_server_that_hangs_is_not_waited_for_long(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_PATIENCE_SECONDS", 0.05)
    await _seen(file, phase=SUCCEEDED, results={SYSTEM: HELLO})
    assert await _next(file, FakeExpressions(silent=True), budget=60) == HELLO


async def test_a_budget_that_ends_sooner_is_kept(file: Path) -> None:
    await _seen(file, phase=SUCCEEDED, results={SYSTEM: HELLO})
    with pytest.raises(CknixError, match="did not answer in time"):
        await _next(file, FakeExpressions(silent=True), budget=0.05)


async def test_an_api_server_that_answers_is_believed(file: Path) -> None:
    await _seen(file, phase=SUCCEEDED, results={SYSTEM: HELLO})
    expressions = FakeExpressions()
    await expressions.put(expression(phase=SUCCEEDED, results={SYSTEM: OTHER}))
    assert await _next(file, expressions) == OTHER
    assert await _next(file, FakeExpressions(failure=AWAY)) == OTHER
    await expressions.put(expression(phase=FAILED, message="broken"))
    with pytest.raises(CknixError, match="broken"):
        await _next(file, expressions)


async def test_an_expression_that_is_gone_is_forgotten(file: Path) -> None:
    await _seen(file, phase=SUCCEEDED, results={SYSTEM: HELLO})
    with pytest.raises(NotFound):
        await _next(file, FakeExpressions())
    with pytest.raises(CknixError) as raised:
        await _next(file, FakeExpressions(failure=AWAY))
    assert raised.value is AWAY


async def test_the_same_name_in_another_namespace_is_another_expression(file: Path) -> None:
    await _seen(file, phase=SUCCEEDED, results={SYSTEM: HELLO})
    results = RememberedResults(file, SYSTEM)
    async with results.kept():
        assert results.get(FromExpression("other", "hello")) is None
        assert results.get(EXPRESSION) == HELLO


async def test_results_are_of_one_system(file: Path) -> None:
    await _seen(file, phase=SUCCEEDED, results={SYSTEM: HELLO})
    with pytest.raises(CknixError):
        await _next(file, FakeExpressions(failure=AWAY), system="aarch64-linux")


async def test_a_result_is_in_the_file_as_soon_as_it_is_known_and_for_root_alone(file: Path) -> None:
    results = RememberedResults(file, SYSTEM)
    expressions = FakeExpressions()
    await expressions.put(expression(phase=RUNNING))
    async with results.kept():
        waiting = asyncio.create_task(Resolver(SYSTEM, expressions, results).resolve(EXPRESSION, budget=10))
        await expressions.watched()
        await expressions.put(expression(phase=SUCCEEDED, results={SYSTEM: HELLO}))
        await waiting
        async with asyncio.timeout(10):
            while not file.exists():
                await asyncio.sleep(0.002)
        content = json.loads(file.read_text())
        assert content == {"version": 1, "system": SYSTEM, "results": {"default/hello": str(HELLO)}}
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        before = file.stat()
        await Resolver(SYSTEM, expressions, results).resolve(EXPRESSION, budget=10)
    assert file.stat().st_ino == before.st_ino  # written only when something has changed


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"version": 2, "system": "x86_64-linux", "results": {"default/hello": "/nix/store/x"}}',
        '{"version": 1, "system": "x86_64-linux", "results": {"default/hello": "/nix/store/x"}}',
        '{"version": 1, "system": "x86_64-linux", "results": ["default/hello"]}',
        '{"version": 1, "system": "x86_64-linux", "results": 3}',
    ],
)
async def test_a_file_that_cannot_be_used_is_as_good_as_none(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(CknixError) as raised:
        await _next(file, FakeExpressions(failure=AWAY))
    assert raised.value is AWAY


async def test_a_file_that_cannot_be_written_disturbs_nobody(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.write_text("no directory")
    await _seen(file, phase=SUCCEEDED, results={SYSTEM: HELLO})
    assert "cannot be written" in caplog.text


async def test_the_file_does_not_grow_for_ever(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MOST", 3)
    results = RememberedResults(file, SYSTEM)
    async with results.kept():
        for number in range(5):
            results.keep(FromExpression("default", f"e{number}"), HELLO)
    assert list(json.loads(file.read_text())["results"]) == ["default/e2", "default/e3", "default/e4"]
