"""The rights of the controller and of the nodes: from yaml/20-rbac.yaml, so that what is tested is what is installed."""

from __future__ import annotations

import json
from typing import Any

from tests.api.server import DRIVER_NAMESPACE, REPOSITORY, Server

MANIFEST = REPOSITORY / "yaml/20-rbac.yaml"
CONTROLLER = "cknix-controller"
NODE = "cknix-node"

_API = "rbac.authorization.k8s.io"


def install(server: Server) -> None:
    """Namespace, CRD and rights, as ``kubectl apply -f yaml/`` would."""
    for name in ("00-namespace.yaml", "10-crd.yaml"):
        server.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "yaml" / name))
    if MANIFEST.exists():
        server.kubectl("apply", "--server-side", "-f", str(MANIFEST))
    else:
        objects = {"apiVersion": "v1", "kind": "List", "items": _objects()}
        server.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(objects))
    server.kubectl("wait", "--for=condition=Established", "crd/expressions.cknix.cool", "--timeout=30s")


def token(server: Server, account: str) -> str:
    return server.kubectl("create", "token", account, "-n", DRIVER_NAMESPACE).strip()


def _rule(group: str, resources: list[str], verbs: list[str], names: list[str] | None = None) -> dict[str, Any]:
    rule: dict[str, Any] = {"apiGroups": [group], "resources": resources, "verbs": verbs}
    return {**rule, "resourceNames": names} if names else rule


CONTROLLER_CLUSTER_RULES = [
    _rule("cknix.cool", ["expressions"], ["get", "list", "watch", "patch"]),
    _rule("cknix.cool", ["expressions/status"], ["patch"]),
    _rule("apiextensions.k8s.io", ["customresourcedefinitions"], ["list", "watch"]),
    _rule("", ["nodes"], ["list"]),
    _rule("", ["events"], ["create", "get", "patch"]),
]
CONTROLLER_RULES = [
    _rule("", ["secrets"], ["create"]),
    _rule("", ["secrets"], ["get"], ["cknix-cache-key"]),
    _rule("", ["configmaps"], ["create", "patch"], ["cknix-cache"]),
]
NODE_CLUSTER_RULES = [_rule("cknix.cool", ["expressions"], ["get", "list", "watch"])]
NODE_RULES = [_rule("", ["configmaps"], ["get"], ["cknix-cache"])]


def _objects() -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = []
    for account, cluster_rules, rules in (
        (CONTROLLER, CONTROLLER_CLUSTER_RULES, CONTROLLER_RULES),
        (NODE, NODE_CLUSTER_RULES, NODE_RULES),
    ):
        local = {"name": account, "namespace": DRIVER_NAMESPACE}
        subjects = [{"kind": "ServiceAccount", **local}]
        role = {"apiGroup": _API, "name": account}
        objects += [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": local},
            {"apiVersion": f"{_API}/v1", "kind": "ClusterRole", "metadata": {"name": account}, "rules": cluster_rules},
            {
                "apiVersion": f"{_API}/v1",
                "kind": "ClusterRoleBinding",
                "metadata": {"name": account},
                "roleRef": {**role, "kind": "ClusterRole"},
                "subjects": subjects,
            },
            {"apiVersion": f"{_API}/v1", "kind": "Role", "metadata": local, "rules": rules},
            {
                "apiVersion": f"{_API}/v1",
                "kind": "RoleBinding",
                "metadata": local,
                "roleRef": {**role, "kind": "Role"},
                "subjects": subjects,
            },
        ]
    return objects
