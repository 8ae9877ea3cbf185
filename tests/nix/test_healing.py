"""A damaged node store heals by fetching, with every supported Nix, and what a volume shows is never rewritten."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import pytest_asyncio

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.errors import CacheUnavailable, NotFound, PathUntrusted
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.cache.signing import generate_key
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.database import DatabaseUnreadable, path_info
from cknix_csi.nix.fetcher import StoreFetcher
from cknix_csi.nix.recovery import StoreUnreadable
from cknix_csi.nix.substituters import CacheEndpoint
from tests import nixes
from tests.nix.cache_process import Served, cache_process
from tests.nix.room import Room
from tests.nixes import NixEnv, NixVersion

KEY = generate_key("cknix-cache-1")


@dataclass(frozen=True)
class Source:
    """A store with two results: *shapes* refers to *result*."""

    env: NixEnv
    result: StorePath
    shapes: StorePath

    def closure(self, path: StorePath) -> list[StorePath]:
        return [StorePath.parse(line) for line in self.env.lines("nix-store", "-qR", str(path))]

    @property
    def library(self) -> StorePath:
        (library,) = (path for path in self.closure(self.result) if path.name == "library")
        return library


@pytest.fixture(scope="module")
def source(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    env = NixEnv(nix, tmp_path_factory.mktemp("source"))
    env.configure(sandbox_paths=f"/bin/busybox={nixes.host_busybox()}")
    result, shapes = env.lines("nix-build", "--no-out-link", Path(__file__).with_name("cache_source.nix"))
    yield Source(env, StorePath.parse(result), StorePath.parse(shapes))
    env.destroy()


@pytest.fixture(scope="module")
def cache(source: Source) -> Iterator[Served]:
    with cache_process(source.env.root, KEY) as served:
        yield served


class Node:
    """A node's store as the daemon uses it, with *result* fetched and shown by a view."""

    def __init__(self, env: NixEnv, source: Source, cache: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.env, self.source = env, source
        self.room = Room(env, monkeypatch)
        self.store = self.room.store
        self.caches = [CacheEndpoint(cache.url, KEY.public)]
        self.closures = StoreClosures(self.store)
        self.fetcher = StoreFetcher(self.room.nix(), self.endpoints)

    async def endpoints(self) -> list[CacheEndpoint]:
        return self.caches

    async def fetch(self, path: StorePath) -> None:
        await self.fetcher.hold(path)
        try:
            await self.fetcher.fetch(path, lambda _: None)
        finally:
            await self.fetcher.release(path)

    async def show(self, path: StorePath) -> Path:
        """What a volume does: a GC root, and a view with a database of the closure; returns the view."""
        await self.closures.hold(path.basename, path)
        view = self.env.root / "views" / path.basename
        await self.closures.write_state(await self.closures.query(path), view / "meta")
        return view

    async def registered(self, root: StorePath) -> list[PathInfo]:
        """All that is known of the paths of a closure."""
        closure = await self.closures.query(root)
        found = [path_info(self.store, one.path.hash) for one in closure.paths]
        return [info for info in found if info is not None]

    def lose(self, *paths: StorePath) -> None:
        for path in paths:
            nixes.remove(self.store.physical_path(path))
            self.store.physical_path(path).unlink(missing_ok=True)

    def inodes(self, path: StorePath) -> dict[str, tuple[int, int]]:
        """Every file of the closure of *path* that is on disk, with what changes when it is written or made anew."""
        tops = [self.store.physical_path(one) for one in self.source.closure(path)]
        files = [file for top in tops if os.path.lexists(top) for file in (top, *top.rglob("*"))]
        # A number alone is soon used again.
        return {str(file): (file.lstat().st_ino, file.lstat().st_ctime_ns) for file in files}

    async def require_whole(self, path: StorePath) -> None:
        """Registered and there, to the last bit, for us and for Nix."""
        assert await self.fetcher.is_valid(path)
        self.env.run("nix-store", "--verify", "--check-contents")
        paths = self.source.closure(path)
        assert {info.path for info in (await self.closures.query(path)).paths} == set(paths)
        for one in paths:
            assert os.path.lexists(self.store.physical_path(one))


@pytest_asyncio.fixture
async def node(nix_env: NixEnv, source: Source, cache: Served, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    node = Node(nix_env, source, cache, monkeypatch)
    await node.fetch(source.result)
    yield node


@pytest.fixture
def room(nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(nix_env, monkeypatch)


# --- objects that are gone ---


@pytest.mark.parametrize("names", [["library"], ["result"], ["library", "result"], []], ids=str)
async def test_what_is_gone_from_disk_is_fetched_again_and_nothing_else_is_touched(
    node: Node, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    closure = node.source.closure(node.source.result)
    gone = [path for path in closure if path.name in names or not names]
    assert gone
    node.lose(*gone)
    kept = node.inodes(node.source.result)
    assert not await node.fetcher.is_valid(node.source.result)
    with caplog.at_level(logging.WARNING):
        await node.fetch(node.source.result)
    assert f"{len(gone)} registered paths of {node.source.result} are not on disk" in caplog.text
    await node.require_whole(node.source.result)
    assert kept.items() <= node.inodes(node.source.result).items()


@pytest.mark.one_nix
async def test_another_closure_with_a_missing_path_in_it_is_whole_after_its_fetch(node: Node) -> None:
    """The path itself is new; what it refers to is registered, and Nix looks no further."""
    node.lose(node.source.library)
    await node.fetch(node.source.shapes)
    await node.require_whole(node.source.shapes)


@pytest.mark.one_nix
async def test_a_closure_that_a_volume_has_is_not_looked_for_on_disk(node: Node) -> None:
    """For every pod that is started it would cost a look at each of its paths."""
    await node.show(node.source.result)
    node.lose(node.source.library)
    assert await node.fetcher.is_valid(node.source.result)
    await node.closures.release(node.source.result.basename)
    assert not await node.fetcher.is_valid(node.source.result)


@pytest.mark.one_nix
async def test_what_a_volume_shows_and_has_lost_is_fetched_when_it_is_asked_for(node: Node) -> None:
    await node.show(node.source.result)
    node.lose(node.source.library)
    kept = node.inodes(node.source.result)
    await node.fetch(node.source.result)
    await node.require_whole(node.source.result)
    assert kept.items() <= node.inodes(node.source.result).items()


@pytest.mark.one_nix
async def test_a_disk_that_cannot_be_looked_at_has_lost_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error", str(path))

    inodes = node.inodes(node.source.result)
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", fails)
        with pytest.raises(StoreUnreadable, match="see the kernel log"):
            await node.fetcher.is_valid(node.source.result)
        with pytest.raises(StoreUnreadable):
            await node.fetch(node.source.result)
    assert node.inodes(node.source.result) == inodes


@pytest.mark.one_nix
async def test_two_that_miss_the_same_path_bring_it_back_once(node: Node) -> None:
    await node.fetch(node.source.shapes)
    node.lose(node.source.library)
    fetches = [asyncio.create_task(node.fetch(path)) for path in (node.source.result, node.source.shapes)]
    await asyncio.wait(fetches, return_when=asyncio.FIRST_COMPLETED)
    first = node.inodes(node.source.result)
    await asyncio.gather(*fetches)
    assert node.inodes(node.source.result) == first
    await node.require_whole(node.source.shapes)


async def test_what_cannot_be_fetched_again_is_told_and_later_it_can(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    library, result, good = node.source.library, node.source.result, node.caches
    node.lose(library)
    kept = node.inodes(result)
    with cache_process(node.source.env.root, KEY) as gone:
        node.caches = [CacheEndpoint(gone.url, KEY.public)]
    with pytest.raises(CacheUnavailable, match=str(library)):
        await node.fetch(result)
    node.caches = [CacheEndpoint(good[0].url, generate_key("cknix-cache-1").public)]
    with pytest.raises(PathUntrusted, match=str(library)):
        await node.fetch(result)
    with cache_process(node.env.directory / "empty", KEY) as empty, caplog.at_level(logging.WARNING):
        node.caches = [CacheEndpoint(empty.url, KEY.public)]
        with pytest.raises(NotFound, match=str(library)):
            await node.fetch(result)
    assert f"Nix could not fetch {library}: error: cannot repair path" in caplog.text
    assert node.inodes(result) == kept
    assert not await node.fetcher.is_valid(result)
    node.caches = good
    await node.fetch(result)
    await node.require_whole(result)


@pytest.mark.one_nix
async def test_a_failed_fetch_leaves_nixs_words_in_the_log(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    nobody = StorePath("0" * 32, "nobody-has-this")
    with caplog.at_level(logging.WARNING), pytest.raises(NotFound):
        await node.fetch(nobody)
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert f"Nix could not fetch {nobody}: " in logged
    assert re.search(rf"error: (build of '{nobody}' failed|path '{nobody}' is required, but)", logged), "in Nix's words"


# --- the database is gone ---

Damage = Callable[[Path], None]


def cut(directory: Path) -> None:
    with (directory / "db.sqlite").open("r+b") as file:
        file.truncate(5000)


def half(directory: Path) -> None:
    """Only pages in the middle are lost: much of it can still be read."""
    size = (directory / "db.sqlite").stat().st_size
    with (directory / "db.sqlite").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(size - 8192))


def zeros(directory: Path) -> None:
    (directory / "db.sqlite").write_bytes(bytes(65536))


DAMAGES: dict[str, Damage] = {
    "cut": cut,
    "zeros inside": half,
    "empty": lambda directory: os.truncate(directory / "db.sqlite", 0),
    "zeros": zeros,
    "no database": lambda directory: (directory / "db.sqlite").unlink(),
    "no directory": shutil.rmtree,
    "no schema": lambda directory: (directory / "schema").unlink(),
    "empty schema": lambda directory: os.truncate(directory / "schema", 0),
}


ALIKE = [how if how in {"cut", "no directory"} else pytest.param(how, marks=pytest.mark.one_nix) for how in DAMAGES]
"""Two kinds of damage with every Nix; it is our own code that tells them apart."""


def damage_database(node: Node, how: str) -> None:
    node.env.run("nix-store", "--verify")  # so that nothing is left in the write-ahead log
    DAMAGES[how](node.store.state / "db")


@pytest.mark.parametrize("how", ALIKE)
async def test_after_the_database_is_lost_what_volumes_show_stays_as_it_is(node: Node, how: str) -> None:
    result, shapes = node.source.result, node.source.shapes
    await node.show(result)
    before = await node.registered(result)
    inodes = node.inodes(result)
    damage_database(node, how)
    assert not await node.fetcher.is_valid(shapes)
    await node.fetch(shapes)
    assert node.inodes(result) == inodes
    await node.require_whole(result)
    await node.require_whole(shapes)
    after = await node.registered(result)
    assert [(one.path, one.nar_hash, one.references, one.signatures) for one in after] == [
        (one.path, one.nar_hash, one.references, one.signatures) for one in before
    ]
    node.env.run("nix-store", "--gc")
    assert node.inodes(result) == inodes, "the volume's GC root holds as before"


@pytest.mark.parametrize("how", ALIKE)
async def test_without_volumes_a_store_whose_database_is_lost_is_fetched_anew(node: Node, how: str) -> None:
    damage_database(node, how)
    await node.fetch(node.source.result)
    await node.require_whole(node.source.result)


async def test_without_this_nix_would_rewrite_what_a_volume_shows(node: Node) -> None:
    """So that the test above can fail."""
    inodes = node.inodes(node.source.result)
    damage_database(node, "no directory")
    await node.room.nix().substitute(node.source.shapes, node.caches, progress=lambda _: None)
    assert node.inodes(node.source.result).keys() == inodes.keys()
    assert node.inodes(node.source.result) != inodes


@pytest.mark.one_nix
async def test_the_lost_database_is_kept_aside_for_who_wants_to_look(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    damage_database(node, "zeros")
    with caplog.at_level(logging.ERROR):
        await node.fetch(node.source.result)
    aside = node.store.state / "db/damaged"
    assert (aside / "db.sqlite").read_bytes() == bytes(65536)
    assert str(aside) in caplog.text


@pytest.mark.one_nix
async def test_rows_that_are_lost_come_back_before_anything_is_fetched(node: Node) -> None:
    """As after an administrator put an older copy of the database in place."""
    old = (node.store.state / "db/db.sqlite").read_bytes()
    await node.fetch(node.source.shapes)
    await node.show(node.source.shapes)
    inodes = node.inodes(node.source.shapes)
    damage_database(node, "no directory")
    (node.store.state / "db").mkdir()
    node.store.database.write_bytes(old)
    (node.store.state / "db/schema").write_text("10")
    with pytest.raises(NotFound):
        await node.fetch(StorePath("0" * 32, "something-else"))
    await node.require_whole(node.source.shapes)
    assert node.inodes(node.source.shapes) == inodes


@pytest.mark.one_nix
async def test_where_a_views_database_cannot_be_read_nothing_is_touched(node: Node) -> None:
    view = await node.show(node.source.result)
    inodes = node.inodes(node.source.result)
    (view / "meta/nix/var/nix/db/db.sqlite").write_bytes(bytes(4096))
    damage_database(node, "zeros")
    with pytest.raises(DatabaseUnreadable, match=view.name):
        await node.fetch(node.source.shapes)
    assert node.inodes(node.source.result) == inodes
    assert node.store.database.read_bytes() == bytes(65536)
    shutil.rmtree(view)
    await node.fetch(node.source.shapes)
    await node.require_whole(node.source.shapes)


async def test_what_a_farm_shows_is_known_again_after_the_database_is_lost(node: Node) -> None:
    result = node.source.result
    view = await node.show(result)
    (node.env.root / "farms").mkdir()
    view.rename(node.env.root / "farms" / view.name)
    farm = node.env.root / "farms" / view.name
    (farm / "meta").rename(farm / "tree")
    inodes = node.inodes(result)
    damage_database(node, "zeros")
    await node.fetch(node.source.shapes)
    assert node.inodes(result) == inodes
    await node.require_whole(result)
    (farm / "tree/nix/var/nix/db/db.sqlite").write_bytes(bytes(4096))
    damage_database(node, "zeros")
    await node.fetch(node.source.shapes)  # its files have names of their own, whatever becomes of the store
    await node.require_whole(node.source.shapes)


@pytest.mark.one_nix
async def test_what_is_no_view_yet_is_no_reason_to_wait(node: Node) -> None:
    building = node.env.root / "views/.building-1/meta/nix/var/nix/db"
    building.mkdir(parents=True)
    (building / "db.sqlite").write_bytes(b"")
    (node.env.root / "views/lost+found").mkdir()
    (node.env.root / "views/.lock").touch()
    await node.fetch(node.source.shapes)
    await node.require_whole(node.source.shapes)


@pytest.mark.one_nix
async def test_a_healthy_store_is_left_as_it_is(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    await node.show(node.source.result)
    await node.fetch(node.source.shapes)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not (node.store.state / "db/damaged").exists()


# --- fetches that did not end ---

FULL = """
import asyncio, json, os, subprocess, sys
from pathlib import Path
from cknix_csi.api.errors import CknixError
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.fetcher import StoreFetcher
from cknix_csi.nix.nix import Nix, NixOptions
from cknix_csi.nix.store import Store
from cknix_csi.nix.recovery import StoreUnreadable
from cknix_csi.nix.substituters import CacheEndpoint

mount, big, small, url, key = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "disk", mount], check=True)
nix = Nix(Store.chroot(Path(mount)), NixOptions(home=Path(mount) / "home"))

async def endpoints():
    return [CacheEndpoint(url, key)]

async def fetch(path):
    try:
        await StoreFetcher(nix, endpoints).fetch(StorePath.parse(path), lambda _: None)
    except CknixError as error:
        said = f"{type(error).__name__}: {error.message}"
    else:
        said = "fetched"
    free = os.statvfs(mount)
    there = {"big": os.path.lexists(mount + big), "small": os.path.lexists(mount + small)}
    return {"said": said, "free": free.f_bavail * free.f_frsize, **there}

async def main():
    told = [await fetch(path) for path in (big, big, small)]
    subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
    return [*told, await fetch(big)]

print(json.dumps(asyncio.run(main())))
"""


def test_a_path_too_big_for_the_disk_gives_its_space_back(node: Node, tmp_path: Path) -> None:
    """On a tmpfs in a mount namespace of its own; Nix keeps half of it in reserve for its database."""
    [big] = node.source.env.lines(
        "nix-build", "--no-out-link", "--expr",
        'derivation { name = "big"; system = builtins.currentSystem; builder = "/bin/busybox"; args = [ "sh" "-c" '
        '"b=/bin/busybox; $b mkdir $out; for i in 1 2 3; do $b head -c 4000000 /dev/urandom > $out/$i; done" ]; }',
    )  # fmt: skip
    (tmp_path / "disk").mkdir()
    run = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", FULL, str(tmp_path / "disk"), big, str(node.source.result),
         node.caches[0].url, node.caches[0].public_key],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, second, small, last = json.loads(run.stdout)
    for refused in (first, second):
        assert refused["said"].startswith("OutOfSpace: a file system that Nix writes to is full"), refused
        assert not refused["big"]
        assert refused["free"] > 4 * 1024 * 1024
    assert (small["said"], small["small"]) == ("fetched", True), "there is room for others"
    assert (last["said"], last["big"]) == ("fetched", True)


@pytest.mark.one_nix
async def test_what_a_killed_daemon_was_fetching_is_deleted_when_the_next_starts(node: Node) -> None:
    part = node.store.physical_path(node.source.shapes)
    part.mkdir()
    part.with_name(f"{part.name}.lock").touch()
    inodes = node.inodes(node.source.result)
    await node.fetcher.release_all()
    assert not part.exists()
    assert node.inodes(node.source.result) == inodes
    await node.fetch(node.source.shapes)
    await node.require_whole(node.source.shapes)


# --- where it was built ---


def require_whole(room: Room, path: StorePath) -> None:
    room.env.run("nix-store", "--verify", "--check-contents")
    for one in room.closure(path):
        assert os.path.lexists(room.env.physical(one))


@pytest.mark.parametrize("name", ["hello", "hello-words", "busybox"])
async def test_what_is_gone_where_it_was_built_is_built_again(room: Room, name: str) -> None:
    hello = await room.demo("hello")
    closures = StoreClosures(room.store)
    [gone] = [path for path in map(StorePath.parse, room.closure(hello)) if path.name == name]
    nixes.remove(room.store.physical_path(gone))
    room.store.physical_path(gone).unlink(missing_ok=True)
    assert not await closures.is_valid(hello)
    assert await room.demo("hello") == hello
    assert await closures.is_valid(hello)
    require_whole(room, hello)


@pytest.mark.parametrize("how", ALIKE)
async def test_where_it_was_built_a_lost_database_is_begun_anew(room: Room, how: str) -> None:
    hello = await room.demo("hello")
    room.env.run("nix-store", "--verify")
    DAMAGES[how](room.store.state / "db")
    await StoreClosures(room.store).is_valid(hello)
    assert await room.demo("hello") == hello
    require_whole(room, hello)
