"""Waiting for a collection that may be about to delete what a volume needs."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import collector, gcroots
from cknix_csi.nix.collector import CollectionRuns, outlast_collector
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.store import Store

HELLO = StorePath.parse("/nix/store/6c1vlf6kyyl0x5cjdhvr3bymgxa74fjb-hello")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.chroot(tmp_path)
    store.physical.mkdir(parents=True)
    store.state.mkdir(parents=True)
    store.physical_path(HELLO).touch()
    return store


@contextmanager
def collecting(store: Store) -> Iterator[None]:
    with (store.state / "gc.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def test_where_nothing_is_collected_nothing_is_waited_for(store: Store) -> None:
    await outlast_collector(store, HELLO)
    with collecting(store):
        pass
    await outlast_collector(store, HELLO)


async def test_a_path_that_is_not_there_waits_for_no_collection(store: Store) -> None:
    store.physical_path(HELLO).unlink()
    with collecting(store):
        await outlast_collector(store, HELLO)


async def test_a_path_that_is_there_waits_for_the_end_of_the_collection(store: Store) -> None:
    with collecting(store):
        waiting = asyncio.create_task(outlast_collector(store, HELLO))
        await asyncio.sleep(0.1)
        assert not waiting.done()
    async with asyncio.timeout(5):
        await waiting


async def test_a_path_that_the_collection_deletes_waits_no_longer(store: Store) -> None:
    with collecting(store):
        waiting = asyncio.create_task(outlast_collector(store, HELLO))
        await asyncio.sleep(0.05)
        store.physical_path(HELLO).unlink()
        async with asyncio.timeout(5):
            await waiting


async def test_several_paths_wait_until_none_of_them_can_go(store: Store) -> None:
    other = StorePath("0" * 32, "other")
    store.physical_path(other).touch()
    with collecting(store):
        waiting = asyncio.create_task(outlast_collector(store, other, HELLO))
        store.physical_path(other).unlink()
        await asyncio.sleep(0.05)
        assert not waiting.done()
    async with asyncio.timeout(5):
        await waiting


async def test_a_root_that_must_hold_waits_for_the_collection_when_it_is_new_and_only_then(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(gcroots, "tell_collector", lambda *_: None)  # nobody answers here
    roots = GcRoots(store, "expressions", outlasting=True)
    with collecting(store):
        for _ in range(2):
            with pytest.raises(CollectionRuns):
                await asyncio.to_thread(roots.add, "default/hello/1", HELLO)
            assert roots.list() == {}, "so that the next try waits as well"
    roots.add("default/hello/1", HELLO)
    with collecting(store):
        roots.add("default/hello/1", HELLO)
    assert roots.list() == {"default/hello/1": HELLO}


async def test_a_collection_that_takes_long_is_said_to_whoever_reads_the_pods_events(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "_PATIENCE_SECONDS", 0.05)
    with (
        collecting(store),
        pytest.raises(CollectionRuns, match=r"-hello was in no use, and the garbage collection that runs on this node"),
    ):
        await outlast_collector(store, HELLO)
    assert CollectionRuns.situation.code.transient
