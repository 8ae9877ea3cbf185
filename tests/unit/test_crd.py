"""``Spec.parse`` on the table that the API server's CRD is tested with as well (tests/api/test_crd.py)."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import yaml

from cknix_csi.api import durations, expression, storepath, systems
from cknix_csi.api.errors import Invalid
from cknix_csi.api.expression import Spec
from tests.api.table import BAD, GOOD, Bad, Good

CRD = pathlib.Path(__file__).parents[2] / "yaml/10-crd.yaml"


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_a_good_spec_is_read(case: Good) -> None:
    Spec.parse(case.spec)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_a_bad_spec_is_refused_and_the_field_named(case: Bad) -> None:
    with pytest.raises(Invalid) as refusal:
        Spec.parse(case.spec)
    assert any(problem.field.startswith(case.field) for problem in refusal.value.problems), refusal.value


@pytest.fixture(scope="module")
def schema() -> Any:
    crd = yaml.safe_load(CRD.read_text())
    (version,) = crd["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]


def test_every_field_is_described_for_kubectl_explain(schema: Any) -> None:
    def undescribed(node: Any, path: str) -> list[str]:
        found = [] if node.get("description") else [path]
        for name, child in node.get("properties", {}).items():
            found += undescribed(child, f"{path}.{name}")
        return found + (
            undescribed(node["items"], f"{path}[]") if "items" in node and "properties" in node["items"] else []
        )

    missing = [path for path in undescribed(schema, "") if not path.endswith("[]")]
    assert missing == []


def test_everything_of_open_length_is_bounded(schema: Any) -> None:
    bound = {"string": ("maxLength", "enum", "format"), "array": ("maxItems",)}

    def unbounded(node: Any, path: str) -> list[str]:
        wanted = bound.get(node["type"], ())
        found = [path] if wanted and not any(key in node for key in wanted) else []
        for name, child in node.get("properties", {}).items():
            found += unbounded(child, f"{path}.{name}")
        return found + (unbounded(node["items"], f"{path}[]") if "items" in node else [])

    assert [path for part in ("spec", "status") for path in unbounded(schema["properties"][part], part)] == []


def _rule(field: Any) -> str:
    """The first one; a field has no pattern beside it, which would be a second message about the same."""
    assert "pattern" not in field
    return str(field["x-kubernetes-validations"][0]["rule"])


def test_the_crd_and_the_code_write_the_same_limits_and_patterns(schema: Any) -> None:
    spec = schema["properties"]["spec"]["properties"]
    data = spec["data"]["properties"]
    assert set(data) == set(expression.SOURCES)
    assert data["expr"]["maxLength"] == expression.MAX_EXPR
    assert data["expr"]["pattern"] == f"^{expression.EXPR_PATTERN}$"
    assert data["flakeRef"]["maxLength"] == expression.MAX_FLAKE_REF
    assert data["flakeRef"]["pattern"] == f"^{expression.FLAKE_REF_PATTERN}$"
    assert _rule(data["storePath"]) == f"self.matches(r'^{storepath.PATTERN}$')"
    assert spec["systems"]["items"]["enum"] == list(systems.KNOWN_SYSTEMS)
    assert spec["historyLimit"]["default"] == expression.DEFAULT_HISTORY_LIMIT
    assert spec["historyLimit"]["maximum"] == expression.MAX_HISTORY_LIMIT
    assert _rule(spec["refresh"]) == f"self.matches('^{durations.PATTERN}$')"
    assert spec["refresh"]["maxLength"] == expression.MAX_REFRESH_LENGTH
