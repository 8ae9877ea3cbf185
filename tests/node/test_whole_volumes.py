"""The whole daemon mounts closures: fetched by real Nix from a signed cache, run from, and gone without a trace."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.node.whole import Cluster, Source, WholeNode, require_exactly


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
    systems: dict[str, Any] = {"x86_64-linux": source.wide, "aarch64-linux": source.file}
    by_system = await node.publish("sys", **systems)
    require_exactly(read_only, source, source.hello)
    require_exactly(writable, source, source.toolbox)
    require_exactly(by_system, source, source.wide)
    assert f"Hello from {source.hello}:" in node.run_in("ro", "/nix/var/result/bin/hello")
    assert f"Hello from {source.hello}:" in node.run_in("rw", "hello")
    for volume in ("ro", "rw", "sys"):
        await node.unpublish(volume)
    await node.left_nothing()
    assert node.terminate() == 0


@pytest.mark.parametrize("name", ["shapes", "file", "link"])
async def test_results_of_every_shape_are_shown_as_they_were_built(whole: WholeNode, source: Source, name: str) -> None:
    await whole.start()
    path = source.results[name]
    require_exactly(await whole.publish(storePath=path), source, path)


async def test_what_a_pod_writes_is_its_own(whole: WholeNode, source: Source) -> None:
    await whole.start()
    volumes = [await whole.publish(name, writable=True, storePath=source.hello) for name in ("a", "b")]
    read_only = await whole.publish("c", storePath=source.hello)
    program = f"store/{source.hello.removeprefix('/nix/store/')}/bin/hello"
    (volumes[0] / program).write_text("changed")
    (volumes[0] / "store/new").mkdir()
    for other in (volumes[1], read_only):
        require_exactly(other, source, source.hello)
    with pytest.raises(OSError, match="Read-only file system"):
        (read_only / "store/new").mkdir()
    assert whole.admin("nix-store", "--verify", "--check-contents") == []


async def test_a_known_closure_costs_no_process_and_no_request(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await cluster.apply("known")
    for number in range(10):
        for name in ("pod", "path"):
            await cluster.schedule(f"{name}-{number}", hostUsers=number % 4 > 0)
    await whole.start()
    first = asyncio.create_task(whole.publish("first", expression="known"))
    await cluster.report("known", "Succeeded", x86_64_linux=source.hello)
    await first  # the result came by the watch, which is up from now on
    faults, calls = whole.descendants_faults(), len(whole.nix_calls())
    assert faults > 0
    assert calls == 1
    while cluster.api.sent:  # until the watch of pods is up as well
        cluster.api.forget()
        await whole.publish("pod-0", expression="known")
        await whole.unpublish("pod-0")
    cluster.api.forget()
    cluster.cache.forget()
    audited = cluster.server.audited()
    assert any(event["user"]["username"].endswith(":cknix-node") for event in audited)
    for number in range(10):
        await whole.publish(f"pod-{number}", expression="known", writable=number % 2 == 1)
        await whole.publish(f"path-{number}", storePath=source.hello)
    assert (whole.descendants_faults(), whole.own_children(), len(whole.nix_calls())) == (faults, [], calls)
    assert (cluster.api.sent, cluster.cache.requests) == (0, [])
    assert cluster.server.audited() == audited


async def test_a_hundred_pods_that_start_at_once_fetch_their_closure_once(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await whole.start()
    cluster.cache.forget()
    async with asyncio.TaskGroup() as pods:
        for number in range(100):
            pods.create_task(whole.publish(f"pod-{number}", writable=number % 2 == 1, storePath=source.chain))
    assert len(whole.nix_calls()) == 1
    nars = [path for path in cluster.cache.requests if path.startswith("/nar/")]
    assert len(nars) == len(set(nars)) == len(source.closure(source.chain)) == 60
    assert len({whole.mount_id(f"pod-{number}") for number in range(100)} - {""}) == 100
    for number in (0, 1, 98, 99):
        require_exactly(whole.shown(f"pod-{number}"), source, source.chain)


async def test_an_administrators_garbage_collection_spares_what_is_mounted(whole: WholeNode, source: Source) -> None:
    await whole.start()
    await whole.publish("gone", storePath=source.wide)
    await whole.publish("ro", storePath=source.hello)
    await whole.publish("rw", writable=True, storePath=source.toolbox)
    await whole.unpublish("gone")
    whole.collect_garbage()
    valid = whole.registered_paths()
    assert source.closure(source.toolbox) <= valid
    assert source.wide not in valid
    require_exactly(whole.shown("ro"), source, source.hello)
    require_exactly(whole.shown("rw"), source, source.toolbox)
    assert "Hello" in whole.run_in("rw", "hello")


async def test_garbage_collections_at_any_moment_lose_no_volume(any_nix: WholeNode, source: Source) -> None:
    node = any_nix
    await node.start()
    collections = 0
    done = threading.Event()

    def collect() -> None:
        nonlocal collections
        while not done.is_set():
            node.collect_garbage()
            collections += 1

    collecting = asyncio.create_task(asyncio.to_thread(collect))
    try:
        while collections < 12 and not collecting.done():
            for path in (source.hello, source.file):
                require_exactly(await node.publish_retrying(storePath=path), source, path)
                await node.unpublish()
    finally:
        done.set()
        await collecting
