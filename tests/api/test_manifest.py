"""What `nix build --file . manifestYAML` makes applies to an empty cluster, whichever Nix made it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import nixes
from tests.api.server import REPOSITORY, Server
from tests.nixes import NixEnv, Suite

IMAGE = "registry.example/cknix-csi:1.2.3"


@pytest.fixture
def empty_cluster() -> Iterator[Server]:
    """etcd and kube-apiserver as they start, without anything of ours."""
    directory = Path(tempfile.mkdtemp(prefix="cknix-empty-"))
    server = Server(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)


def manifest_by(suite: Suite, directory: Path) -> str:
    env = NixEnv(nixes.nix(suite.name), directory / suite.name)
    try:
        link = directory / f"{suite.name}.manifest"
        env.run(
            *("nix", "build", "--file", REPOSITORY, "manifestYAML", "--argstr", "imageRef", IMAGE),
            *("--impure", "--out-link", link),
        )
        return env.physical(str(link.readlink())).read_text()
    finally:
        env.destroy()


def test_the_manifest_applies_to_an_empty_cluster(empty_cluster: Server, tmp_path: Path) -> None:
    # One server for all, since starting it takes longest.
    (manifest,) = {manifest_by(suite, tmp_path) for suite in nixes.selected()}
    empty_cluster.kubectl("apply", "-f", "-", stdin=manifest)

    kinds = ["namespace/cknix-system", "crd/expressions.cknix.cool", "csidriver/csi.cknix.cool"]
    empty_cluster.kubectl("get", *kinds)
    workloads = json.loads(empty_cluster.kubectl("get", "-n", "cknix-system", "deploy,ds", "-o", "json"))["items"]
    images = {item["kind"]: item["spec"]["template"]["spec"]["containers"][0]["image"] for item in workloads}
    assert images == {"Deployment": IMAGE, "DaemonSet": IMAGE}
    again = empty_cluster.kubectl("apply", "-f", "-", stdin=manifest)
    assert {line.split()[-1] for line in again.splitlines()} == {"unchanged"}


def test_every_example_is_accepted(empty_cluster: Server) -> None:
    empty_cluster.kubectl("apply", "-f", str(REPOSITORY / "yaml"))
    # Elsewhere the controller manager, which does not run here, makes it.
    empty_cluster.kubectl("create", "serviceaccount", "default")
    for example in sorted((REPOSITORY / "yaml/test").glob("*.yaml")):
        empty_cluster.kubectl("apply", "--dry-run=server", "-f", str(example))
