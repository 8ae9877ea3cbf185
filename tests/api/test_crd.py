"""The CRD on a real API server, on the table that ``Spec.parse`` is tested with as well (tests/unit/test_crd.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cknix_csi.api.expression import API_VERSION, KIND
from cknix_csi.kube.api import ApiError, Json, expressions
from cknix_csi.kube.client import KubernetesApi
from tests.api.conftest import Expressions
from tests.api.server import Server
from tests.api.table import BAD, GOOD, Bad, Good


async def dry_run(api: KubernetesApi, spec: Any) -> Json:
    """What the API server would store; as strict about unknown fields as kubectl."""
    body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "dry", "namespace": "default"}, "spec": spec}
    return await api.create(expressions("default"), body, query={"dryRun": "All", "fieldValidation": "Strict"})


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
async def test_a_good_spec_is_accepted(api: KubernetesApi, case: Good) -> None:
    await dry_run(api, case.spec)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
async def test_a_bad_spec_is_refused_and_the_field_named(api: KubernetesApi, case: Bad) -> None:
    with pytest.raises(ApiError) as refusal:
        await dry_run(api, case.spec)
    assert refusal.value.status in {400, 422}, refusal.value
    assert case.field.removeprefix("spec.") in refusal.value.message


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('spce: {data: {expr: "1"}}', 'unknown field "spce"'),
        ('spec: {data: {expr: "1"}}\nstatsu: {}', 'unknown field "statsu"'),
        ('spec: {dta: {expr: "1"}}', 'unknown field "spec.dta"'),
        ('spec: {data: {exprs: "1"}}', 'unknown field "spec.data.exprs"'),
        ('spec: {data: {expr: "1"}, refesh: 1h}', 'unknown field "spec.refesh"'),
        ("", "spec: Required value"),
        ("spec: {}", "spec.data: Required value"),
        ("spec: {data: {}}", 'spec.data: Invalid value: "object": needs exactly one of expr, flakeRef, storePath'),
    ],
)
def test_kubectl_apply_names_what_is_misspelt_or_missing(server: Server, text: str, field: str) -> None:
    manifest = f"apiVersion: cknix.cool/v1\nkind: Expression\nmetadata: {{name: a}}\n{text}\n"
    with pytest.raises(AssertionError) as refusal:
        server.kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifest)
    assert field in str(refusal.value)


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        *(
            ({"data": {"expr": "1"}, "refresh": refresh}, "spec.refresh:", "is not a duration; write for example 90s,")
            for refresh in ("24hours", "daily", "1h 30m")
        ),
        *(
            ({"data": {"storePath": path}}, "spec.data.storePath:", "is not a store path; write /nix/store/, a hash of")
            for path in ("hello", "/nix/store/hello", "/nix/store/7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb-hello/bin/hello")
        ),
    ],
)
async def test_what_is_malformed_is_refused_for_that_alone_and_in_words(
    api: KubernetesApi, spec: Any, field: str, words: str
) -> None:
    with pytest.raises(ApiError) as refusal:
        await dry_run(api, spec)
    assert refusal.value.message.count(field) == 1, refusal.value.message
    assert words in refusal.value.message
    assert "should match" not in refusal.value.message


async def test_the_history_has_a_default(api: KubernetesApi) -> None:
    assert (await dry_run(api, {"data": {"expr": "1"}}))["spec"]["historyLimit"] == 3


async def test_a_user_cannot_write_the_status_along_with_the_spec(expr: Expressions) -> None:
    await expr.create("a", "1")
    status = '{"status":{"phase":"Failed"}}'
    expr.server.kubectl("patch", "expr", "a", "-n", expr.namespace, "--type=merge", "-p", status)
    assert await expr.status("a") == {}


async def test_kubectl_get_shows_phase_result_and_age(expr: Expressions) -> None:
    await expr.create("hello", "1")
    status = {"phase": "Succeeded", "result": "/nix/store/abc-hello", "message": "4 paths"}
    status_json = json.dumps({"status": status})
    kubectl = expr.server.kubectl
    kubectl("patch", "expr", "hello", "-n", expr.namespace, "--subresource=status", "--type=merge", "-p", status_json)
    header, row = kubectl("get", "expr", "-n", expr.namespace).splitlines()
    assert header.split() == ["NAME", "PHASE", "RESULT", "AGE"]
    assert row.split()[:3] == ["hello", "Succeeded", "/nix/store/abc-hello"]
    wide = kubectl("get", "kx", "-n", expr.namespace, "-o", "wide").splitlines()[0]
    assert wide.split() == ["NAME", "PHASE", "RESULT", "AGE", "READY", "MESSAGE"]
    assert "hello" in kubectl("get", "cknix", "-n", expr.namespace)


@pytest.mark.parametrize("field", ["spec.data.expr", "spec.systems", "spec.refresh", "status.conditions.reason"])
def test_kubectl_explain_teaches(server: Server, field: str) -> None:
    text = server.kubectl("explain", f"expr.{field}")
    assert "DESCRIPTION:" in text
    assert "<empty>" not in text
