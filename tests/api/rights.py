"""Rights: which the manifests grant to an account, and which of them its audit events show in use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from tests.api.server import DRIVER_NAMESPACE, REPOSITORY

_MANIFESTS = (REPOSITORY / "yaml/20-rbac.yaml", REPOSITORY / "yaml/55-provisioner.yaml")


@dataclass(frozen=True, order=True, slots=True)
class Right:
    """One verb on one resource."""

    resource: str
    """Plural, with the subresource after a slash."""
    verb: str
    namespace: str = ""
    """Where it holds; empty for everywhere."""
    name: str = ""
    """Of which object; empty for any."""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{f' {self.name}' if self.name else ''}"


def granted(account: str) -> set[Right]:
    """All that the ServiceAccount may do."""
    objects = [body for file in _MANIFESTS for body in yaml.safe_load_all(file.read_text())]
    roles = {(body["kind"], body["metadata"]["name"]): body for body in objects if body["kind"].endswith("Role")}
    found = set()
    for binding in objects:
        subjects = binding.get("subjects", [])
        if {"kind": "ServiceAccount", "name": account, "namespace": DRIVER_NAMESPACE} in subjects:
            role = roles[binding["roleRef"]["kind"], binding["roleRef"]["name"]]
            namespace = binding["metadata"].get("namespace", "")
            for rule in role["rules"]:
                names = rule.get("resourceNames", [""])
                found |= {
                    Right(resource, verb, namespace, name)
                    for resource in rule["resources"]
                    for verb in rule["verbs"]
                    for name in names
                }
    return found


def used(account: str, events: Iterable[dict[str, Any]]) -> set[Right]:
    """What *account* has needed of what it was granted.  Raises AssertionError for a request that was refused.

    Discovery and version, which every account may ask for, are left out.  A patch that is answered 201 needed the right
    to create as well (apiserver/pkg/endpoints/handlers/patch.go), of which audit events do not tell.
    """
    rights = granted(account)
    found: set[Right] = set()
    for event in events:
        if event["user"]["username"] != f"system:serviceaccount:{DRIVER_NAMESPACE}:{account}":
            continue
        asked = event.get("objectRef")
        if asked is None:
            continue
        assert event["annotations"]["authorization.k8s.io/decision"] == "allow", event
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        made = event["verb"] == "patch" and event["responseStatus"]["code"] == 201
        for verb in (event["verb"], "create") if made else (event["verb"],):
            matching = [
                right
                for right in rights
                if (right.resource, right.verb) == (resource, verb)
                and right.namespace in {"", asked.get("namespace", "")}
                and right.name in {"", asked.get("name", "")}
            ]
            assert matching, event
            found.update(matching)
    return found
