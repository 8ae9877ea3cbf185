"""What the manifests must never hold, whatever else changes in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cknix_csi import __version__
from cknix_csi.privileges import CONTROLLER_KEEPS

MANIFESTS = sorted((Path(__file__).parents[2] / "yaml").glob("*.yaml"))


def workloads() -> list[dict[str, Any]]:
    found = [body for file in MANIFESTS for body in yaml.safe_load_all(file.read_text()) if body]
    return [body for body in found if "selector" in body.get("spec", {}) and "template" in body["spec"]]


def test_a_selector_holds_nothing_that_an_upgrade_changes() -> None:
    """It is immutable: `kubectl apply` of the next version would be refused."""
    assert {body["kind"] for body in workloads()} == {"Deployment", "DaemonSet"}
    for body in workloads():
        selector = body["spec"]["selector"]["matchLabels"]
        assert set(selector) == {"app.kubernetes.io/name", "app.kubernetes.io/component"}
        assert not any(__version__ in value or re.search(r"[0-9]", value) for value in selector.values())
        labels = body["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()


def test_no_two_selectors_of_one_kind_choose_the_same_pods() -> None:
    selectors = [tuple(sorted(body["spec"]["selector"]["matchLabels"].items())) for body in workloads()]
    assert len(set(selectors)) == len(selectors)


def test_containers_have_no_more_than_they_need() -> None:
    """Only the node is privileged, which Bidirectional mounts need; the controller has what it keeps, and nobody writes
    to its own image."""
    seen = {}
    for body in workloads():
        for container in body["spec"]["template"]["spec"]["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, container["name"]
            if context.get("privileged"):
                seen[container["name"]] = ["privileged"]
            else:
                assert context["capabilities"]["drop"] == ["ALL"]
                seen[container["name"]] = context["capabilities"].get("add", [])
    assert seen.pop("node") == ["privileged"]
    assert seen.pop("controller") == sorted(capability.name for capability in CONTROLLER_KEEPS)
    assert {name: powers for name, powers in seen.items() if powers} == {}


def test_no_two_objects_have_one_name() -> None:
    found = [body for file in MANIFESTS for body in yaml.safe_load_all(file.read_text()) if body]
    names = [
        (body["apiVersion"], body["kind"], body["metadata"].get("namespace"), body["metadata"]["name"])
        for body in found
    ]
    assert len(names) > 10
    assert sorted(map(str, set(names))) == sorted(map(str, names))
    for body in workloads():
        containers = body["spec"]["template"]["spec"]["containers"]
        for container in containers:
            variables = [variable["name"] for variable in container.get("env", [])]
            assert len(set(variables)) == len(variables)
