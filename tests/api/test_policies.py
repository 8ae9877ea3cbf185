"""The examples of yaml/policies are accepted, and refuse what they say they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from cknix_csi.kube.api import ApiError, core
from tests.api.conftest import Expressions, eventually
from tests.api.server import REPOSITORY, Server

ADMISSION = str(REPOSITORY / "yaml/policies/admission.yaml")


@pytest.fixture
def restricted(server: Server, expr: Expressions) -> Iterator[Expressions]:
    """A namespace that the policies are for."""
    server.kubectl("label", "namespace", expr.namespace, "cknix.cool/restricted=true")
    server.kubectl("apply", "-f", ADMISSION)
    yield expr
    server.kubectl("delete", "-f", ADMISSION)


async def test_authors_and_sources_can_be_restricted_by_namespace(restricted: Expressions) -> None:
    async def refused() -> bool:
        try:
            await restricted.create("text", "1")
        except ApiError as error:
            return "only members of the group cknix-authors may write Nix text here" in error.message
        restricted.delete("text")
        await restricted.gone("text")
        return False

    await eventually(refused)  # a policy takes a moment to hold
    await restricted.create("good", {"data": {"flakeRef": "github:example/repo#x"}})
    await restricted.annotate("good", changed="1")
    with pytest.raises(ApiError, match="flakes here come from github:example/"):
        await restricted.create("bad", {"data": {"flakeRef": "github:somebody/else#x"}})

    def pod(**attributes: str) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod", "namespace": restricted.namespace},
            "spec": {
                "automountServiceAccountToken": False,
                "containers": [{"name": "main", "image": "none"}],
                "volumes": [{"name": "nix", "csi": {"driver": "csi.cknix.cool", "volumeAttributes": attributes}}],
            },
        }
        restricted.server.kubectl("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(body))

    # Elsewhere the controller manager, which does not run here, makes it.
    await restricted.api.create(core("serviceaccounts", restricted.namespace), {"metadata": {"name": "default"}})
    pod(expression="good")
    with pytest.raises(AssertionError, match="name an Expression here, and no store path"):
        pod(storePath="/nix/store/00000000000000000000000000000000-x")


def test_the_network_policies_are_accepted(server: Server) -> None:
    server.kubectl("apply", "--dry-run=server", "-f", str(REPOSITORY / "yaml/policies/network.yaml"))
