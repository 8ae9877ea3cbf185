"""The table of failures is the only place that says a code, and everything that can be raised is in it."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from grpclib.const import Status

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Code, Situation, Told
from cknix_csi.csi.errors import grpc_error, status_of

REPOSITORY = Path(__file__).parents[2]
SOURCES = sorted(path for path in (REPOSITORY / "cknix_csi").rglob("*.py") if not path.match("proto/*.py"))
TABLE = REPOSITORY / "cknix_csi/api/situations.py"
TO_GRPC = REPOSITORY / "cknix_csi/csi/errors.py"

# pkg/volume/csi/csi_client.go, isFinalError: after these kubelet does not know whether the volume is mounted.
UNCERTAIN = {
    Status.CANCELLED,
    Status.DEADLINE_EXCEEDED,
    Status.UNAVAILABLE,
    Status.RESOURCE_EXHAUSTED,
    Status.ABORTED,
}


@functools.cache
def nodes() -> list[tuple[Path, ast.AST]]:
    return [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]


def errors() -> dict[str, ast.ClassDef]:
    """Every class of failures in the program, by its name."""
    classes = {node.name: node for _, node in nodes() if isinstance(node, ast.ClassDef)}
    found: dict[str, ast.ClassDef] = {}
    while more := {
        name: node
        for name, node in classes.items()
        if name not in found
        and any(isinstance(base, ast.Name) and base.id in {"CknixError", *found} for base in node.bases)
    }:
        found |= more
    return found


ALL = errors()


def members(node: ast.AST) -> set[str]:
    """The situations that *node* names."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "Situation"
    }


def test_every_reason_is_there_once_and_in_camel_case() -> None:
    reasons = [each.reason for each in Situation]
    assert len(set(reasons)) == len(reasons)
    for each in Situation:
        assert re.fullmatch(r"([A-Z][a-z]+)+", each.reason)
        assert each.name == re.sub(r"(?<!^)(?=[A-Z])", "_", each.reason).upper()
        assert each.meaning
        assert each.remedy
        assert each.told


@pytest.mark.parametrize("situation", Situation)
def test_a_code_is_transient_exactly_where_kubelet_stays_uncertain(situation: Situation) -> None:
    assert (status_of(situation.code) in UNCERTAIN) is situation.code.transient


@pytest.mark.parametrize("situation", Situation)
def test_what_is_raised_has_the_code_and_reason_of_its_situation(situation: Situation) -> None:
    error = CknixError("why", situation)
    assert (error.code, error.reason) == (situation.code, situation.reason)
    assert grpc_error(error).status.name == situation.code.value


def test_what_an_event_tells_while_a_call_waits_goes_on_after_the_call() -> None:
    waiting = [each for each in Situation if Told.WAITING in each.told]
    assert waiting
    assert {each.code for each in waiting} == {Code.ABORTED}


@pytest.mark.parametrize("name", ALL)
def test_a_class_of_failures_has_its_code_from_the_table(name: str) -> None:
    body = [each for each in ALL[name].body if not isinstance(each, ast.FunctionDef)]
    names = [each for statement in body for each in ast.walk(statement) if isinstance(each, ast.Name)]
    assert not {each.id for each in names if isinstance(each.ctx, ast.Store)} & {"code", "reason"}


def test_no_other_place_says_a_code() -> None:
    for path, node in nodes():
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "Code" or path == TABLE, f"{path}:{node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "GRPCError":
            assert path == TO_GRPC, f"{path}:{node.lineno}"


def test_every_situation_that_is_named_is_in_the_table_and_every_one_of_the_table_is_raised() -> None:
    named: set[str] = set()
    for path, node in nodes():
        if path != TABLE and isinstance(node, ast.Module):
            named |= members(node)
    assert named == {each.name for each in Situation}


def test_every_failure_that_is_made_is_of_a_class_or_a_situation_that_is_known() -> None:
    made = 0
    for path, node in nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"CknixError", *ALL}:
            made += 1
            words = {keyword.arg for keyword in node.keywords}
            assert not words & {"code", "reason"}, f"{path}:{node.lineno} says a code by itself"
    assert made > 100


WHERE = {
    Told.POD: "pod",
    Told.WAITING: "pod, while it waits",
    Told.EXPRESSION: "Expression",
    Told.CLAIM: "claim",
    Told.LOG: "log",
}


def row(situation: Situation) -> str:
    """As it stands in docs/errors.md."""
    after = "maybe mounted" if situation.code.transient else "not mounted"
    places = ", ".join(words for told, words in WHERE.items() if told in situation.told)
    cells = (f"`{situation.reason}`", f"`{situation.code.value}`", after, places, situation.meaning, situation.remedy)
    return f"| {' | '.join(cells)} |"


def test_the_table_for_users_is_the_programs() -> None:
    lines = (REPOSITORY / "docs/errors.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `")] == [row(each) for each in Situation]
