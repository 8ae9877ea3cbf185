"""The Expression resource: the rules of its spec, and what is read of its status."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.errors import Invalid
from cknix_csi.api.expression import Data, Observed, Spec, parse_manifest
from cknix_csi.api.storepath import StorePath

HELLO = "/nix/store/6c1vlf6kyyl0x5cjdhvr3bymgxa74fjb-hello"
DATA = {"data": {"expr": "1"}}


def problems(spec: Any) -> list[str]:
    with pytest.raises(Invalid) as caught:
        Spec.parse(spec)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    "data", [("expr", "1"), ("expr", "x" * 131_072), ("flakeRef", "github:a/b#c"), ("storePath", HELLO)]
)
def test_each_kind_of_source_is_read(data: tuple[str, str]) -> None:
    assert Spec.parse({"data": dict([data])}) == Spec(Data(*data), (), 3, None)


def test_every_field_is_read() -> None:
    spec = {**DATA, "systems": ["aarch64-linux", "x86_64-linux"], "historyLimit": 64, "refresh": "1h30m"}
    assert Spec.parse(spec) == Spec(Data("expr", "1"), ("aarch64-linux", "x86_64-linux"), 64, 5400)


def test_null_is_as_good_as_absent() -> None:
    assert Spec.parse({**DATA, "systems": None, "historyLimit": None, "refresh": None}) == Spec(Data("expr", "1"))


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({}, "spec.data: is required: an object with exactly one of expr, flakeRef, storePath"),
        ({"data": "1"}, "spec.data: is required: an object with exactly one of expr, flakeRef, storePath"),
        ({"data": {}}, "spec.data: needs exactly one of expr, flakeRef, storePath; found none"),
        (
            {"data": {"storePath": HELLO, "expr": "1"}},
            "spec.data: needs exactly one of expr, flakeRef, storePath; found expr and storePath",
        ),
        ({"data": {"expr": ""}}, "spec.data.expr: must be text that is not blank and holds no NUL"),
        ({"data": {"expr": "\n "}}, "spec.data.expr: must be text that is not blank and holds no NUL"),
        ({"data": {"expr": "a\0b"}}, "spec.data.expr: must be text that is not blank and holds no NUL"),
        ({"data": {"expr": 1}}, "spec.data.expr: must be text that is not blank and holds no NUL"),
        ({"data": {"expr": "x" * 131_073}}, "spec.data.expr: is 131073 characters long, the limit is 131072"),
        ({"data": {"flakeRef": "x" * 2049}}, "spec.data.flakeRef: is 2049 characters long, the limit is 2048"),
        (
            {"data": {"flakeRef": "--version"}},
            "spec.data.flakeRef: '--version' is not a flake reference: it may not hold spaces or "
            "control characters, nor begin with '-'",
        ),
        (
            {"data": {"flakeRef": "a b"}},
            "spec.data.flakeRef: 'a b' is not a flake reference: it may not hold spaces or "
            "control characters, nor begin with '-'",
        ),
        (
            {"data": {"storePath": f"{HELLO}.drv"}},
            f"spec.data.storePath: {HELLO}.drv is a derivation; name its output path instead",
        ),
        (
            {"data": {"storePath": f"{HELLO}/bin"}},
            f"spec.data.storePath: '{HELLO}/bin' is not a store path: it names something inside a store path; "
            f"use {HELLO}",
        ),
        (
            {"data": {"expr": "1", "url": "x"}},
            "spec.data.url: is not a known field; known are expr, flakeRef, storePath",
        ),
        ({**DATA, "system": "x"}, 'spec.system: is not a known field; did you mean "systems"?'),
        ({**DATA, "HistoryLimit": 1}, 'spec.HistoryLimit: is not a known field; did you mean "historyLimit"?'),
        ({**DATA, "zzz": "x"}, "spec.zzz: is not a known field; known are data, systems, historyLimit, refresh"),
        ({**DATA, "systems": "x86_64-linux"}, "spec.systems: must be a list of system names"),
        ({**DATA, "systems": [1]}, "spec.systems: must be a list of system names"),
        ({**DATA, "systems": ["x86_64-linux"] * 2}, "spec.systems: names a system twice"),
        ({**DATA, "historyLimit": 0}, "spec.historyLimit: is 0; it must be 1 to 64"),
        ({**DATA, "historyLimit": 65}, "spec.historyLimit: is 65; it must be 1 to 64"),
        ({**DATA, "historyLimit": True}, "spec.historyLimit: is True; it must be 1 to 64"),
        ({**DATA, "historyLimit": "3"}, "spec.historyLimit: is '3'; it must be 1 to 64"),
        ({**DATA, "refresh": "soon"}, "spec.refresh: 'soon' is not a duration; write for example 15m, 1h or 1h30m"),
        ({**DATA, "refresh": ""}, "spec.refresh: '' is not a duration; write for example 15m, 1h or 1h30m"),
        ({**DATA, "refresh": 3600}, "spec.refresh: 3600 is not a duration; write for example 15m, 1h or 1h30m"),
        ({**DATA, "refresh": "366d"}, "spec.refresh: is 366d; the longest is 365d"),
        ({**DATA, "refresh": "59s"}, "spec.refresh: is 59s; the shortest is 60s"),
    ],
)
def test_a_bad_field_is_refused_with_its_reason(spec: dict[str, Any], problem: str) -> None:
    assert problems(spec) == [problem]


def test_an_unknown_system_is_told_with_its_place() -> None:
    [problem] = problems({**DATA, "systems": ["x86_64-linux", "x86_64-darwin"]})
    assert problem.startswith("spec.systems[1]: 'x86_64-darwin' is not known; known are x86_64-linux, ")


def test_every_problem_is_told_at_once() -> None:
    spec = {"data": {"flakeRef": "-x"}, "systems": ["a"], "historyLimit": 0, "refresh": "1s", "more": 1}
    assert [problem.split(":")[0] for problem in problems(spec)] == [
        "spec.more",
        "spec.data.flakeRef",
        "spec.systems[0]",
        "spec.historyLimit",
        "spec.refresh",
    ]


def test_a_manifest_is_read_as_its_spec() -> None:
    manifest = {"apiVersion": "cknix.cool/v1", "kind": "Expression", "metadata": {"name": "x"}, "spec": DATA}
    assert parse_manifest(manifest) == Spec(Data("expr", "1"))


@pytest.mark.parametrize("manifest", [None, [], "x", 1])
def test_what_is_no_object_is_refused(manifest: Any) -> None:
    with pytest.raises(Invalid, match="document: is not a Kubernetes object"):
        parse_manifest(manifest)


def test_a_manifest_of_another_kind_is_told_everything_at_once() -> None:
    with pytest.raises(Invalid) as caught:
        parse_manifest({"apiVersion": "v1", "kind": "Pod"})
    assert [str(problem) for problem in caught.value.problems] == [
        "apiVersion: is 'v1', expected 'cknix.cool/v1'",
        "kind: is 'Pod', expected 'Expression'",
        "spec: is missing",
    ]


def body(**status: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "shop", "name": "hello", "uid": "u", "generation": 4}, "status": status}


def test_a_status_is_read() -> None:
    seen = Observed.parse(
        body(
            observedGeneration=3,
            phase="Running",
            message="m",
            results=[{"system": "x86_64-linux", "path": HELLO}],
            conditions=[{"type": "Ready", "status": "True"}],
        )
    )
    results = {"x86_64-linux": StorePath.parse(HELLO)}
    assert seen == Observed("shop", "hello", "u", 4, 3, "Running", "m", results, ready=True)
    assert str(seen) == "shop/hello"


def test_a_new_object_is_pending() -> None:
    seen = Observed.parse({"metadata": {"namespace": "shop", "name": "hello", "uid": "u", "generation": 1}})
    assert seen == Observed("shop", "hello", "u", 1, 0, "Pending", "", {}, ready=False)


def test_good_results_survive_beside_bad_ones() -> None:
    bad: list[Any] = [None, 1, {}, {"system": "x"}, {"system": "y", "path": "no"}, {"path": HELLO}, [HELLO]]
    seen = Observed.parse(body(results=[*bad, {"system": "x86_64-linux", "path": HELLO}]))
    assert seen.results == {"x86_64-linux": StorePath.parse(HELLO)}


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = ["namespace", "name", "uid", "generation", "observedGeneration", "phase", "message", "results", "conditions"]
objects = st.dictionaries(st.sampled_from(fields), json)


@given(st.fixed_dictionaries({}, optional={"metadata": objects | json, "status": objects | json}))
def test_any_object_can_be_read(anything: dict[str, Any]) -> None:
    seen = Observed.parse(anything)
    assert not seen.results
    assert not seen.ready
