"""A node's store after a power cut: what is registered is whole, or is fetched again, with every supported Nix.

The disk is a real ext4 that stops writing from one moment to the next; the next boot has what was written by then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.errors import CknixError
from cknix_csi.api.expression import Data
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.cache.signing import generate_key
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.collection import Collector, Pace
from cknix_csi.nix.database import registered_since
from cknix_csi.nix.durable import sync_directory
from cknix_csi.nix.fetcher import StoreFetcher
from cknix_csi.nix.nix import Evaluation, Nix, NixOptions
from cknix_csi.nix.substituters import CacheEndpoint
from cknix_csi.volumes.volumes import PublishRequest, Volumes
from tests import nixes
from tests.nix.cache_process import Served, cache_process
from tests.nix.disks import Disk, on_failing_disk
from tests.nix.room import SYSTEM, Room
from tests.nixes import NixEnv, NixVersion

KEY = generate_key("cknix-cache-1")
ROUNDS = 10
PATIENCE = 40.0
"""Seconds, after which a busy machine's next round is its last."""
LONGEST = 1.5
"""Seconds, about what one round of work takes."""
SOURCE = """
let
  build = name: references: derivation {
    inherit name references;
    system = builtins.currentSystem;
    builder = "/bin/busybox";
    args = [ "sh" "-euc" ''
      b=/bin/busybox
      $b mkdir -p $out/lib
      i=0; while [ $i -lt 60 ]; do $b head -c 6000 /dev/urandom > $out/lib/$i; i=$((i + 1)); done
      echo $name > $out/name
      echo $references > $out/references
    '' ];
  };
  library = build "library" [ ];
  words = build "words" [ library ];
in
map (name: build name [ library words (build "only-${name}" [ ]) ]) [ "one" "two" "three" ]
"""


@dataclass(frozen=True)
class Source:
    """A cache, and three closures that it has; each has four paths, and they share two of them."""

    cache: Served
    closures: list[StorePath]


@pytest.fixture(scope="module")
def source(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    env = NixEnv(nix, tmp_path_factory.mktemp("source"))
    env.configure(sandbox_paths=f"/bin/busybox={nixes.host_busybox()}")
    paths = env.lines("nix-build", "--no-out-link", "--expr", SOURCE)
    with cache_process(env.root, KEY) as served:
        yield Source(served, [StorePath.parse(path) for path in paths])
    env.destroy()


@pytest.fixture
def room(nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(nix_env, monkeypatch)


class Node:
    """A node daemon's own parts in one boot."""

    def __init__(self, room: Room, source: Source, boot: str) -> None:
        self.room, self.source = room, source
        self.root = room.env.root
        self.nix = Nix(room.store, NixOptions(home=self.root / "home"), boot_id=lambda: boot)
        self.fetcher = StoreFetcher(self.nix, self._endpoints)
        self.volumes = Volumes(self.root, StoreClosures(room.store))
        self.collector = Collector(room.store, self.root / "home", Pace(pause=0.0), unsynced=self.nix.unsynced)
        self.notes = room.store.state / "cknix/unsynced"

    async def _endpoints(self) -> list[CacheEndpoint]:
        return [CacheEndpoint(self.source.cache.url, KEY.public)]

    async def start(self) -> None:
        await self.volumes.reconcile()
        await self.fetcher.release_all()

    async def end(self) -> None:
        """It holds nothing on the disk any more."""
        for part in (self.volumes.close(), self.nix.close()):
            with suppress(CknixError, OSError):  # there may be no power
                await part

    async def ensure(self, path: StorePath) -> bool:
        """What every publish does first; False when there was nothing to fetch."""
        if await self.fetcher.is_valid(path):
            return False
        await self.fetcher.hold(path)
        await self.fetcher.fetch(path, lambda _: None)
        await self.fetcher.release(path)
        return True

    async def publish(self, path: StorePath) -> Path:
        await self.ensure(path)
        target = self.root / "pods" / path.name
        target.parent.mkdir(exist_ok=True)
        await self.volumes.publish(PublishRequest(path.name, target, path, writable=False))
        return target

    async def unpublish(self, path: StorePath) -> None:
        await self.volumes.unpublish(path.name, self.root / "pods" / path.name)

    async def collect(self) -> None:
        await self.collector.collect(1 << 62, [])

    def there(self) -> set[str]:
        """What is in the store but Nix's own."""
        names = {entry.name for entry in self.room.store.physical.iterdir()} - {".links"}
        return {name for name in names if not name.endswith(".lock")}


class Machine:
    """A disk, and the node that works on it."""

    def __init__(self, room: Room, source: Source, disk: Disk) -> None:
        self._room, self._source, self._disk = room, source, disk
        self._boots = 0
        self.node = self._next()

    def _next(self) -> Node:
        return Node(self._room, self._source, f"boot {self._boots}")

    async def restart_daemon(self) -> Node:
        await self.node.end()
        self.node = self._next()
        return self.node

    async def lose_power(self, working: asyncio.Task[None] | None = None) -> Node:
        """The node after the next boot; it was *working*."""
        self._disk.lose_power()
        if working is not None:
            working.cancel()
            await asyncio.wait({working})
        await self.node.end()
        self._disk.boot()
        self._boots += 1
        self.node = self._next()
        return self.node


def on_machine(room: Room, source: Source, body: Callable[[Machine], Coroutine[Any, Any, None]]) -> None:
    async def on_disk(disk: Disk) -> None:
        machine = Machine(room, source, disk)
        try:
            await body(machine)
        finally:
            await machine.node.end()

    on_failing_disk(room.env.root, 96, on_disk)


def test_a_power_cut_after_a_fetch_leaves_what_is_registered_and_cut_off(room: Room, source: Source) -> None:
    """So that the tests below can fail."""
    first, second, _ = source.closures

    async def body(machine: Machine) -> None:
        node = machine.node
        await node.start()
        await node.ensure(first)
        await settled(room)
        await node.ensure(second)
        for note in node.notes.iterdir():
            note.unlink()
        sync_directory(node.notes)
        node = await machine.lose_power()
        assert room.is_valid(second)
        assert f"path '{second}' was modified" in modified(room)
        await node.start()
        assert await node.fetcher.is_valid(second), "it cannot know better"

    on_machine(room, source, body)


def test_what_a_power_cut_has_damaged_is_fetched_again_and_nothing_else(
    room: Room, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = source.closures

    async def body(machine: Machine) -> None:
        node = machine.node
        await node.start()
        await node.ensure(first)
        await settled(room)
        kept = numbers(room)
        await node.ensure(second)
        await node.publish(third)
        node = await machine.lose_power()
        await node.start()
        assert await node.fetcher.is_valid(first)
        assert "the 4 store paths written last" in caplog.text
        assert "4 of 4 store paths are damaged" in caplog.text
        require_whole(room)
        assert not any(node.notes.iterdir())
        for path in source.closures:
            assert await node.ensure(path) is (path != first)
            require_shown(await node.publish(path), path)
        require_whole(room)
        assert kept.items() < numbers(room).items()
        for path in source.closures:
            await node.unpublish(path)

    with caplog.at_level(logging.INFO):
        on_machine(room, source, body)


@pytest.mark.one_nix
def test_what_is_synced_is_neither_lost_nor_looked_at(
    room: Room, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(machine: Machine) -> None:
        node = machine.node
        await node.start()
        for path in source.closures:
            await node.ensure(path)
        await settled(room)
        node = await machine.lose_power()
        await node.start()
        for path in source.closures:
            assert not await node.ensure(path)
        require_whole(room)
        assert "went down" not in caplog.text

    with caplog.at_level(logging.INFO):
        on_machine(room, source, body)


@pytest.mark.one_nix
def test_a_killed_daemon_has_lost_nothing_and_the_next_one_syncs_it(
    room: Room, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    [first, *_] = source.closures

    async def body(machine: Machine) -> None:
        node = machine.node
        await node.start()
        await node.ensure(first)
        node = await machine.restart_daemon()
        assert any(node.notes.iterdir())
        await node.start()
        assert not await node.ensure(first)
        await settled(room)
        node = await machine.lose_power()
        await node.start()
        assert not await node.ensure(first)
        require_whole(room)
        assert "went down" not in caplog.text

    with caplog.at_level(logging.INFO):
        on_machine(room, source, body)


@pytest.mark.one_nix
def test_whenever_the_power_is_cut_the_next_boot_serves_whole_closures(
    room: Room, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of fetches, of views, of a collection, or just after."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)

    async def publish(node: Node) -> None:
        await asyncio.gather(*map(node.publish, source.closures))

    async def work(node: Node) -> None:
        await publish(node)
        for path in source.closures:
            await node.unpublish(path)
        await node.collect()

    async def body(machine: Machine) -> None:
        enough = time.monotonic() + PATIENCE
        for number in range(ROUNDS):
            caplog.clear()
            last = number == ROUNDS - 1 or time.monotonic() > enough
            working = asyncio.create_task((publish if last else work)(machine.node))
            await asyncio.wait({working}, timeout=None if last else chance.uniform(0.0, LONGEST))
            node = await machine.lose_power(working)
            await node.start()
            for path in source.closures:
                require_shown(await node.publish(path), path)
            require_whole(room)
            assert node.there() == {
                StorePath.parse(path).basename for root in source.closures for path in room.closure(root)
            }, f"seed {seed}, round {number}"
            for path in source.closures:
                await node.unpublish(path)
            await node.collect()
            assert node.there() == set(), f"seed {seed}, round {number}"
            await settled(room)
            if last:
                break
        assert "are damaged" in caplog.text, "a cut that damages nothing tests nothing"

    with caplog.at_level(logging.INFO):
        on_machine(room, source, body)


def test_what_was_built_before_a_power_cut_is_built_again(room: Room) -> None:
    """And its derivations are made again, without which Nix could build nothing (NixOS/nix#3498)."""

    async def build(nix: Nix, attribute: str) -> Evaluation:
        evaluation = await nix.evaluate(Data("expr", f"(import <cknix-demo> {{ }}).{attribute}"), SYSTEM)
        await nix.build(evaluation, progress=lambda _: None)
        return evaluation

    def closures(nix: Nix) -> StoreClosures:
        return StoreClosures(room.store, unsynced=nix.unsynced)

    async def body(disk: Disk) -> None:
        options = room.nix()._options
        before = Nix(room.store, options, boot_id=lambda: "one")
        first = await build(before, "hello")
        await settled(room)
        later = await build(before, "web")
        assert await closures(before).is_valid(later.result)
        disk.lose_power()
        await before.close()
        disk.boot()
        after = Nix(room.store, options, boot_id=lambda: "two")
        assert await closures(after).is_valid(first.result)
        assert not await closures(after).is_valid(later.result)
        require_whole(room)
        for attribute in ("hello", "web"):
            evaluation = await build(after, attribute)
            assert await closures(after).is_valid(evaluation.result)
        require_whole(room)
        await after.close()

    on_failing_disk(room.env.root, 96, body)


def test_what_is_in_the_place_of_a_path_and_not_registered_is_replaced(room: Room, source: Source) -> None:
    """By Nix itself, whatever it is."""
    first, second, third = source.closures
    place = room.store.physical_path(first)
    place.mkdir(parents=True)
    (place / "rest").write_text("of something")
    room.store.physical_path(second).write_text("a file")
    room.store.physical_path(third).symlink_to("nowhere")

    async def fetch() -> None:
        nix = room.nix()
        for path in source.closures:
            await nix.substitute(path, [CacheEndpoint(source.cache.url, KEY.public)], progress=lambda _: None)
        await nix.close()

    asyncio.run(fetch())
    require_whole(room)
    assert not (place / "rest").exists()


async def settled(room: Room) -> None:
    """All that was done is synced, and so is that there is no note of it."""
    notes = room.store.state / "cknix/unsynced"
    async with asyncio.timeout(20):
        while any(notes.iterdir()):
            await asyncio.sleep(0.05)
    sync_directory(notes)


def modified(room: Room) -> str:
    """What Nix finds when it compares all that is registered with the hashes of its NARs."""
    return room.env.run("nix-store", "--verify", "--check-contents", check=False).stderr.replace("\n", " ")


def require_whole(room: Room) -> None:
    said = modified(room)
    for word in ("modified", "error", "disappeared"):
        assert word not in said, said


def require_shown(target: Path, path: StorePath) -> None:
    """The volume at *target* has the closure of *path*, by what it refers to."""
    for name in (target / "store" / path.basename / "references").read_text().split():
        assert os.listdir(target / "store" / StorePath.parse(name).basename / "lib")


def numbers(room: Room) -> dict[str, int]:
    """Of everything that is registered; what is registered again gets another one."""
    return {each.path: each.number for each in registered_since(room.store, 0)}
