"""Nix's database, read and written without Nix: every supported Nix is asked whether it sees the same."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import os
import re
import sqlite3
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from cknix_csi.api.closure import Closure, PathInfo
from cknix_csi.api.errors import Code
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.database import DatabaseUnreadable, PathNotValid, UnknownSchema
from cknix_csi.nix.store import Store
from tests import nixes
from tests.nix.room import Room
from tests.nixes import NixEnv, NixVersion

NOBODY = StorePath.parse("/nix/store/00000000000000000000000000000000-nobody-has-this")
SELF = """
derivation {
  name = "refers-to-itself";
  system = builtins.currentSystem;
  builder = "${(import <cknix-demo> { }).busybox}/bin/sh";
  args = [ "-c" "echo $out > $out" ];
}
"""


@pytest.fixture(scope="module")
def env(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NixEnv]:
    env = NixEnv(nix, tmp_path_factory.mktemp("database"))
    yield env
    env.destroy()


@pytest_asyncio.fixture
async def room(env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Room]:
    yield Room(env, monkeypatch)


def full(path: str) -> str:
    """Newer JSON leaves out the store's directory."""
    return path if path.startswith("/") else f"/nix/store/{path}"


def sri(nar_hash: str) -> str:
    """``sha256:<hex>`` as Nix's newer JSON has it."""
    return "sha256-" + base64.b64encode(bytes.fromhex(nar_hash.removeprefix("sha256:"))).decode()


def sign(room: Room, path: StorePath, name: str) -> str:
    """Sign *path* with a new key of *name*; returns the signature that Nix stored."""
    secret, public = room.env.directory / f"{name}.sec", room.env.directory / f"{name}.pub"
    room.env.run("nix-store", "--generate-binary-cache-key", name, secret, public, store=None)
    command = ("store", "sign") if room.env.nix.release >= (2, 4) else ("sign-paths",)
    room.env.run("nix", *command, "--key-file", secret, str(path))
    [signature] = [found for found in room.path_infos(path)[str(path)]["signatures"] if found.startswith(f"{name}:")]
    return str(signature)


@pytest.mark.parametrize("attribute", ["hello", "multi", "toolbox", "shapes", "link", "wideFast 40", "chainFast 60"])
async def test_a_closure_is_field_by_field_what_nix_says(room: Room, attribute: str) -> None:
    root = await room.demo(attribute)
    closure = database.query_closure(room.store, root)
    assert closure.root == root
    assert [str(info.path) for info in closure.paths] == room.closure(root)
    told = room.path_infos(root)
    for info in closure.paths:
        nix = told[str(info.path)]
        assert [str(reference) for reference in info.references] == sorted(map(full, nix["references"]))
        assert nix["narHash"] in (sri(info.nar_hash), info.nar_hash)
        assert info.nar_size == nix["narSize"]
        assert info.deriver == (full(nix["deriver"]) if nix.get("deriver") else None)
        assert sorted(info.signatures) == sorted(nix.get("signatures", []))
        assert info.content_address == nix.get("ca")
        assert info.ultimate == nix.get("ultimate", False)
        assert info.registration_time == nix["registrationTime"]
    assert closure.nar_size == sum(entry["narSize"] for entry in told.values())


async def test_signatures_are_all_read(room: Room) -> None:
    path = await room.demo("file")
    expected = {sign(room, path, "first-1"), sign(room, path, "second-1")}
    [info] = [info for info in database.query_closure(room.store, path).paths if info.path == path]
    assert set(info.signatures) == expected


async def test_a_reference_to_itself_is_kept(room: Room) -> None:
    path, _ = await room.build(SELF)
    [info] = [info for info in database.query_closure(room.store, path).paths if info.path == path]
    assert path in info.references
    assert str(path) in room.env.lines("nix-store", "-q", "--references", str(path))


def test_paths_that_refer_to_each_other_end_the_search(tmp_path: Path) -> None:
    one, two = (StorePath("0" * 31 + digit, f"path-{digit}") for digit in "12")
    closure = Closure(one, (info(one, (one, two)), info(two, (one,))))
    store = stored(closure, tmp_path)
    assert database.query_closure(store, one).paths == registered_at_1(closure)
    assert database.query_closure(store, two).root == two
    assert len(database.query_closure(store, two).paths) == 2


async def test_what_is_not_there_is_not_valid(room: Room) -> None:
    await room.demo("hello")
    assert not database.is_valid(room.store, NOBODY)
    assert database.path_info(room.store, NOBODY.hash) is None
    with pytest.raises(PathNotValid) as caught:
        database.query_closure(room.store, NOBODY)
    assert caught.value.code is Code.NOT_FOUND
    assert str(NOBODY) in caught.value.message
    assert room.store.uri in caught.value.message


def test_a_store_that_does_not_exist_has_no_valid_paths_and_is_not_created(tmp_path: Path) -> None:
    store = Store.chroot(tmp_path / "nowhere")
    assert not database.is_valid(store, NOBODY)
    assert database.path_info(store, NOBODY.hash) is None
    with pytest.raises(PathNotValid):
        database.query_closure(store, NOBODY)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("version", ["9", "11", "", "ten"])
def test_an_unknown_schema_is_refused(tmp_path: Path, version: str) -> None:
    store = stored(Closure(NOBODY, (info(NOBODY),)), tmp_path)
    (store.state / "db/schema").write_text(version)
    for ask in (
        lambda: database.is_valid(store, NOBODY),
        lambda: database.query_closure(store, NOBODY),
        lambda: database.path_info(store, NOBODY.hash),
    ):
        with pytest.raises(UnknownSchema, match=re.escape(f"has schema {version!r}; this version of cknix knows 10")):
            ask()


@pytest.mark.parametrize("damage", [b"", b"this is no database at all" * 100])
def test_a_damaged_database_is_told_with_its_place(tmp_path: Path, damage: bytes) -> None:
    store = stored(Closure(NOBODY, (info(NOBODY),)), tmp_path)
    store.database.write_bytes(damage)
    with pytest.raises(DatabaseUnreadable, match=re.escape(str(store.database))):
        database.query_closure(store, NOBODY)


def test_a_missing_database_beside_its_schema_is_told(tmp_path: Path) -> None:
    store = stored(Closure(NOBODY, (info(NOBODY),)), tmp_path)
    store.database.unlink()
    with pytest.raises(DatabaseUnreadable):
        database.is_valid(store, NOBODY)
    assert not store.database.exists(), "reading creates nothing"


@pytest.mark.parametrize("name", ["with space", "a?b", "a#b", "a%41", "Grüße"])
def test_a_database_may_be_in_an_odd_place(tmp_path: Path, name: str) -> None:
    store = stored(Closure(NOBODY, (info(NOBODY),)), tmp_path / name)
    assert database.is_valid(store, NOBODY)


async def test_a_path_is_found_by_its_hash_alone(room: Room) -> None:
    hello = await room.demo("hello")
    for path in map(StorePath.parse, room.closure(hello)):
        found = database.path_info(room.store, path.hash)
        assert found is not None
        assert found.path == path
        assert found in database.query_closure(room.store, hello).paths


async def test_what_is_no_hash_finds_nothing(room: Room) -> None:
    hello = await room.demo("hello")
    words = next(path for path in map(StorePath.parse, room.closure(hello)) if path.name == "hello-words")
    digest = words.hash
    for text in (digest[:-1], f"{digest}0", f"{digest}-", f"{digest}-hello", str(words), words.basename, "", "%" * 32):
        assert database.path_info(room.store, text) is None


def test_a_hash_is_not_confused_with_a_longer_name(tmp_path: Path) -> None:
    """Two paths of one hash cannot be, but names that sort around '-' can."""
    names = ["a", "a-b", "a.b", "a+b", "z"]
    paths = [StorePath(f"{number}" * 32, name) for number, name in enumerate(names)]
    store = stored(Closure(paths[0], tuple(info(path) for path in paths)), tmp_path)
    for path in paths:
        found = database.path_info(store, path.hash)
        assert found is not None
        assert found.path == path
    assert database.path_info(store, "0" * 31 + "1") is None


async def test_reading_goes_on_while_nix_writes(room: Room) -> None:
    hello = await room.demo("hello")
    expected = database.query_closure(room.store, hello)
    stop, seen, failures = threading.Event(), 0, []

    def read() -> None:
        nonlocal seen
        while not stop.is_set():
            try:
                assert database.query_closure(room.store, hello) == expected
            except Exception as error:
                failures.append(error)
                return
            seen += 1

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            await asyncio.to_thread(
                room.env.run, "nix-instantiate", "--eval", "--expr", f'"${{builtins.toFile "written-{number}" "x"}}"'
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert seen > 20


async def test_a_writer_that_holds_the_database_does_not_stop_a_reader(room: Room) -> None:
    hello = await room.demo("hello")
    writer = sqlite3.connect(room.store.database, isolation_level=None)
    try:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE ValidPaths SET registrationTime = 0")
        assert database.is_valid(room.store, hello)
        assert all(one.registration_time > 0 for one in database.query_closure(room.store, hello).paths)
        writer.execute("ROLLBACK")
    finally:
        writer.close()


# --- writing ---


def info(path: StorePath, references: tuple[StorePath, ...] = ()) -> PathInfo:
    return PathInfo(path, f"sha256:{'0' * 64}", 1, references)


def registered_at_1(closure: Closure) -> tuple[PathInfo, ...]:
    return tuple(dataclasses.replace(one, registration_time=1) for one in closure.paths)


def stored(closure: Closure, root: Path) -> Store:
    """A chroot store with nothing but the database of *closure*."""
    store = Store.chroot(root)
    (store.state / "db").mkdir(parents=True)
    database.write_database(closure, store.state / "db")
    return store


async def test_what_is_written_is_read_back(room: Room, tmp_path: Path) -> None:
    closure = database.query_closure(room.store, await room.demo("toolbox"))
    again = database.query_closure(stored(closure, tmp_path), closure.root)
    assert again == Closure(closure.root, registered_at_1(closure))


async def test_the_same_closure_gives_the_same_bytes(room: Room, tmp_path: Path) -> None:
    """Also when another Nix registered it at another time, so that nodes can share and compare."""
    closure = database.query_closure(room.store, await room.demo("hello"))
    later = Closure(
        closure.root,
        tuple(dataclasses.replace(one, registration_time=one.registration_time + 99) for one in closure.paths),
    )
    for name, one in (("a", closure), ("b", closure), ("c", later)):
        (tmp_path / name).mkdir()
        database.write_database(one, tmp_path / name)
    contents = {(tmp_path / name / "db.sqlite").read_bytes() for name in "abc"}
    assert len(contents) == 1
    assert sorted(os.listdir(tmp_path / "a")) == ["db.sqlite", "schema"], "no journal is left"


async def test_an_attempt_that_was_cut_short_is_written_over(room: Room, tmp_path: Path) -> None:
    closure = database.query_closure(room.store, await room.demo("file"))
    (tmp_path / "db.sqlite").write_bytes(b"half a database")
    database.write_database(closure, tmp_path)
    (tmp_path / "clean").mkdir()
    database.write_database(closure, tmp_path / "clean")
    assert (tmp_path / "db.sqlite").read_bytes() == (tmp_path / "clean/db.sqlite").read_bytes()


@pytest.mark.parametrize("attribute", ["toolbox", "multi", "shapes"])
@pytest.mark.parametrize("reader", nixes.selected(), ids=lambda suite: f"read-by-{nixes.name_of(suite)}")
async def test_every_nix_takes_the_written_database_for_its_own(
    room: Room, tmp_path: Path, attribute: str, reader: nixes.Suite
) -> None:
    """A closure's objects and this database in a root of their own: verified, queried, added to, collected."""
    closure = database.query_closure(room.store, await room.demo(attribute))
    other = NixEnv(nixes.nix(reader.name), tmp_path / "other")
    try:
        objects = other.root / "nix/store"
        objects.mkdir(parents=True)
        for one in closure.paths:
            subprocess.run(["cp", "-a", str(room.store.physical_path(one.path)), str(objects)], check=True)
        state = other.root / "nix/var/nix"
        (state / "db").mkdir(parents=True)
        database.write_database(closure, state / "db")

        root = str(closure.root)
        expected = [str(one.path) for one in closure.paths]
        assert sorted(other.lines("nix-store", "-qR", root)) == expected
        other.run("nix-store", "--verify", "--check-contents")
        assert sorted(other.lines("nix", "path-info", "-r", root)) == expected
        for one in closure.paths:
            told = other.lines("nix-store", "-q", "--references", str(one.path))
            assert sorted(told) == [str(reference) for reference in one.references]
        (tmp_path / "added.txt").write_text("added")
        [added] = other.lines("nix-store", "--add", str(tmp_path / "added.txt"))
        assert (objects / Path(added).name).read_text() == "added"
        assert database.is_valid(Store.chroot(other.root), StorePath.parse(added)), "and we read what Nix then wrote"
        assert database.query_closure(Store.chroot(other.root), closure.root).paths == registered_at_1(closure)

        gcroots = state / "gcroots"
        gcroots.mkdir(exist_ok=True)
        (gcroots / "keep").symlink_to(root)
        other.run("nix-store", "--gc")
        assert sorted(f"/nix/store/{name}" for name in os.listdir(objects) if name[0] != ".") == expected
    finally:
        other.destroy()


async def test_a_read_only_copy_can_be_queried(room: Room, tmp_path: Path) -> None:
    """As in a pod with a read-only volume: no -wal, no -shm, no lock file can be made."""
    closure = database.query_closure(room.store, await room.demo("hello"))
    (tmp_path / "db").mkdir()
    database.write_database(closure, tmp_path / "db")
    connection = sqlite3.connect(f"file:{tmp_path}/db/db.sqlite?mode=ro&immutable=0", uri=True)
    try:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT count(*) FROM ValidPaths").fetchone() == (len(closure.paths),)
    finally:
        connection.close()


async def test_the_closures_of_a_store_serve_volumes(room: Room, tmp_path: Path) -> None:
    closures = StoreClosures(room.store)
    root = await room.demo("hello")
    assert closures.store_dir == room.env.root / "nix/store"
    assert await closures.is_valid(root)
    assert not await closures.is_valid(NOBODY)
    closure = await closures.query(root)
    for _ in range(2):
        await closures.hold(closure.id, root)
        assert await closures.held() == {closure.id: root}
    for _ in range(2):
        await closures.write_state(closure, tmp_path)
    assert sorted(os.listdir(tmp_path / "nix/var/nix/db")) == ["db.sqlite", "schema"]
    for _ in range(2):
        await closures.release(closure.id)
        assert await closures.held() == {}
    with pytest.raises(PathNotValid):
        await closures.query(NOBODY)
