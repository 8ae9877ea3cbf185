from __future__ import annotations

import pytest

from cknix_csi.nix.cache.signing import generate_key
from tests import nixes
from tests.node.conftest import NewNode
from tests.node.whole import Cluster, Source, WholeNode


@pytest.fixture(params=nixes.selected(), ids=nixes.name_of)
def any_nix(request: pytest.FixtureRequest, new_node: NewNode, cluster):
    with new_node(request.param.name) as node:
        yield node


async def test_x(any_nix: WholeNode, cluster: Cluster, source: Source) -> None:
    node = any_nix
    import time

    await node.start()

    async def show(what, **kw):
        t = time.time()
        r = await node.refused(**kw)
        print("@@@", node.nix.nix.version, what, f"{time.time() - t:.1f}s", r, node.registered_paths(), node.traces())

    cluster.cache.close()
    await show("down", storePath=source.hello)
    cluster.cache.open()
    await show("lacks", storePath="/nix/store/00000000000000000000000000000000-nobody-has-it")
    with source.one_bit_flipped(source.hello + "/bin/hello"):
        await show("flip", storePath=source.hello)
    node.kill()
    await cluster.use_cache(public_key=generate_key("cknix-cache-1").public)
    await node.start()
    await show("otherkey same name", storePath=source.hello)
    node.kill()
    await cluster.use_cache(public_key=generate_key("other-1").public)
    await node.start()
    await show("otherkey other name", storePath=source.hello)
    node.kill()
    await cluster.use_cache()
    await node.start(CKNIX_RPC_BUDGET="1", CKNIX_FETCH_TIMEOUT="3")
    cluster.cache.stall()
    await show("stall", storePath=source.hello)
    await show("stall", storePath=source.hello)
    await show("stall", storePath=source.hello)
    await show("stall", storePath=source.hello)
    await show("stall", storePath=source.hello)
    cluster.cache.open()
    await node.publish(storePath=source.hello)
    await node.unpublish()
    node.kill()
    await node.start(CKNIX_RPC_BUDGET="100")
    node.collect_garbage()
    cluster.cache.stall()
    await show("stall100", storePath=source.toolbox)
    cluster.cache.open()
