"""The cluster that the tests of this rung share: two nodes, our image on both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import driver
from tests.cluster.harness import Cluster
from tests.cluster.harness.__main__ import standard_images
from tests.cluster.harness.components import build_components
from tests.cluster.harness.requirements import missing


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what is not built yet before any test's time starts to run."""
    wanted = any("cluster_images" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly and not missing():
        build_components()


@pytest.fixture(scope="session")
def cluster_machine() -> None:
    """A machine that can run a cluster.  Elsewhere these tests are skipped, by name; in CI that is a failure."""
    if reasons := missing():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no test cluster here: {'; '.join(reasons)}")


@pytest.fixture(scope="session")
def cluster_images(cluster_machine: None) -> list[Path]:
    """Archives of the images that tests use, ours built from the tree as it is."""
    return standard_images()


@pytest.fixture(scope="session")
def cluster(cluster_images: list[Path]) -> Iterator[Cluster]:
    """A running cluster; what a test makes in it, it removes."""
    with Cluster(nodes=2, images=cluster_images) as running:
        yield running


@pytest.fixture(scope="session")
def installed(cluster: Cluster) -> Cluster:
    """The cluster with cknix on it: the manifests applied to it as they are, once, as the README says."""
    cluster.kubectl("apply", "-f", str(driver.MANIFESTS))
    driver.rolled_out(cluster)
    return cluster


@pytest.fixture
def applied(cluster: Cluster) -> Iterator[driver.Apply]:
    """Applies manifests to the cluster, and deletes them when the test ends."""
    manifests: list[str] = []

    def apply(manifest: str) -> None:
        manifests.append(manifest)
        cluster.apply(manifest)

    yield apply
    for manifest in reversed(manifests):
        cluster.delete(manifest)
