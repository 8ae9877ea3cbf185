"""From what a volume asks for to a store path, within a budget."""

import asyncio
import time

import pytest

from cknix_csi.api.attributes import FromExpression, FromSource, FromStorePath
from cknix_csi.api.errors import CacheUnavailable, CknixError, InProgress, NotFound, OtherCacheUnavailable
from cknix_csi.api.expression import FAILED, RUNNING, SUCCEEDED
from cknix_csi.api.situations import Code, Situation
from cknix_csi.csi.resolve import Resolver, nowhere
from tests.node.fakes import HELLO, SYSTEM, FakeExpressions, expression

HELLO_EXPRESSION = FromExpression("default", "hello")


async def test_a_store_path_asks_nobody() -> None:
    assert await Resolver(SYSTEM, None).resolve(FromStorePath(HELLO), budget=0) == HELLO


async def test_an_expression_with_a_result_resolves_without_waiting() -> None:
    expressions = FakeExpressions()
    await expressions.put(expression(phase=SUCCEEDED, results={SYSTEM: HELLO}))
    assert await Resolver(SYSTEM, expressions).resolve(HELLO_EXPRESSION, budget=0) == HELLO


async def test_a_result_that_appears_ends_the_wait_at_once() -> None:
    expressions = FakeExpressions()
    await expressions.put(expression(phase=RUNNING))
    waiting = asyncio.create_task(Resolver(SYSTEM, expressions).resolve(HELLO_EXPRESSION, budget=60))
    await expressions.watched()
    await expressions.put(expression(phase=RUNNING, message="1 of 2"))
    await expressions.watched()
    appeared = time.monotonic()
    await expressions.put(expression(phase=SUCCEEDED, results={SYSTEM: HELLO}))
    assert await waiting == HELLO
    assert time.monotonic() - appeared < 1


async def test_a_failure_that_appears_ends_the_wait() -> None:
    expressions = FakeExpressions()
    await expressions.put(expression(phase=RUNNING))
    waiting = asyncio.create_task(Resolver(SYSTEM, expressions).resolve(HELLO_EXPRESSION, budget=60))
    await expressions.watched()
    await expressions.put(expression(phase=FAILED, message="attribute 'helo' missing"))
    with pytest.raises(CknixError, match="attribute 'helo' missing") as raised:
        await waiting
    assert raised.value.code is Code.FAILED_PRECONDITION


def test_that_the_cache_has_lost_a_result_is_said_to_who_has_named_the_expression() -> None:
    lost = NotFound("no cache has it", Situation.PATH_NOT_FOUND)
    told = nowhere(HELLO_EXPRESSION, HELLO, lost)
    assert told.situation is Situation.RESULT_LOST
    assert str(HELLO) in told.message
    assert "`kubectl -n default describe expr hello` tells" in told.message
    # Another cache may have it: this is tried again, and says the same.
    unsure = OtherCacheUnavailable("http://cache does not have it, and another cache could not be asked: no route")
    told = nowhere(HELLO_EXPRESSION, HELLO, unsure)
    assert told.situation is unsure.situation
    assert told.message.startswith(f"{unsure.message}; `kubectl -n default describe expr hello` tells")


def test_nothing_is_added_where_nothing_is_known_to_be_lost_or_no_expression_was_named() -> None:
    away = CacheUnavailable("http://cache could not deliver it: no route")
    assert nowhere(HELLO_EXPRESSION, HELLO, away) is away
    lost = NotFound("http://cache does not have it", Situation.PATH_NOT_FOUND)
    assert nowhere(FromStorePath(HELLO), HELLO, lost) is lost


async def test_when_the_budget_ends_the_answer_says_how_far_the_build_is() -> None:
    expressions = FakeExpressions()
    await expressions.put(expression(phase=RUNNING, message="building 14 of 31 (python3-3.12)", generation=2))
    with pytest.raises(InProgress) as raised:
        await Resolver(SYSTEM, expressions).resolve(HELLO_EXPRESSION, budget=0.05)
    assert raised.value.message == (
        "Expression default/hello has no result yet (generation 2, Running): building 14 of 31 (python3-3.12); "
        "kubelet will retry"
    )


@pytest.mark.parametrize("deleted_while_waiting", [False, True])
async def test_an_expression_that_does_not_exist_is_named(deleted_while_waiting: bool) -> None:
    expressions = FakeExpressions()
    if deleted_while_waiting:
        await expressions.put(expression(phase=RUNNING))
    waiting = asyncio.create_task(Resolver(SYSTEM, expressions).resolve(HELLO_EXPRESSION, budget=60))
    if deleted_while_waiting:
        await expressions.watched()
        await expressions.delete("default", "hello")
    with pytest.raises(NotFound) as raised:
        await waiting
    assert raised.value.message == (
        'Expression "default/hello" does not exist; create it or correct the volume attribute "expression" '
        "(an inline volume cannot name an Expression of another namespace)"
    )


async def test_an_api_server_that_cannot_be_asked_is_passed_on_as_it_is() -> None:
    away = CknixError("connection refused", Situation.KUBERNETES_UNAVAILABLE)
    with pytest.raises(CknixError) as raised:
        await Resolver(SYSTEM, FakeExpressions(failure=away)).resolve(HELLO_EXPRESSION, budget=60)
    assert raised.value is away


async def test_an_api_server_that_does_not_answer_is_unavailable() -> None:
    with pytest.raises(CknixError) as raised:
        await Resolver(SYSTEM, FakeExpressions(silent=True)).resolve(HELLO_EXPRESSION, budget=0.05)
    assert raised.value.code is Code.UNAVAILABLE
    assert raised.value.message == (
        "the API server did not answer in time about Expression default/hello; kubelet will retry"
    )


async def test_without_kubernetes_an_expression_cannot_be_named() -> None:
    with pytest.raises(CknixError, match="runs without Kubernetes") as raised:
        await Resolver(SYSTEM, None).resolve(HELLO_EXPRESSION, budget=60)
    assert raised.value.code is Code.FAILED_PRECONDITION


@pytest.mark.parametrize("kind", ["expr", "flakeRef"])
async def test_nix_text_in_a_volume_is_refused_with_the_remedy(kind: str) -> None:
    with pytest.raises(CknixError) as raised:
        await Resolver(SYSTEM, FakeExpressions()).resolve(FromSource("default", kind, "1 + 1"), budget=60)
    assert raised.value.code is Code.FAILED_PRECONDITION
    assert raised.value.message == (
        f'volume attribute "{kind}": Nix text inside a volume is not evaluated yet; apply an Expression with this text '
        'and name it with the attribute "expression"'
    )
