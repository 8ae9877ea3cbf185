"""The checklist in docs/conformance.md is whole, what it points at exists, and the manifests say what the code does."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cknix_csi.settings import DRIVER_NAME, node_settings

REPOSITORY = Path(__file__).parents[2]
ITEMS = 90
TEST = re.compile(r"`(tests/[a-z_/0-9]+\.py)::(test_[a-z_0-9]+)`")


def rows() -> list[tuple[int, str, str, str]]:
    """Number, weight, what is owed, and what shows it."""
    found = []
    for line in (REPOSITORY / "docs/conformance.md").read_text().splitlines():
        if re.match(r"\| \d+ \|", line):
            number, weight, owed, evidence = (cell.strip() for cell in line.strip("|").split("|"))
            found.append((int(number), weight, owed, evidence))
    return found


@functools.cache
def functions(file: str) -> set[str]:
    tree = ast.parse((REPOSITORY / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def manifests(kind: str) -> list[dict[str, Any]]:
    documents = [
        document
        for file in sorted((REPOSITORY / "yaml").glob("*.yaml"))
        for document in yaml.safe_load_all(file.read_text())
    ]
    return [document for document in documents if document["kind"] == kind]


def test_every_item_is_listed_once_and_in_order() -> None:
    assert [number for number, _, _, _ in rows()] == list(range(1, ITEMS + 1))
    assert {weight for _, weight, _, _ in rows()} == {"M", "S", "N"}
    assert len({owed for _, _, owed, _ in rows()}) == ITEMS


@pytest.mark.parametrize(("number", "evidence"), [(number, evidence) for number, _, _, evidence in rows()])
def test_what_is_named_as_evidence_exists(number: int, evidence: str) -> None:
    tests = TEST.findall(evidence)
    assert tests or evidence.startswith(("Does not apply", "Not yet", "[")), number
    assert evidence.count("::") == len(tests), "each is written so that it can be found"
    for file, name in tests:
        assert name in functions(file), f"{file} has no {name}"


def test_the_cluster_is_told_what_the_driver_is() -> None:
    [driver] = manifests("CSIDriver")
    assert driver["metadata"]["name"] == DRIVER_NAME
    spec = driver["spec"]
    assert sorted(spec["volumeLifecycleModes"]) == ["Ephemeral", "Persistent"]
    assert spec["podInfoOnMount"] is True  # csi.requests takes the pod's namespace from there
    assert spec["attachRequired"] is False  # there is no ControllerPublishVolume
    # Files that many pods share must never be given other owners, modes or labels.
    assert (spec["fsGroupPolicy"], spec["seLinuxMount"]) == ("None", False)
    assert spec["requiresRepublish"] is False  # a volume never changes once it is published
    assert "tokenRequests" not in spec


def test_only_what_must_be_is_mounted_both_ways() -> None:
    [daemon] = manifests("DaemonSet")
    pod = daemon["spec"]["template"]["spec"]
    [container] = pod["containers"]
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    shared = {mount["name"] for mount in container["volumeMounts"] if mount.get("mountPropagation") == "Bidirectional"}
    environment = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    settings = node_settings({**environment, "KUBE_NODE_NAME": "node-1"})
    assert {paths[name] for name in shared} == {f"{settings.kubelet_root}/pods", str(settings.nix.data_root)}
    # Mounts have one name on the node and in the container: the driver tells kubelet its own.
    for mount in container["volumeMounts"]:
        if mount["name"] in paths:
            assert mount["mountPath"] == paths[mount["name"]]


def test_the_node_daemon_is_looked_after() -> None:
    [daemon] = manifests("DaemonSet")
    assert daemon["spec"]["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    pod = daemon["spec"]["template"]["spec"]
    assert pod["priorityClassName"] == "system-node-critical"
    assert {toleration["operator"] for toleration in pod["tolerations"]} == {"Exists"}
    assert not any("key" in toleration for toleration in pod["tolerations"])
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"}
    [container] = pod["containers"]
    assert {"startupProbe", "livenessProbe"} <= container.keys()
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_namespace_says_what_its_pods_need() -> None:
    levels = {
        each["metadata"]["name"]: each["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
        for each in manifests("Namespace")
    }
    assert levels == {"cknix-system": "privileged", "cknix-volumes": "restricted"}
