"""Nix's database, read and written without Nix: every supported Nix is asked whether it sees the same."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import os
import re
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from cknix_csi.api.closure import Closure, PathInfo
from cknix_csi.api.errors import OutOfSpace
from cknix_csi.api.situations import Code
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.database import DatabaseDamaged, DatabaseUnreadable, PathNotValid, UnknownSchema
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
    assert [str(member.path) for member in closure.paths] == room.closure(root)
    told = room.path_infos(root)
    for info in infos_of(room.store, closure):
        nix = told[str(info.path)]
        assert [str(reference) for reference in info.references] == sorted(map(full, nix["references"]))
        assert nix["narHash"] in (sri(info.nar_hash), info.nar_hash)
        assert info.nar_size == nix["narSize"]
        assert info.deriver == (full(nix["deriver"]) if nix.get("deriver") else None)
        assert sorted(info.signatures) == sorted(nix.get("signatures", []))
        assert info.content_address == nix.get("ca")
        assert info.ultimate == nix.get("ultimate", False)
        assert info.registration_time == nix["registrationTime"]
    assert [member.nar_size for member in closure.paths] == [told[path]["narSize"] for path in room.closure(root)]
    assert closure.nar_size == sum(entry["narSize"] for entry in told.values())


async def test_signatures_are_all_read(room: Room) -> None:
    path = await room.demo("file")
    expected = {sign(room, path, "first-1"), sign(room, path, "second-1")}
    info = database.path_info(room.store, path.hash)
    assert info is not None
    assert set(info.signatures) == expected


async def test_a_reference_to_itself_is_kept(room: Room) -> None:
    path, _ = await room.build(SELF)
    info = database.path_info(room.store, path.hash)
    assert info is not None
    assert path in info.references
    assert str(path) in room.env.lines("nix-store", "-q", "--references", str(path))


def test_paths_that_refer_to_each_other_end_the_search(tmp_path: Path) -> None:
    one, two = (StorePath("0" * 31 + digit, f"path-{digit}") for digit in "12")
    store = stored(tmp_path, info(one, (one, two)), info(two, (one,)))
    for root in (one, two):
        closure = database.query_closure(store, root)
        assert (closure.root, [member.path for member in closure.paths]) == (root, [one, two])


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


@pytest.mark.parametrize("version", ["9", "11", "ten"])
def test_an_unknown_schema_is_refused(tmp_path: Path, version: str) -> None:
    store = stored(tmp_path, info(NOBODY))
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
    store = stored(tmp_path, info(NOBODY))
    store.database.write_bytes(damage)
    with pytest.raises(DatabaseUnreadable, match=re.escape(str(store.database))):
        database.query_closure(store, NOBODY)


def test_a_missing_database_beside_its_schema_is_told(tmp_path: Path) -> None:
    store = stored(tmp_path, info(NOBODY))
    store.database.unlink()
    with pytest.raises(DatabaseUnreadable):
        database.is_valid(store, NOBODY)
    assert not store.database.exists(), "reading creates nothing"


@pytest.mark.parametrize("name", ["with space", "a?b", "a#b", "a%41", "Grüße"])
def test_a_database_may_be_in_an_odd_place(tmp_path: Path, name: str) -> None:
    store = stored(tmp_path / name, info(NOBODY))
    assert database.is_valid(store, NOBODY)


async def test_a_path_is_found_by_its_hash_alone(room: Room) -> None:
    hello = await room.demo("hello")
    for path in map(StorePath.parse, room.closure(hello)):
        found = database.path_info(room.store, path.hash)
        assert found is not None
        assert found.path == path


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
    store = stored(tmp_path, *map(info, paths))
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
    before = database.path_info(room.store, hello.hash)
    writer = sqlite3.connect(room.store.database, isolation_level=None)
    try:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE ValidPaths SET registrationTime = 0")
        assert database.is_valid(room.store, hello)
        assert before is not None
        assert before.registration_time > 0
        assert database.path_info(room.store, hello.hash) == before
        writer.execute("ROLLBACK")
    finally:
        writer.close()


# --- writing ---


def info(path: StorePath, references: tuple[StorePath, ...] = ()) -> PathInfo:
    return PathInfo(path, f"sha256:{'0' * 64}", 1, references)


def stored(root: Path, *infos: PathInfo) -> Store:
    """A chroot store with nothing but a database of *infos*."""
    store = Store.chroot(root)
    database.register(store, infos)
    return store


def infos_of(store: Store, closure: Closure) -> list[PathInfo]:
    """All that *store* knows of the paths of *closure*, each looked up by itself."""
    found = [database.path_info(store, member.path.hash) for member in closure.paths]
    return [info for info in found if info is not None]


def written(store: Store, closure: Closure, directory: Path) -> list[PathInfo]:
    """The paths of a database that is written to *directory*, in the order of its rows."""
    directory.mkdir(exist_ok=True)
    database.write_database(store, closure, directory)
    return database.read_database(directory / "db.sqlite", ())


async def test_what_is_written_is_what_the_store_knows_of_the_closure_and_nothing_else(
    room: Room, tmp_path: Path
) -> None:
    await room.demo("wideFast 40")
    closure = database.query_closure(room.store, await room.demo("toolbox"))
    sign(room, closure.root, "written-1")
    expected = [dataclasses.replace(info, registration_time=1) for info in infos_of(room.store, closure)]
    assert written(room.store, closure, tmp_path) == expected
    with contextlib.closing(sqlite3.connect(tmp_path / "db.sqlite")) as opened:
        assert opened.execute("SELECT id FROM ValidPaths").fetchall() == [(n + 1,) for n in range(len(closure.paths))]
        assert opened.execute("SELECT count(*) FROM sqlite_temp_master").fetchone() == (0,)
        assert opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [
            ("ValidPaths",), ("sqlite_sequence",), ("Refs",), ("DerivationOutputs",), ("SchemaMigrations",),
        ]  # fmt: skip


def test_the_same_closure_gives_the_same_bytes(tmp_path: Path) -> None:
    """Also when it was registered in another order, at another time and among others, so that nodes can compare."""
    root, one, two, other = (StorePath(digit * 32, f"path-{digit}") for digit in "3124")
    infos = [info(one), info(two, (one, two)), info(root, (one, two, root))]
    first = stored(tmp_path / "first", *infos)
    later = stored(
        tmp_path / "later",
        info(other),
        *(dataclasses.replace(it, registration_time=99) for it in reversed(infos)),
    )
    for name, store in (("a", first), ("b", first), ("c", later)):
        assert len(written(store, database.query_closure(store, root), tmp_path / name)) == 3
    assert len({(tmp_path / name / "db.sqlite").read_bytes() for name in "abc"}) == 1
    assert sorted(os.listdir(tmp_path / "a")) == ["db.sqlite", "schema"], "no journal is left"


def test_what_else_is_in_the_store_costs_a_closure_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in instructions of SQLite's virtual machine, which say more than any plan."""
    steps = 0

    def counting(uri: str) -> sqlite3.Connection:
        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
        connection.set_progress_handler(count, 10)
        return connection

    paths = [StorePath(f"{number:032}", "own") for number in range(30)]
    own = [info(path, tuple(paths[: number + 1])) for number, path in enumerate(paths)]
    strangers = [StorePath(f"9{number:031}", "stranger") for number in range(300)]
    others = [info(path, tuple(strangers[max(0, number - 9) : number + 1])) for number, path in enumerate(strangers)]
    needed = []
    for name, infos in (("alone", own), ("among-others", [*others, *own])):
        store = stored(tmp_path / name, *infos)
        with monkeypatch.context() as patched:
            patched.setattr(database, "_connect", counting)
            steps = 0
            assert len(written(store, database.query_closure(store, paths[-1]), tmp_path / f"{name}-view")) == 30
        needed.append(steps)
    assert needed[1] < 1.2 * needed[0], needed


def test_a_closure_that_was_collected_meanwhile_is_not_written(tmp_path: Path) -> None:
    store = stored(tmp_path, info(NOBODY))
    closure = database.query_closure(store, NOBODY)
    with contextlib.closing(sqlite3.connect(store.database)) as opened, opened:
        opened.execute("DELETE FROM ValidPaths")
    with pytest.raises(PathNotValid):
        database.write_database(store, closure, tmp_path)
    shutil.rmtree(store.state)
    with pytest.raises(PathNotValid):
        database.write_database(store, closure, tmp_path)


@pytest.mark.parametrize("fault", ["store", "directory"])
def test_what_keeps_a_database_from_being_written_is_told_from_what_keeps_one_from_being_read(
    tmp_path: Path, fault: str
) -> None:
    store = stored(tmp_path, info(NOBODY))
    closure = database.query_closure(store, NOBODY)
    if fault == "store":
        store.database.write_bytes(b"this is no database at all" * 100)
        with pytest.raises(DatabaseDamaged, match=re.escape(str(store.database))):
            database.write_database(store, closure, tmp_path)
    else:
        with pytest.raises(OutOfSpace, match=re.escape(f"cannot be written to {tmp_path}/missing")):
            database.write_database(store, closure, tmp_path / "missing")


async def test_an_attempt_that_was_cut_short_is_written_over(room: Room, tmp_path: Path) -> None:
    closure = database.query_closure(room.store, await room.demo("file"))
    (tmp_path / "db.sqlite").write_bytes(b"half a database")
    database.write_database(room.store, closure, tmp_path)
    (tmp_path / "clean").mkdir()
    database.write_database(room.store, closure, tmp_path / "clean")
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
        database.write_database(room.store, closure, state / "db")
        infos = infos_of(room.store, closure)

        root = str(closure.root)
        expected = [str(one.path) for one in closure.paths]
        assert sorted(other.lines("nix-store", "-qR", root)) == expected
        other.run("nix-store", "--verify", "--check-contents")
        assert sorted(other.lines("nix", "path-info", "-r", root)) == expected
        for one in infos:
            told = other.lines("nix-store", "-q", "--references", str(one.path))
            assert sorted(told) == [str(reference) for reference in one.references]
        (tmp_path / "added.txt").write_text("added")
        [added] = other.lines("nix-store", "--add", str(tmp_path / "added.txt"))
        assert (objects / Path(added).name).read_text() == "added"
        assert database.is_valid(Store.chroot(other.root), StorePath.parse(added)), "and we read what Nix then wrote"
        copied = infos_of(Store.chroot(other.root), closure)
        assert copied == [dataclasses.replace(one, registration_time=1) for one in infos]

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
    database.write_database(room.store, closure, tmp_path / "db")
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
