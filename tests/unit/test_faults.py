"""The list of faults in docs/faults.md is whole, and what it points at is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAULTS = 66
TEST = re.compile(r"`(tests/[a-z_/0-9]+\.py)::(test_[a-z_0-9]+)`")


def rows() -> list[tuple[int, str, str]]:
    """Number, fault and evidence."""
    found = []
    for line in (REPOSITORY / "docs/faults.md").read_text().splitlines():
        if re.match(r"\| \d+ \|", line):
            number, fault, evidence = (cell.strip() for cell in line.strip("|").split("|"))
            found.append((int(number), fault, evidence))
    return found


def test_every_fault_is_listed_once_and_in_order() -> None:
    assert [number for number, _, _ in rows()] == list(range(1, FAULTS + 1))
    assert len({fault for _, fault, _ in rows()}) == FAULTS


@pytest.mark.parametrize(("number", "evidence"), [(number, evidence) for number, _, evidence in rows()])
def test_what_is_named_as_evidence_exists(number: int, evidence: str) -> None:
    tests = TEST.findall(evidence)
    assert tests or evidence.startswith("Cannot happen: "), number
    assert evidence.count("::") == len(tests), "each is written so that it can be found"
    for file, name in tests:
        tree = ast.parse((REPOSITORY / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, f"{file} has no {name}"
