"""The whole daemon and a cache that is down, silent, lacking or lying: clear words, nothing registered, recovery."""

from __future__ import annotations

import shutil

import pytest

from cknix_csi.nix.cache.signing import generate_key
from tests.node.whole import Cluster, Source, WholeNode, require_exactly


async def test_a_cache_that_is_down_is_named_and_used_again_when_it_is_back(
    any_nix: WholeNode, cluster: Cluster, source: Source
) -> None:
    node = any_nix
    await node.start()
    cluster.cache.close()
    code, message = await node.refused(storePath=source.hello)
    assert code == "UNAVAILABLE"
    assert message.startswith(
        f"{source.hello} is not on this node and {cluster.cache_url} could not deliver it: "
        f"unable to download '{cluster.cache_url}/nix-cache-info': Could"
    )
    assert node.traces() == []
    assert node.registered_paths() == set()
    cluster.cache.open()
    require_exactly(await node.publish(storePath=source.hello), source, source.hello)


async def test_a_flipped_bit_is_noticed_and_nothing_of_it_kept(
    any_nix: WholeNode, cluster: Cluster, source: Source
) -> None:
    node = any_nix
    await node.start()
    with source.one_bit_flipped(f"{source.hello}/bin/hello"):
        code, message = await node.refused(storePath=source.hello)
    assert code == "FAILED_PRECONDITION"
    assert message.startswith(f"{source.hello} was refused: hash mismatch importing path '{source.hello}'")
    assert node.traces() == []
    # What it refers to was whole; it may stay until it is collected.
    assert node.registered_paths() <= source.closure(source.hello) - {source.hello}
    assert node.admin("nix-store", "--verify", "--check-contents") == []
    require_exactly(await node.publish(storePath=source.hello), source, source.hello)


@pytest.mark.parametrize("name", ["cknix-cache-1", "somebody-else-1"])
async def test_a_signature_by_another_key_is_refused(
    any_nix: WholeNode, cluster: Cluster, source: Source, name: str
) -> None:
    node = any_nix
    await cluster.use_cache(public_key=generate_key(name).public)
    await node.start()
    code, message = await node.refused(storePath=source.hello)
    assert code == "FAILED_PRECONDITION"
    assert message.startswith(f"{source.hello} was refused: ")
    assert "not signed by any of the keys in 'trusted-public-keys'" in message
    assert "compare the ConfigMap and the Secret of the cache" in message
    assert node.traces() == []
    assert node.registered_paths() == set()


async def test_a_path_that_the_cache_lacks_is_not_found_until_it_has_it(
    any_nix: WholeNode, cluster: Cluster, source: Source
) -> None:
    node = any_nix
    await node.start()
    path = "/nix/store/00000000000000000000000000000000-nobody-has-it"
    assert await node.refused(storePath=path) == (
        "NOT_FOUND",
        f"{path} is not on this node, and {cluster.cache_url} does not have it; build it there, or correct the store "
        "path",
    )
    assert node.traces() == []
    with source.hidden(source.hello):
        assert (await node.refused(storePath=source.hello))[0] == "NOT_FOUND"
    require_exactly(await node.publish(storePath=source.hello), source, source.hello)


async def test_a_path_that_is_collected_as_soon_as_it_is_fetched_is_fetched_again(
    whole: WholeNode, source: Source
) -> None:
    real = whole.nix.nix.program("nix-store")
    collector = f"{real} --gc --store 'local?root={whole.data}'"
    # As a collection that had looked for roots before the path was valid.
    whole.wrap("nix-store", f'{real} "$@" && rm -rf {whole.data}/nix/var/nix/gcroots/cknix && {collector}')
    await whole.start()
    assert await whole.refused(storePath=source.file) == (
        "UNAVAILABLE",
        f"a garbage collection came in between while {source.file} was fetched or built; it is tried again",
    )
    await whole.left_nothing()
    whole.wrap("nix-store", f'exec {real} "$@"')
    require_exactly(await whole.publish(storePath=source.file), source, source.file)


async def test_a_cache_that_stalls_is_waited_for_within_the_budget_and_given_up_within_the_timeout(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await whole.start(CKNIX_RPC_BUDGET="0.5", CKNIX_FETCH_TIMEOUT="2")
    await whole.publish_retrying("here", storePath=source.file)
    here, calls = whole.registered_paths(), len(whole.nix_calls())
    cluster.cache.stall()
    code, message = await whole.refused(storePath=source.hello)
    assert code == "ABORTED"
    assert message.startswith(f"still fetching {source.hello}: ")
    while code == "ABORTED":
        code, message = await whole.refused(storePath=source.hello)
    assert (code, message) == (
        "FAILED_PRECONDITION",
        f"fetching {source.hello} from {cluster.cache_url} did not end within 2s and was stopped; "
        "raise CKNIX_FETCH_TIMEOUT if it needs longer",
    )
    assert len(whole.nix_calls()) - calls <= 2  # a second one where the first ended just between two tries
    assert whole.children() == []
    require_exactly(await whole.publish("too", storePath=source.file), source, source.file)
    for volume in ("here", "too"):
        await whole.unpublish(volume)
    await whole.left_nothing()
    assert whole.registered_paths() == here
    cluster.cache.open()
    require_exactly(await whole.publish_retrying(storePath=source.hello), source, source.hello)


async def test_without_a_cache_in_this_cluster_that_is_said(whole: WholeNode, cluster: Cluster, source: Source) -> None:
    cluster.server.kubectl("delete", "configmap", "cknix-cache", "--namespace", "cknix-system")
    await whole.start()
    code, message = await whole.refused(storePath=source.hello)
    assert code == "UNAVAILABLE"
    assert "no cache of this cluster is known yet" in message
    assert whole.traces() == []


async def test_a_closure_whose_files_are_lost_is_fetched_again(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    """Somebody has tidied up; the store's database says that all is there."""
    await whole.start()
    await whole.publish("before", storePath=source.toolbox)
    await whole.unpublish("before")
    lost = sorted(source.closure(source.toolbox))[0]
    shutil.rmtree(whole.data / lost.removeprefix("/"))
    assert source.toolbox in whole.registered_paths()
    require_exactly(await whole.publish(storePath=source.toolbox), source, source.toolbox)
    whole.admin("nix-store", "--verify", "--check-contents")


async def test_a_closure_whose_files_are_lost_and_no_cache_has_is_told(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await whole.start()
    await whole.publish("before", storePath=source.toolbox)
    await whole.unpublish("before")
    shutil.rmtree(whole.data / source.toolbox.removeprefix("/"))
    cluster.cache.close()
    code, message = await whole.refused(storePath=source.toolbox)
    assert code == "UNAVAILABLE", message
    assert source.toolbox in message
    assert whole.traces() == []
    cluster.cache.open()
    require_exactly(await whole.publish_retrying(storePath=source.toolbox), source, source.toolbox)
