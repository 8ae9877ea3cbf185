"""Making room in a store, with every supported Nix: what goes, in which order, and what is never touched."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.cache.signing import generate_key
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.collection import CollectionFailed, Collector, Graph, Pace, Space, plan
from cknix_csi.nix.database import DatabaseUnreadable, query_closure
from cknix_csi.nix.fetcher import StoreFetcher
from cknix_csi.nix.fetcherrors import PathCollected
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.substituters import CacheEndpoint
from cknix_csi.nix.wants import Wants
from tests.nix.cache_process import cache_process
from tests.nix.disks import MEBIBYTE, fill, on_small_disk
from tests.nix.room import Room, processes_of, wrap
from tests.nixes import NixEnv

EVERYTHING = 1 << 60
"""More bytes than any disk has: all garbage must go."""
FAST = Pace(pause=0.0)
ROUNDS = int(os.environ.get("CKNIX_TEST_ROUNDS", "2"))
MANY = 20_000


@pytest.fixture
def room(nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(nix_env, monkeypatch)


# -- what the tests arrange


@dataclass
class Shelf:
    """A store with closures A, B and C, last used in this order; C is in use.  A and B share a path."""

    env: NixEnv
    collector: Collector
    paths: dict[str, StorePath]
    roots: GcRoots

    @classmethod
    def fill(cls, room: Room, size: int = 8 * MEBIBYTE) -> Shelf:
        paths = fill(
            room.env,
            {"A": ["onlyA", "common"], "B": ["onlyB", "common"], "C": ["onlyC"]},
            {"onlyA": size, "onlyB": size, "onlyC": size, "common": size, "nobodys": size},
        )
        roots = GcRoots(room.store, "closures")
        roots.add(paths["C"].basename, paths["C"])
        return cls(room.env, Collector(room.store, room.env.directory / "home", FAST), paths, roots)

    @property
    def order(self) -> list[StorePath]:
        return [self.paths["A"], self.paths["B"], self.paths["C"]]

    def there(self) -> set[str]:
        """The names of all paths that Nix calls valid and that are on the disk."""
        return {
            name
            for name, path in self.paths.items()
            if self.env.run("nix-store", "--check-validity", str(path), check=False).returncode == 0
            and os.path.lexists(self.env.physical(str(path)))
        }

    def require_sound(self) -> None:
        """Nix itself finds nothing missing, changed or left over."""
        check = self.env.run("nix-store", "--verify", "--check-contents")
        assert "error" not in check.stderr
        assert "warning" not in check.stderr


async def free(shelf: Shelf) -> int:
    return (await shelf.collector.space()).free


# -- what goes, and in which order


@pytest.mark.parametrize("kind", [pytest.param("tmpfs", marks=pytest.mark.one_nix), "ext4"])
def test_what_was_used_least_recently_goes_first_until_there_is_room(room: Room, kind: str) -> None:
    async def body() -> None:
        shelf = Shelf.fill(room)
        everything = shelf.there()
        assert everything == {"A", "B", "C", "onlyA", "onlyB", "onlyC", "common", "nobodys"}

        collected = await shelf.collector.collect(await free(shelf) + 6 * MEBIBYTE, shelf.order)
        assert shelf.there() == everything - {"nobodys"}, "first what belongs to no closure"
        assert collected.closures == ()
        assert collected.paths == 1

        collected = await shelf.collector.collect(await free(shelf) + 6 * MEBIBYTE, shelf.order)
        assert shelf.there() == everything - {"nobodys", "A", "onlyA"}, "what B needs as well goes with B"
        assert collected.closures == (shelf.paths["A"],)
        assert collected.paths == 2
        # Nix gives up its reserve of 8 MiB as well, until it is started again.
        assert 6 * MEBIBYTE <= collected.bytes_freed <= 18 * MEBIBYTE

        collected = await shelf.collector.collect(EVERYTHING, shelf.order)
        assert shelf.there() == {"C", "onlyC"}, "what is in use stays, whatever is wanted"
        assert collected.closures == (shelf.paths["B"],)
        assert (await shelf.collector.collect(EVERYTHING, shelf.order)).paths == 0
        shelf.require_sound()

    on_small_disk(room.env.root, kind, 64, body)


@pytest.mark.one_nix
async def test_enough_room_is_left_alone(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf.fill(room, 1000)
    before = shelf.there()
    wrap(room.env, monkeypatch, "echo started >> $directory/calls; exit 1")
    collected = await shelf.collector.collect(1, shelf.order)
    assert (collected.bytes_freed, collected.paths, collected.closures) == (0, 0, ())
    assert shelf.there() == before
    assert not (room.env.directory / "calls").exists(), "no process is spent on it"


@pytest.mark.one_nix
async def test_a_store_that_is_not_there_yet_has_no_garbage(room: Room) -> None:
    collector = Collector(room.store, room.env.directory / "home", FAST)
    assert (await collector.collect(EVERYTHING, [])).paths == 0
    assert (await collector.space()).total > 0


@pytest.mark.parametrize("kind", [pytest.param("tmpfs", marks=pytest.mark.one_nix), "ext4"])
def test_a_disk_that_is_full_to_the_last_byte_can_be_emptied(room: Room, kind: str) -> None:
    async def body() -> None:
        shelf = Shelf.fill(room)
        with (room.env.root / "somebody-elses-data").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert await free(shelf) == 0
        collected = await shelf.collector.collect(18 * MEBIBYTE, shelf.order)
        assert await free(shelf) >= 18 * MEBIBYTE
        assert collected.closures == (shelf.paths["A"],)
        assert shelf.there() == {"B", "C", "onlyB", "onlyC", "common"}

    on_small_disk(room.env.root, kind, 64, body)


def test_an_optimised_store_gives_its_space_back(room: Room) -> None:
    """Its files are linked from ``.links`` as well: deleting paths alone frees nothing."""

    async def body() -> None:
        shelf = Shelf.fill(room)
        room.env.run("nix-store", "--optimise")
        before = await free(shelf)
        collected = await shelf.collector.collect(EVERYTHING, shelf.order)
        assert shelf.there() == {"C", "onlyC"}
        assert await free(shelf) >= before + 31 * MEBIBYTE
        assert collected.bytes_freed >= 31 * MEBIBYTE
        shelf.require_sound()

    on_small_disk(room.env.root, "ext4", 64, body)


class LateCollector(Collector):
    """On a file system such as btrfs, which gives space back with its next transaction, half a minute later."""

    seen: Space | None = None

    async def space(self) -> Space:
        synced = self._home.parent / "synced"
        if self.seen is None or synced.exists():
            synced.unlink(missing_ok=True)
            self.seen = await super().space()
        return self.seen


@pytest.mark.one_nix
def test_space_that_shows_up_late_costs_no_closure(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        shelf = Shelf.fill(room)
        wrap(room.env, monkeypatch, "touch $directory/synced", "sync")
        shelf.collector = LateCollector(room.store, room.env.directory / "home", FAST)
        await shelf.collector.collect(await free(shelf) + 14 * MEBIBYTE, shelf.order)
        assert shelf.there() == {"B", "C", "onlyB", "onlyC", "common"}

    on_small_disk(room.env.root, "ext4", 64, body)


async def test_what_nobody_has_registered_is_left_alone(room: Room) -> None:
    shelf = Shelf.fill(room, 1000)
    unknown = room.env.root / "nix/store/00000000000000000000000000000000-half-unpacked"
    (unknown / "deep/er").mkdir(parents=True)
    lock = room.env.root / "nix/store/10000000000000000000000000000000-half-unpacked.lock"
    lock.touch()
    assert f"/nix/store/{unknown.name}" in room.env.lines("nix-store", "--gc", "--print-dead")
    await shelf.collector.collect(EVERYTHING, shelf.order)
    assert shelf.there() == {"C", "onlyC"}
    assert (unknown / "deep/er").exists()
    assert lock.exists()


@pytest.mark.one_nix
async def test_what_a_view_shows_stays_though_the_database_has_lost_it(room: Room) -> None:
    shelf = Shelf.fill(room, 1000)
    shown = shelf.paths["C"]
    view = room.env.root / "views" / shown.basename / "meta"
    await StoreClosures(room.store).write_state(query_closure(room.store, shown), view)
    shutil.rmtree(room.store.database.parent)
    new = fill(room.env, {"D": ["onlyD"]}, {"onlyD": 1000})
    assert str(shelf.paths["onlyC"]) in room.env.lines("nix-store", "--gc", "--print-dead")
    collected = await shelf.collector.collect(EVERYTHING, [*shelf.order, new["D"]])
    assert shelf.there() == {"C", "onlyC"}
    assert collected.closures == (new["D"],)
    assert os.path.lexists(room.env.physical(str(shelf.paths["A"]))), "what is not registered is left alone"


@pytest.mark.one_nix
async def test_nothing_goes_while_nobody_can_say_what_a_view_shows(room: Room) -> None:
    shelf = Shelf.fill(room, 1000)
    before = shelf.there()
    state = room.env.root / "views" / shelf.paths["C"].basename / "meta/nix/var/nix/db/db.sqlite"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"not a database")
    with pytest.raises(DatabaseUnreadable):
        await shelf.collector.collect(EVERYTHING, shelf.order)
    assert shelf.there() == before


async def test_derivations_and_their_sources_go_with_what_they_built(room: Room) -> None:
    def with_deriver(path: StorePath) -> set[str]:
        (derivation,) = room.env.lines("nix-store", "--query", "--deriver", str(path))
        return {*room.closure(path), *room.closure(derivation)}

    mine, _ = await room.build(f'(import <cknix-demo> {{ }}).greet "{os.urandom(8).hex()}"')
    # What other tests on this machine build with as well may be in use: Nix looks for that in /proc.
    alone = with_deriver(mine) - with_deriver(await room.demo("hello"))
    assert {path[44:] for path in alone} == {"hello", "hello.drv", "hello-message"}
    collector = Collector(room.store, room.env.directory / "home", Pace(paths=1, pause=0))
    await collector.collect(EVERYTHING, [mine])
    assert [path for path in sorted(alone) if room.is_valid(path)] == []


@pytest.mark.one_nix
def test_what_somebody_waits_for_stays_and_the_parts_of_what_is_still_to_come_go_last(room: Room) -> None:
    async def body() -> None:
        shelf = Shelf.fill(room)
        everything = shelf.there()
        began = time.time() + 100
        with closing(sqlite3.connect(room.store.database)) as database, database:
            for name in ("nobodys", "onlyA"):  # as if they had been fetched just now
                path = str(shelf.paths[name])
                database.execute("UPDATE ValidPaths SET registrationTime = ? WHERE path = ?", (began, path))
        wants = Wants(frozenset((shelf.paths["B"], StorePath("0" * 32, "still-to-come"))), began)

        collected = await shelf.collector.collect(await free(shelf) + 1, [], lambda: wants)
        assert shelf.there() == everything - {"A"}, "which nobody wants, and which has not come just now"
        assert collected.spared == (shelf.paths["B"],)

        collected = await shelf.collector.collect(EVERYTHING, shelf.order, lambda: wants)
        assert shelf.there() == {"B", "onlyB", "common", "C", "onlyC"}
        assert collected.spared == (shelf.paths["B"],)

        collected = await shelf.collector.collect(EVERYTHING, shelf.order, Wants)
        assert shelf.there() == {"C", "onlyC"}
        assert collected.spared == ()
        shelf.require_sound()

    on_small_disk(room.env.root, "tmpfs", 64, body)


# -- who lives while it runs


async def test_what_comes_into_use_meanwhile_stays_and_the_rest_goes(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf.fill(room, 1000)
    root = room.store.gcroots / "closures" / shelf.paths["B"].basename
    wrap(
        room.env,
        monkeypatch,
        f"""
        case $1 in --delete)
          echo $(($# - 6)) >> $directory/deletions
          ln -sfn {shelf.paths["B"]} {root};;
        esac
        exec $real "$@"
        """,
    )
    collected = await shelf.collector.collect(EVERYTHING, shelf.order)
    assert shelf.there() == {"B", "C", "onlyB", "onlyC", "common"}
    assert collected.closures == (shelf.paths["A"],)
    assert collected.paths == 3
    shelf.require_sound()


@pytest.mark.one_nix
async def test_one_path_that_comes_into_use_keeps_none_of_those_that_go_with_it(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = fill(room.env, {"all": [f"p{n}" for n in range(6)]}, {f"p{n}": 100 for n in range(6)})
    root = room.store.gcroots / "wanted"
    root.parent.mkdir(parents=True)
    wrap(room.env, monkeypatch, f'[ $1 = --delete ] && ln -sfn {paths["p3"]} {root}; exec $real "$@"')
    collector = Collector(room.store, room.env.directory / "home", FAST)
    collected = await collector.collect(EVERYTHING, [paths["all"]])
    assert [name for name, path in paths.items() if room.is_valid(path)] == ["p3"]
    assert collected.paths == 6


@pytest.mark.one_nix
async def test_no_command_deletes_more_than_its_pace_allows(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = fill(room.env, {"all": [f"p{n}" for n in range(11)]}, {f"p{n}": 100 for n in range(11)})
    wrap(room.env, monkeypatch, '[ $1 = --delete ] && echo $(($# - 6)) >> $directory/deletions; exec $real "$@"')
    collector = Collector(room.store, room.env.directory / "home", Pace(paths=5, pause=0))
    collected = await collector.collect(EVERYTHING, [paths["all"]])
    assert (room.env.directory / "deletions").read_text().split() == ["5", "5", "2"]
    assert collected.paths == 12


async def test_a_fetch_survives_any_number_of_collections(room: Room, tmp_path: Path) -> None:
    other = NixEnv(room.env.nix, tmp_path / "source")
    try:
        wanted = fill(other, {"W": [f"w{n}" for n in range(40)]}, {f"w{n}": 200_000 for n in range(40)})
        key = generate_key("cknix-cache-1")
        with cache_process(other.root, key) as cache:

            async def endpoints() -> list[CacheEndpoint]:
                return [CacheEndpoint(cache.url, key.public)]

            fetcher = StoreFetcher(room.nix(), endpoints)
            collector = Collector(room.store, room.env.directory / "home", FAST)
            collections, collected = 0, 0

            async def collect() -> None:
                nonlocal collections, collected
                while True:
                    collected += (await collector.collect(EVERYTHING, [])).paths
                    collections += 1

            fill(room.env, {"G": ["garbage"]}, {"garbage": 1000})
            await fetcher.hold(wanted["W"])
            collecting = asyncio.create_task(collect())
            try:
                async with asyncio.timeout(120):
                    while not room.is_valid(wanted["W"]):  # kubelet asks again
                        with suppress(PathCollected):
                            await fetcher.fetch(wanted["W"], lambda _: None)
                during = collections
            finally:
                collecting.cancel()
                await asyncio.gather(collecting, return_exceptions=True)
            print(f"{during} collections during the fetch")
            assert during >= 1
            assert collected >= 2
            assert len(room.closure(wanted["W"])) == 41
            room.env.run("nix-store", "--verify", "--check-contents")
    finally:
        other.destroy()


async def test_what_is_taken_into_use_while_an_administrator_collects_stays_or_is_known_to_be_gone(room: Room) -> None:
    """Nix deletes a path with all that refers to it, and hears nothing of those that come into use meanwhile."""
    closures = StoreClosures(room.store)
    for number in range(ROUNDS):
        # The collector begins with one of the many, and so with all of the users.
        expression = f"""
            let many = map (n: builtins.toFile "part-${{toString n}}" "{number}") (builtins.genList (n: n) 200);
                user = n: builtins.toFile "user-${{toString n}}" "{number} ${{toString many}}";
            in builtins.concatStringsSep " " (map user (builtins.genList (n: n) 200))
        """
        listed = room.env.run("nix-instantiate", "--eval", "--strict", "--read-write-mode", "--expr", expression)
        # Of those it deletes the one of the lowest hash last.
        user = StorePath.parse(min(listed.stdout.strip().strip('"').split()))
        with subprocess.Popen(
            [room.env.nix.program("nix-store"), "--gc", "--store", room.env.store],
            env=room.env.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as collector:
            assert collector.stderr is not None
            for line in collector.stderr:
                if line.startswith("deleting '/nix/"):
                    break
            await closures.hold(user.basename, user)
            found = await closures.is_valid(user)
            collector.communicate()
        assert await closures.is_valid(user) == found
        await closures.release(user.basename)
        room.env.run("nix-store", "--gc")


@pytest.mark.one_nix
async def test_a_closure_that_is_wanted_during_a_big_collection_does_not_wait_for_it(room: Room) -> None:
    count = 1500
    expression = f"map (n: builtins.toFile (toString n) (toString n)) (builtins.genList (n: n) {count})"
    room.env.run("nix-instantiate", "--eval", "--strict", "--read-write-mode", "--expr", expression)
    shelf = Shelf.fill(room, 1000)
    kept = shelf.paths["B"]
    collector = Collector(room.store, room.env.directory / "home", Pace(pause=0.05))
    began = time.monotonic()
    collecting = asyncio.create_task(collector.collect(EVERYTHING, shelf.order))
    # B itself is wanted all the time from its first moment on, so that it stays while others come and go.
    await asyncio.to_thread(shelf.roots.add, "wanted/0", kept)
    waits = []
    number = 0
    while not collecting.done():
        number += 1
        start = time.monotonic()
        await asyncio.to_thread(shelf.roots.add, f"wanted/{number}", kept)
        closure = await asyncio.to_thread(query_closure, room.store, kept)
        waits.append(time.monotonic() - start)
        assert len(closure.paths) == 3
        await asyncio.sleep(0.01)
    took = time.monotonic() - began
    collected = await collecting
    waits.sort()
    print(
        f"{room.env.nix.name}: {collected.paths} paths collected in {took:.1f} s; "
        f"{len(waits)} closures rooted and queried meanwhile, median {waits[len(waits) // 2] * 1000:.0f} ms, "
        f"worst {waits[-1] * 1000:.0f} ms"
    )
    assert collected.paths >= count
    assert shelf.there() == {"B", "C", "onlyB", "onlyC", "common"}
    assert waits[len(waits) // 2] < 0.5
    assert waits[-1] < took / 2


@pytest.mark.one_nix
async def test_a_collection_that_is_cancelled_leaves_no_process_and_a_sound_store(room: Room) -> None:
    expression = "map (n: builtins.toFile (toString n) (toString n)) (builtins.genList (n: n) 600)"
    room.env.run("nix-instantiate", "--eval", "--strict", "--read-write-mode", "--expr", expression)
    shelf = Shelf.fill(room, 1000)
    store = room.env.root / "nix/store"
    before = len(os.listdir(store))
    collecting = asyncio.create_task(shelf.collector.collect(EVERYTHING, shelf.order))
    async with asyncio.timeout(30):
        while len(os.listdir(store)) > before - 50:
            await asyncio.sleep(0.001)
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    assert processes_of(room.store.uri) == []
    assert len(os.listdir(store)) > 8, "it was in the middle of it"
    shelf.require_sound()
    await shelf.collector.collect(EVERYTHING, shelf.order)
    assert shelf.there() == {"C", "onlyC"}


@pytest.mark.one_nix
async def test_what_a_collection_that_was_killed_left_half_deleted_goes_with_the_next(room: Room) -> None:
    """Nix forgets a path before it deletes it, and lists it then with what nobody knows."""
    many = room.env.directory / "many"
    many.mkdir()
    for number in range(MANY):
        (many / str(number)).touch()
    path = StorePath.parse(room.env.lines("nix-store", "--add", many)[0])
    physical = room.store.physical_path(path)
    unknown = room.store.physical / "00000000000000000000000000000000-half-unpacked"
    unknown.touch()
    collector = Collector(room.store, room.env.directory / "cknix-home", FAST)
    collecting = asyncio.create_task(collector.collect(EVERYTHING, []))

    def wait_until_it_is_in_the_middle() -> None:
        while len(os.listdir(physical)) == MANY:
            pass

    async with asyncio.timeout(30):
        await asyncio.to_thread(wait_until_it_is_in_the_middle)
    for process in processes_of(room.store.uri):
        os.kill(process, signal.SIGKILL)
    with pytest.raises(CollectionFailed):
        await collecting
    assert not room.is_valid(path)
    assert physical.exists()

    await Collector(room.store, room.env.directory / "cknix-home", FAST).collect(EVERYTHING, [])
    assert not physical.exists()
    assert unknown.exists()


async def test_what_a_view_shows_stays_though_all_roots_are_removed_in_the_middle(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf.fill(room, 1000)
    shown = shelf.paths["C"]
    view = room.env.root / "views" / shown.basename / "meta"
    await StoreClosures(room.store).write_state(query_closure(room.store, shown), view)
    wrap(room.env, monkeypatch, f'rm -rf {room.store.gcroots}; exec $real "$@"')
    collected = await shelf.collector.collect(EVERYTHING, shelf.order)
    assert str(shown) in room.env.lines("nix-store", "--gc", "--print-dead")
    assert shelf.there() == {"C", "onlyC"}
    assert collected.closures == (shelf.paths["A"], shelf.paths["B"])
    shelf.require_sound()


# -- when Nix itself fails


@pytest.mark.one_nix
async def test_an_error_of_nix_is_said(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf.fill(room, 1000)
    wrap(
        room.env,
        monkeypatch,
        "[ $1 = --gc ] && exec $real \"$@\"; echo deleting x >&2; echo 'error: on fire' >&2; exit 1",
    )
    with pytest.raises(CollectionFailed, match=r"^nix-store --delete failed in local\?root=.*: error: on fire$"):
        await shelf.collector.collect(EVERYTHING, shelf.order)
    wrap(room.env, monkeypatch, "echo 'error: on fire' >&2; exit 1")
    with pytest.raises(CollectionFailed, match=r"^nix-store --gc --print-dead failed in .*: error: on fire$"):
        await shelf.collector.collect(EVERYTHING, shelf.order)


@pytest.mark.one_nix
async def test_a_command_that_hangs_is_ended(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf.fill(room, 1000)
    wrap(room.env, monkeypatch, "exec sleep 1000")
    collector = Collector(room.store, room.env.directory / "home", Pace(deadline=0.2))
    with pytest.raises(CollectionFailed, match="nix-store --gc did not end within 0s"):
        await collector.collect(EVERYTHING, shelf.order)


# -- the order, as a pure function


@st.composite
def stores(draw: st.DrawFn) -> tuple[Graph, list[str], set[str]]:
    """A graph without circles, roots in order of use, and what is dead: all that no live root leads to."""
    count = draw(st.integers(1, 12))
    names = [f"/nix/store/{number:032d}-p" for number in range(count)]
    references = {
        names[number]: sorted(draw(st.sets(st.sampled_from(names[:number]), max_size=3))) for number in range(1, count)
    }
    roots = draw(st.lists(st.sampled_from(names), unique=True))
    alive = reachable(references, draw(st.sets(st.sampled_from(names), max_size=2)))
    return Graph(dict.fromkeys(names, 1), references), roots, set(names) - alive


def reachable(references: Mapping[str, Sequence[str]], roots: set[str] | list[str]) -> set[str]:
    found: set[str] = set()
    todo = list(roots)
    while todo:
        if (path := todo.pop()) not in found:
            found.add(path)
            todo += references.get(path, ())
    return found


@given(stores())
def test_a_plan_deletes_all_that_is_dead_each_referrer_first_each_path_with_its_last_user(
    case: tuple[Graph, list[str], set[str]],
) -> None:
    graph, roots, dead = case
    portions = plan(dead, graph, [StorePath.parse(root) for root in roots])
    flat = [path for portion in portions for path in portion.paths]
    assert sorted(flat) == sorted(dead)
    position = {path: place for place, path in enumerate(flat)}
    for referrer in dead:
        for reference in graph.references.get(referrer, ()):
            if reference in dead:
                assert position[referrer] < position[reference]
    last_user = {path: root for root in roots for path in reachable(graph.references, [root])}
    for portion in portions:
        assert {last_user.get(path) for path in portion.paths} == {portion.closure and str(portion.closure)}
    places = [-1 if portion.closure is None else roots.index(str(portion.closure)) for portion in portions]
    assert places == sorted(places)


@given(stores(), st.data())
def test_what_is_to_go_late_goes_after_all_else_with_what_it_refers_to(
    case: tuple[Graph, list[str], set[str]], data: st.DataObject
) -> None:
    graph, roots, dead = case
    late = data.draw(st.sets(st.sampled_from(sorted(dead)))) if dead else set()
    portions = plan(dead, graph, [StorePath.parse(root) for root in roots], late)
    flat = [path for portion in portions for path in portion.paths]
    assert sorted(flat) == sorted(dead)
    last = reachable(graph.references, list(late)) & dead
    assert set(flat[len(flat) - len(last) :]) == last
    position = {path: place for place, path in enumerate(flat)}
    for referrer in dead:
        assert all(
            position[referrer] < position[reference]
            for reference in graph.references.get(referrer, ())
            if reference in dead
        )
