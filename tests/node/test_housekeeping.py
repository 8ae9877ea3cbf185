"""Keeping room on the disk: when, how often and for how long; and once for real, on a small disk with a real Nix."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cknix_csi.api.storepath import StorePath
from cknix_csi.api.watermarks import Watermark, Watermarks
from cknix_csi.csi.housekeeping import Housekeeping
from cknix_csi.nix.collection import Collected, CollectionFailed, Collector, Pace, Space
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.store import Store
from cknix_csi.nix.wants import PATIENCE_SECONDS, WantedClosures, Wants
from cknix_csi.volumes.ledger import ClosureUse, Ledger, Published
from tests import nixes
from tests.nix.disks import MEBIBYTE, fill, on_small_disk
from tests.nixes import NixEnv

TOTAL = 1000
LIMIT = 10.0
OLD, NEW = (StorePath(letter * 32, "closure") for letter in "ab")


class FakeStore:
    """A disk of 1000 bytes; *garbage* bytes of what is used can be collected, *warm* ones after they are let go."""

    def __init__(self, free: int, garbage: int = 0, warm: int = 0) -> None:
        self.free = free
        self.garbage = garbage
        self.warm = warm
        self.looks = 0
        self.collections: list[tuple[int, list[StorePath]]] = []
        self.wants: list[Wants] = []
        self.trash = 0
        """Bytes that are free once it is emptied."""
        self.spared: tuple[StorePath, ...] = ()
        self.forgotten = 0
        self.held = 0
        self.unholdable: Exception | None = None
        self.error: Exception | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        """Happens during each collection."""
        self.unused = [
            ClosureUse(OLD.basename, 1.0, 1.0, 1),
            ClosureUse("not a closure's id", 1.5, 1.5, 1),
            ClosureUse(NEW.basename, 2.0, 2.0, 1),
        ]

    async def space(self) -> Space:
        self.looks += 1
        return Space(self.free, TOTAL)

    async def collect(self, want: int, order: Sequence[StorePath], wants: Callable[[], Wants]) -> Collected:
        self.collections.append((want, list(order)))
        self.wants.append(wants())
        if self.error is not None:
            raise self.error
        self.meanwhile()
        freed = min(self.garbage, max(want - self.free, 0))
        self.garbage -= freed
        self.free += freed
        return Collected(freed, freed, (OLD,) if freed else (), self.spared)

    def closures_by_last_use(self) -> list[ClosureUse]:
        return self.unused

    async def hold_mounted(self) -> None:
        if self.unholdable is not None:
            raise self.unholdable
        self.held += 1

    async def forget_unused(self) -> list[str]:
        self.forgotten += 1
        self.garbage, self.warm, warm = self.garbage + self.warm, 0, self.warm
        return [NEW.basename] if warm else []

    async def emptied(self) -> None:
        await asyncio.sleep(0)
        self.free, self.trash = self.free + self.trash, 0

    async def looked(self, times: int = 2) -> None:
        """Wait until it has looked at the disk so often again."""
        wanted = self.looks + times
        async with asyncio.timeout(LIMIT):
            while self.looks < wanted:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def keeping(
    store: FakeStore,
    low: str = "10%",
    high: str = "20%",
    *,
    check: float = 0.005,
    longest: float = 60.0,
    released: Callable[[], int] = lambda: 0,
) -> AsyncIterator[Housekeeping]:
    housekeeping = Housekeeping(
        store=store,
        uses=store,
        volumes=store,
        watermarks=Watermarks(Watermark.parse(low), Watermark.parse(high)),
        released=released,
        check_seconds=check,
        longest_pause=longest,
    )
    running = asyncio.create_task(housekeeping.run())
    try:
        yield housekeeping
        assert not running.done(), running.exception()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


# -- when


async def test_a_disk_with_room_is_only_looked_at() -> None:
    store = FakeStore(free=100, garbage=900)
    async with keeping(store):
        await store.looked(5)
    assert store.collections == []


async def test_below_the_low_mark_it_collects_up_to_the_high_mark_the_oldest_first() -> None:
    store = FakeStore(free=99, garbage=900)
    async with keeping(store):
        await store.looked(5)
    assert store.collections == [(200, [OLD, NEW])]
    assert store.free == 200
    assert store.held == 1, "what is mounted is held first"
    assert store.forgotten == 0, "views that wait for their next pod are not touched without need"


@pytest.mark.parametrize("error", [CollectionFailed("no table"), OSError("no space for a root")])
async def test_nothing_is_collected_while_nobody_can_hold_what_is_mounted(error: Exception) -> None:
    store = FakeStore(free=99, garbage=900)
    store.unholdable = error
    async with keeping(store, longest=0.01):
        await store.looked(5)
    assert store.collections == []


async def test_what_has_not_been_enough_is_doubled_whatever_the_marks_say() -> None:
    store = FakeStore(free=300, garbage=900)
    async with keeping(store, check=0.05) as housekeeping:
        await store.looked(1)
        housekeeping.out_of_space()
        await store.looked(1)
        async with asyncio.timeout(LIMIT):
            while not store.collections:
                await asyncio.sleep(0.001)
    assert store.collections == [(600, [OLD, NEW])]


async def test_what_fails_while_room_is_made_asks_for_no_more() -> None:
    store = FakeStore(free=99, garbage=900)
    async with keeping(store) as housekeeping:
        store.meanwhile = housekeeping.out_of_space
        await store.looked(8)
    assert [want for want, _ in store.collections] == [200]


async def test_a_store_without_volumes_is_collected_in_any_order() -> None:
    store = FakeStore(free=99, garbage=900)
    housekeeping = Housekeeping(store=store, watermarks=Watermarks(), check_seconds=0.005)
    running = asyncio.create_task(housekeeping.run())
    await store.looked(4)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert store.collections == [(200, [])]


async def test_views_kept_warm_are_let_go_where_garbage_is_not_enough() -> None:
    store = FakeStore(free=50, garbage=10, warm=900)
    async with keeping(store):
        await store.looked(5)
    assert [want for want, _ in store.collections] == [200, 200]
    assert (store.free, store.forgotten) == (200, 1)


async def test_a_low_mark_of_nothing_switches_it_off() -> None:
    store = FakeStore(free=0, garbage=900)
    async with keeping(store, "0", "20%") as housekeeping:
        await store.looked()
        housekeeping.out_of_space()
        await store.looked()
    assert store.collections == []


async def test_what_fails_for_want_of_space_is_looked_after_at_once_and_up_to_the_high_mark() -> None:
    store = FakeStore(free=150, garbage=900)
    async with keeping(store, check=60.0) as housekeeping:
        await asyncio.sleep(0.01)
        assert store.collections == []
        housekeeping.out_of_space()
        await store.looked(1)
        async with asyncio.timeout(LIMIT):
            while store.free < 200:
                await asyncio.sleep(0.001)


async def test_where_space_is_wanted_again_and_again_collections_keep_their_distance() -> None:
    store = FakeStore(free=0)
    async with keeping(store, check=0.2) as housekeeping:
        end = asyncio.get_running_loop().time() + 0.5
        while asyncio.get_running_loop().time() < end:
            housekeeping.out_of_space()
            await asyncio.sleep(0.001)
    assert 2 <= len(store.collections) <= 3


async def test_where_nothing_can_be_freed_it_says_so_once_and_tries_ever_more_rarely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FakeStore(free=50)
    async with keeping(store):
        await store.looked(60)
    assert 2 <= len(store.collections) <= 6, "of 60 looks"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("50 B of 1000 B are free (CKNIX_GC_LOW is 10%) and there is no garbage to collect: ")


async def test_room_that_others_make_ends_the_pause_and_the_next_shortage_is_said_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FakeStore(free=50)
    async with keeping(store):
        await store.looked(10)
        store.free = 500
        await store.looked()
        before = len(store.collections)
        store.free = 50
        await store.looked(3)
        assert len(store.collections) > before
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 2


async def test_a_pause_has_its_longest() -> None:
    store = FakeStore(free=50)
    async with keeping(store, longest=0.0):
        await store.looked(20)
    assert len(store.collections) >= 10


@pytest.mark.parametrize("error", [CollectionFailed("Nix is on fire"), OSError("the disk is")])
async def test_a_failure_is_said_once_and_tried_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore(free=50, garbage=900)
    store.error = error
    async with keeping(store, longest=0.01):
        await store.looked(8)
        store.error = None
        await store.looked(10)
    assert store.free == 200
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"collecting garbage failed: {error}; trying again")


async def test_a_shortage_above_the_marks_that_stays_is_said_once_however_often_it_is_met(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FakeStore(free=300)
    store.spared = (OLD,)
    async with keeping(store) as housekeeping:
        for _ in range(3):
            housekeeping.out_of_space(OLD, needed=600)
            await store.looked(5)
    assert len(store.collections) == 3
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


async def test_what_is_being_deleted_is_waited_for_before_anything_is_called_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FakeStore(free=10)
    store.trash = 700
    async with keeping(store) as housekeeping:
        housekeeping.out_of_space(OLD, needed=600)
        await store.looked(5)
    assert store.collections == [], "there is room by now"
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


async def test_room_that_comes_while_it_collects_is_no_lack_of_garbage(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore(free=50)

    def others_make_room() -> None:
        store.free = 500

    store.meanwhile = others_make_room
    async with keeping(store):
        await store.looked(5)
    assert len(store.collections) == 1
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


async def test_so_much_is_made_free_as_what_has_failed_needs() -> None:
    store = FakeStore(free=300, garbage=600)
    async with keeping(store, check=0.05) as housekeeping:
        await store.looked(1)
        housekeeping.out_of_space(OLD, needed=700)
        housekeeping.out_of_space(NEW, needed=500)
        await store.looked(2)
    assert [want for want, _ in store.collections] == [700]
    assert store.free == 700


async def test_for_what_no_disk_of_this_size_can_hold_nothing_goes() -> None:
    store = FakeStore(free=300, garbage=600)
    async with keeping(store) as housekeeping:
        housekeeping.out_of_space(OLD, needed=TOTAL + 1)
        await store.looked(3)
    assert store.collections == []


async def test_what_is_waited_for_is_asked_to_be_left_until_it_is_had() -> None:
    store = FakeStore(free=50, garbage=900)
    async with keeping(store) as housekeeping:
        housekeeping.out_of_space(OLD)
        housekeeping.out_of_space(NEW, began=17.5)
        await store.looked(2)
        housekeeping.had(NEW)
        store.free = 50
        await store.looked(5)
    assert store.wants[0] == Wants(frozenset((OLD, NEW)), since=17.5)
    assert store.wants[-1] == Wants(frozenset((OLD,)), since=None)


async def test_where_only_what_is_waited_for_could_go_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore(free=50)
    store.spared = (OLD,)
    async with keeping(store) as housekeeping:
        housekeeping.out_of_space(OLD)
        await store.looked(20)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"no garbage to collect but what volumes wait for that there is no room for ({OLD.basename})" in warning


def test_a_want_ends_some_minutes_after_its_last_failure() -> None:
    now = 100.0
    wanted = WantedClosures(lambda: now)
    wanted.missed(OLD, 5.0)
    wanted.missed(NEW, None)
    now += PATIENCE_SECONDS - 1
    wanted.missed(OLD, 9.0)
    assert wanted.now() == Wants(frozenset((OLD, NEW)), since=5.0), "its parts have come since the first try"
    now += 2
    assert wanted.now() == Wants(frozenset((OLD,)), since=5.0)
    now += PATIENCE_SECONDS
    assert wanted.now() == Wants()


async def test_a_release_ends_the_pause_and_collections_keep_their_distance_all_the_same() -> None:
    store, released = FakeStore(free=50), 0
    async with keeping(store, check=0.05, longest=1000.0, released=lambda: released):
        async with asyncio.timeout(LIMIT):
            while len(store.collections) < 2:
                await asyncio.sleep(0.001)
        before = len(store.collections)
        await store.looked(3)
        assert len(store.collections) == before, "it pauses"
        released += 1
        store.garbage = 900
        await store.looked(2)
        assert store.free == 200
        store.free, store.garbage = 50, 0
        made = len(store.collections)
        started = asyncio.get_running_loop().time()
        while len(store.collections) < made + 3:
            released += 1
            await asyncio.sleep(0.001)
        assert asyncio.get_running_loop().time() - started >= 2 * 0.05


# -- the marks


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [
        ("10%", 1000, 100),
        ("2.5%", 1000, 25),
        ("10 %", 1000, 100),
        ("0", 1000, 0),
        ("512", 1000, 512),
        ("5000", 1000, 1000),
        ("1k", 10**9, 1000),
        ("1Ki", 10**9, 1024),
        ("1.5Mi", 10**9, 1_572_864),
        ("5M", 10**9, 5_000_000),
        ("1e6", 10**9, 1_000_000),
        ("5Gi", 10**12, 5_368_709_120),
        ("5G", 10**12, 5_000_000_000),
        ("1Ti", 10**15, 1_099_511_627_776),
    ],
)
def test_a_mark_is_a_share_or_a_quantity(text: str, total: int, expected: int) -> None:
    assert Watermark.parse(text).of(total) == expected


@pytest.mark.parametrize("text", ["", "%", "ten", "10%%", "-5Gi", "5gi", "5 Gi", "5Gib", "5Gi%", "10%5"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is neither a share of the disk, such as 10%, nor a size, such as 5Gi"):
        Watermark.parse(text)


@pytest.mark.parametrize("text", ["100%", "1000%"])
def test_a_whole_disk_cannot_be_kept_free(text: str) -> None:
    with pytest.raises(ValueError, match="must be less than 100%"):
        Watermark.parse(text)


@pytest.mark.parametrize(("low", "high"), [("20%", "10%"), ("10%", "10%"), ("5Gi", "1Gi"), ("1Gi", "1024Mi")])
def test_the_low_mark_must_be_the_lower_one(low: str, high: str) -> None:
    with pytest.raises(ValueError, match=r"^CKNIX_GC_LOW \(.*\) must be less than CKNIX_GC_HIGH \(.*\)$"):
        Watermarks(Watermark.parse(low), Watermark.parse(high))


async def test_a_share_and_a_size_are_put_in_order_on_the_disk() -> None:
    store = FakeStore(free=50, garbage=900)
    async with keeping(store, "30%", "100"):
        await store.looked(4)
    assert store.collections == [(300, [OLD, NEW])]


# -- for real


def test_a_node_whose_disk_fills_up_gives_up_its_oldest_closure_and_nothing_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = NixEnv(nixes.nix("trixie"), tmp_path / "nix")
    for name in ("PATH", "NIX_CONF_DIR"):
        monkeypatch.setenv(name, env.environ[name])

    async def body() -> None:
        names = ["A", "B", "C"]
        sizes = {f"{part}{number}": 2 * MEBIBYTE for part in "abc" for number in range(5)}
        paths = fill(env, {name: [part for part in sizes if part[0] == name.lower()] for name in names}, sizes)
        store = Store.chroot(env.root)
        GcRoots(store, "closures").add(paths["C"].basename, paths["C"])

        def valid() -> set[str]:
            ours = {str(path): name for name, path in paths.items()}
            return {ours[path] for path in env.lines("nix", "path-info", "--all") if path in ours}

        async with Ledger(env.root / "state/ledger.sqlite") as ledger:
            for name in ("C", "A", "B"):  # C is the oldest, but in use
                ledger.record_publish(Published(f"/{name}", name, paths[name].basename, False))
            ledger.record_unpublish("/A")
            ledger.record_unpublish("/B")
            collector = Collector(store, env.directory / "home", Pace(paths=2, pause=0.0))
            # With 30 MiB of data on 64 MiB there is room at first.
            low, high = "12Mi", "32Mi"
            housekeeping = Housekeeping(
                store=collector,
                uses=ledger,
                volumes=FakeStore(free=0),
                watermarks=Watermarks(Watermark.parse(low), Watermark.parse(high)),
                check_seconds=0.1,
            )
            running = asyncio.create_task(housekeeping.run())
            try:
                await asyncio.sleep(0.5)
                assert valid() == set(paths), "nothing goes while there is room"
                filler = env.root / "somebody-elses-data"
                with filler.open("wb") as file:
                    excess = (await collector.space()).free - 11 * MEBIBYTE
                    os.posix_fallocate(file.fileno(), 0, excess)
                async with asyncio.timeout(30):
                    while (await collector.space()).free < 32 * MEBIBYTE:
                        await asyncio.sleep(0.05)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            left = valid()
            print(sorted(left))
            assert not any(name.lower().startswith("a") for name in left), "the oldest goes first, whole"
            assert {name for name in left if name.lower().startswith("c")} == {"C", "c0", "c1", "c2", "c3", "c4"}
            b_left = {name for name in left if name.startswith("b")}
            assert 3 <= len(b_left) < 5, "of the next only as much as was needed"
            env.run("nix-store", "--verify", "--check-contents")

    try:
        on_small_disk(env.root, "ext4", 64, body)
    finally:
        env.destroy()
