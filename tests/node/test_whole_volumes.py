"""The whole daemon mounts closures: fetched by real Nix from a signed cache, run from, and gone without a trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import nixes
from tests.node.conftest import NewNode
from tests.node.whole import Cluster, Source, WholeNode, require_exactly


@pytest.fixture(params=nixes.selected(), ids=nixes.name_of)
def any_nix(request: pytest.FixtureRequest, new_node: NewNode) -> Iterator[WholeNode]:
    """A new node with each supported Nix."""
    with new_node(request.param.name) as node:
        yield node


async def test_volumes_show_exactly_their_closures_run_and_leave_nothing(
    any_nix: WholeNode, cluster: Cluster, source: Source
) -> None:
    node = any_nix
    await cluster.apply("hello")
    await cluster.report("hello", "Succeeded", x86_64_linux=source.hello)
    node.daemon = node.spawn()
    await node.registered()
    read_only = await node.publish("ro", expression="hello")
    writable = await node.publish("rw", writable=True, storePath=source.toolbox)
    by_system = await node.publish("sys", **{"x86_64-linux": source.wide, "aarch64-linux": source.file})
    require_exactly(read_only, source, source.hello)
    require_exactly(writable, source, source.toolbox)
    require_exactly(by_system, source, source.wide)
    assert f"Hello from {source.hello}:" in node.run_in("ro", "/nix/var/result/bin/hello")
    assert f"Hello from {source.hello}:" in node.run_in("rw", "hello")
    for volume in ("ro", "rw", "sys"):
        await node.unpublish(volume)
    await node.left_nothing()
    assert node.terminate() == 0
