"""The ledger: what it says after any history, and that whatever happens to its file costs no more than history."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cknix_csi.volumes import ledger as ledger_module
from cknix_csi.volumes.ledger import MIGRATIONS, ClosureUse, Ledger, Published
from cknix_csi.volumes.volumes import Publication
from tests.nix.disks import on_small_disk

ROOT = Path(__file__).parents[2]
TARGET = "/var/lib/kubelet/pods/5c3a0f4e-uid/volumes/kubernetes.io~csi/nix/mount"


class Clock:
    """One second later each time it is read."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state/ledger.sqlite"


def new(file: Path, *, boot: str = "boot-1", clock: Callable[[], float] | None = None, retry: float = 0.01) -> Ledger:
    return Ledger(file, boot_id=lambda: boot, clock=clock or Clock(), retry_seconds=retry)


def entry(target: str = TARGET, closure: str = "c1", *, writable: bool = False, **other: Any) -> Published:
    return Published(target, f"volume of {target}", closure, writable, **other)


async def contents(file: Path, **options: Any) -> tuple[list[Published], list[ClosureUse]]:
    """What a later process finds."""
    async with new(file, **options) as ledger:
        return ledger.publications(), ledger.closures_by_last_use()


def on_disk(file: Path) -> list[str]:
    """The targets in the file, read by SQLite itself."""
    with closing(sqlite3.connect(f"file:{file}?mode=rw", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return sorted(os.fsdecode(target) for (target,) in database.execute("SELECT target FROM publications"))


async def written(ledger: Ledger, file: Path, targets: list[str]) -> None:
    """Wait until the file holds exactly *targets*."""
    found: list[str] | str = "nothing yet"
    try:
        async with asyncio.timeout(10):
            while found != targets:
                await asyncio.sleep(0.005)
                try:
                    found = on_disk(file)
                except sqlite3.Error as error:
                    found = str(error)
    except TimeoutError:
        raise AssertionError(f"{file} has {found}, not {targets}") from None


# -- what it says


async def test_it_tells_what_is_published_and_what_was_used_when(file: Path) -> None:
    async with new(file) as ledger:
        ledger.record_publish(entry("/a", "c1", pod_name="web"), nar_size=700, paths=3)  # at 1001
        ledger.record_publish(entry("/b", "c2"))  # at 1002
        ledger.record_publish(entry("/c", "c1"))  # at 1003
        ledger.record_unpublish("/b")  # at 1004
    published, uses = await contents(file)
    assert published == [
        entry("/a", "c1", pod_name="web", published_at=1001.0),
        entry("/c", "c1", published_at=1003.0),
    ]
    assert uses == [ClosureUse("c2", 1002.0, 1004.0, 1), ClosureUse("c1", 1001.0, 1003.0, 2, 700, 3)]


async def test_a_closure_that_is_published_is_never_among_the_least_recently_used(file: Path) -> None:
    async with new(file) as ledger:
        ledger.record_publish(entry("/a", "old-but-in-use"))
        for number in range(3):
            ledger.record_publish(entry("/b", f"c{number}"))
            ledger.record_unpublish("/b")
        assert [use.closure_id for use in ledger.closures_by_last_use()] == ["c0", "c1", "c2", "old-but-in-use"]
        ledger.record_unpublish("/a")
        ledger.record_publish(entry("/b", "c0"))
        assert [use.closure_id for use in ledger.closures_by_last_use()] == ["c1", "c2", "old-but-in-use", "c0"]


async def test_a_second_publish_of_the_same_volume_is_no_new_use(file: Path) -> None:
    async with new(file) as ledger:
        for _ in range(3):
            ledger.record_publish(entry())
        assert ledger.publications() == [entry(published_at=1001.0)]
        assert ledger.closures_by_last_use() == [ClosureUse("c1", 1001.0, 1001.0, 1)]


async def test_unpublishing_what_was_never_there_changes_nothing(file: Path) -> None:
    async with new(file) as ledger:
        ledger.record_unpublish("/never")
        assert (ledger.publications(), ledger.closures_by_last_use()) == ([], [])


async def test_a_clock_that_goes_back_takes_no_use_back(file: Path) -> None:
    times = iter([1000.0, 5000.0, 100.0, 50.0])
    async with new(file, clock=lambda: next(times)) as ledger:
        for target in ("/a", "/b", "/c"):
            ledger.record_publish(entry(target))
        assert ledger.closures_by_last_use() == [ClosureUse("c1", 1000.0, 5000.0, 3)]
        ledger.record_unpublish("/a")
        assert ledger.closures_by_last_use() == [ClosureUse("c1", 1000.0, 5000.0, 3)]


async def test_the_mount_table_is_believed(file: Path) -> None:
    async with new(file) as ledger:
        for target in ("/same", "/gone", "/other"):
            ledger.record_publish(entry(target))
        corrections = ledger.reconcile(
            {
                "/same": Publication("c1", False),
                "/other": Publication("c2", True),
                TARGET: Publication("c3", False),
            }
        )
        assert (corrections.removed, corrections.changed, corrections.added) == (["/gone"], ["/other"], [TARGET])
        assert corrections.words() == f"added 1 ({TARGET}), removed 1 (/gone), changed 1 (/other)"
    published, uses = await contents(file)
    assert published == [
        Published("/other", "", "c2", True, published_at=1004.0),
        entry("/same", published_at=1001.0),
        Published(TARGET, "", "c3", False, pod_uid="5c3a0f4e-uid", published_at=1004.0),
    ]
    assert {use.closure_id: use.times_used for use in uses} == {"c1": 3, "c2": 1, "c3": 1}


async def test_a_ledger_that_agrees_is_not_corrected(file: Path) -> None:
    async with new(file) as ledger:
        ledger.record_publish(entry())
        assert ledger.reconcile({TARGET: Publication("c1", False)}).words() == ""
        assert ledger.publications() == [entry(published_at=1001.0)]


async def test_what_kubelet_says_of_a_volume_found_in_the_mount_table_is_added_to_it(file: Path) -> None:
    async with new(file) as ledger:
        ledger.reconcile({TARGET: Publication("c1", False)})
        ledger.record_publish(entry(pod_name="web"))
        assert ledger.publications() == [entry(pod_name="web", published_at=1001.0)]
        assert ledger.closures_by_last_use() == [ClosureUse("c1", 1001.0, 1001.0, 1)]


async def test_names_that_are_not_utf8_are_kept(file: Path) -> None:
    target = os.fsdecode(b"/pods/\xff\xfe/a'b\"c\n")
    async with new(file) as ledger:
        ledger.reconcile({target: Publication("c1", False)})
    assert [found.target for found in (await contents(file))[0]] == [target]


async def test_only_so_many_closures_are_remembered_and_always_those_in_use(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_MOST_CLOSURES", 20)
    async with new(file) as ledger:
        ledger.record_publish(entry("/kept", "in-use"))
        for number in range(100):
            ledger.record_publish(entry("/b", f"c{number}"))
            ledger.record_unpublish("/b")
            assert len(ledger.closures_by_last_use()) <= 20
    names = [use.closure_id for use in (await contents(file))[1]]
    assert names[-1] == "in-use"
    assert names[-2] == "c99"
    assert len(names) <= 20


async def test_closures_in_use_are_remembered_however_many(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_MOST_CLOSURES", 20)
    async with new(file) as ledger:
        for number in range(50):
            ledger.record_publish(entry(f"/{number}", f"c{number}"))
    assert len((await contents(file))[1]) == 50


TARGETS = st.sampled_from(["/a", "/b", "/c"])
CLOSURES = st.sampled_from(["c1", "c2"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), TARGETS, CLOSURES, st.booleans()),
        st.tuples(st.just("unpublish"), TARGETS),
        st.tuples(st.just("reconcile"), st.dictionaries(TARGETS, st.tuples(CLOSURES, st.booleans()))),
        st.tuples(st.just("reopen")),
        st.tuples(st.just("reboot")),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_after_any_history_it_says_what_a_plain_dictionary_says(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(_compare(Path(directory) / "ledger.sqlite", steps))


async def _compare(file: Path, steps: list[tuple[Any, ...]]) -> None:
    clock = Clock()
    published: dict[str, Published] = {}
    uses: dict[str, list[float]] = {}
    boots = 0
    ledger = new(file, clock=clock, boot="0")
    await ledger.open()
    for action, *details in steps:
        if action == "publish":
            target, closure, writable = details
            before = published.get(target)
            ledger.record_publish(entry(target, closure, writable=writable))
            if before is not None and (before.closure_id, before.writable) == (closure, writable):
                published[target] = replace(before, volume_id=f"volume of {target}")
                continue
            published[target] = entry(target, closure, writable=writable, published_at=clock.now)
            first, _, times = uses.get(closure, [clock.now, 0, 0])
            uses[closure] = [first, clock.now, times + 1]
        elif action == "unpublish":
            ledger.record_unpublish(*details)
            if (before := published.pop(details[0], None)) is not None:
                uses[before.closure_id][1] = clock.now
        elif action == "reconcile":
            ledger.reconcile({target: Publication(*found) for target, found in details[0].items()})
            for target in published.keys() - details[0].keys():
                del published[target]
            for target, (closure, writable) in details[0].items():
                before = published.get(target)
                if before is None or (before.closure_id, before.writable) != (closure, writable):
                    published[target] = Published(target, "", closure, writable, published_at=clock.now)
                    uses.setdefault(closure, [clock.now, clock.now, 1])
        else:
            await ledger.close()
            if action == "reboot":
                boots += 1
                published = {}
            ledger = new(file, clock=clock, boot=str(boots))
            await ledger.open()
        assert ledger.publications() == [published[target] for target in sorted(published)]
        told = ledger.closures_by_last_use()
        assert {use.closure_id: [use.first_used, use.last_used, use.times_used] for use in told} == uses
    await ledger.close()
    assert on_disk(file) == sorted(published)


# -- what becomes of its file


async def test_a_reboot_ends_what_was_published_and_keeps_what_was_used(file: Path) -> None:
    async with new(file, boot="before") as ledger:
        ledger.record_publish(entry())
    published, uses = await contents(file, boot="after")
    assert published == []
    assert uses == [ClosureUse("c1", 1001.0, 1001.0, 1)]


async def test_the_boot_is_the_kernels(file: Path) -> None:
    async with Ledger(file) as ledger:
        ledger.record_publish(entry())
    async with Ledger(file) as ledger:
        assert [found.target for found in ledger.publications()] == [TARGET]
    with closing(sqlite3.connect(file)) as database:
        ((boot,),) = database.execute("SELECT id FROM boot")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def test_a_missing_file_is_made(file: Path) -> None:
    async with new(file) as ledger:
        ledger.record_publish(entry())
    shutil.rmtree(file.parent)
    assert await contents(file) == ([], [])


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all", b"SQLite format 3\0" + bytes(84), os.urandom(100_000)]
)
async def test_a_file_that_is_no_ledger_is_begun_anew(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    async with new(file) as ledger:
        assert ledger.publications() == []
        ledger.record_publish(entry())
    assert on_disk(file) == [TARGET]


@pytest.mark.parametrize("table", ["theirs", "boot", "publications", "closures"])
async def test_tables_that_are_not_ours_are_begun_anew(
    file: Path, caplog: pytest.LogCaptureFixture, table: str
) -> None:
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as database:
        database.executescript(f"CREATE TABLE {table} (x); INSERT INTO {table} VALUES (1); PRAGMA user_version = 1")
    async with new(file) as ledger:
        ledger.record_publish(entry())
    assert on_disk(file) == [TARGET]
    assert "is begun anew" in caplog.text


async def test_a_file_cut_short_anywhere_is_begun_anew_or_whole(file: Path) -> None:
    async with new(file) as ledger:
        for number in range(300):
            ledger.record_publish(entry(f"/target/{number}", f"closure-{number}"))
    whole = file.read_bytes()
    everything = on_disk(file)
    page = int.from_bytes(whole[16:18], "big")
    assert len(whole) >= 8 * page
    assert not Path(f"{file}-wal").exists()
    for size in [*range(0, len(whole), page), *range(100, len(whole), 3 * page), len(whole)]:
        file.write_bytes(whole[:size])
        async with new(file) as ledger:
            found = [published.target for published in ledger.publications()]
            assert found == (everything if size == len(whole) else []), f"cut to {size} bytes"
            ledger.record_publish(entry("/new"))
        assert "/new" in on_disk(file)


async def test_a_directory_in_its_place_is_put_aside_also_under_a_running_daemon(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file / "somebody's").mkdir(parents=True)
    async with new(file) as ledger:
        ledger.record_publish(entry("/a"))
        await written(ledger, file, ["/a"])
        file.unlink()
        file.mkdir()
        ledger.record_publish(entry("/b"))
        await written(ledger, file, ["/a", "/b"])
    assert "is begun anew: what was there is no use, it is a directory; it is now " in caplog.text
    assert [path.name for path in file.parent.glob("*/somebody's")] == ["somebody's"]


async def test_damage_while_it_is_open_is_survived(file: Path) -> None:
    async with new(file) as ledger:
        ledger.record_publish(entry("/a"))
        await written(ledger, file, ["/a"])
        for name in (file, Path(f"{file}-wal")):
            size = name.stat().st_size
            name.write_bytes(os.urandom(size))
        ledger.record_publish(entry("/b"))
        ledger.record_publish(entry("/c"))
    assert [found.target for found in (await contents(file))[0]] in ([], ["/a", "/b", "/c"])


async def test_a_newer_schema_is_put_aside_whole_and_a_new_ledger_begun(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newer = (*MIGRATIONS, ("CREATE TABLE later (x)", "INSERT INTO later VALUES ('kept')"))
    with monkeypatch.context() as later:
        later.setattr(ledger_module, "MIGRATIONS", newer)
        async with new(file) as ledger:
            ledger.record_publish(entry())
    caplog.clear()
    assert await contents(file) == ([], [])
    (aside,) = file.parent.glob("ledger.sqlite.schema-2-*")
    with closing(sqlite3.connect(aside)) as database:
        assert database.execute("SELECT x FROM later").fetchall() == [("kept",)]
        assert database.execute("SELECT count(*) FROM publications").fetchone() == (1,)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(aside) in warning
    assert "it has schema 2, this version of cknix knows 1" in warning


async def test_an_older_schema_is_migrated_with_what_it_holds(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with new(file) as ledger:
        ledger.record_publish(entry())
    monkeypatch.setattr(ledger_module, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE later (x)",), ("DROP TABLE later",)))
    published, _ = await contents(file)
    assert published == [entry(published_at=1001.0)]
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)


@pytest.mark.parametrize("done", range(4))
async def test_a_migration_that_is_cut_short_has_not_begun(
    file: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    statements = ["CREATE TABLE later (x)", "DROP TABLE publications", "CREATE TABLE publications (x)"]
    statements.insert(done, "INSERT INTO nowhere VALUES (1)")
    async with new(file) as ledger:
        ledger.record_publish(entry())
    with monkeypatch.context() as later:
        later.setattr(ledger_module, "MIGRATIONS", (*MIGRATIONS, tuple(statements)))
        # As if the disk were to blame.
        later.setattr(ledger_module, "_is_unfit", lambda error: False)
        async with new(file) as ledger:
            assert ledger.publications() == []
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)
    assert on_disk(file) == [TARGET]


# -- when it cannot be written


async def test_a_file_taken_away_is_written_again_whole(file: Path) -> None:
    async with new(file) as ledger:
        ledger.record_publish(entry("/a"))
        await written(ledger, file, ["/a"])
        shutil.rmtree(file.parent)
        ledger.record_publish(entry("/b"))
        await written(ledger, file, ["/a", "/b"])
        (file.parent / "other").touch()
        (file.parent / "other").replace(file)
        ledger.record_unpublish("/a")
        await written(ledger, file, ["/b"])


async def test_where_no_file_can_be_made_it_works_in_memory_and_complains_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("a file where the directory must be")
    file = blocked / "ledger.sqlite"
    async with new(file) as ledger:
        for number in range(5):
            ledger.record_publish(entry(f"/{number}"))
            await asyncio.sleep(0.03)
        assert len(ledger.publications()) == 5
        assert len(caplog.records) == 1
        assert "cannot be used" in caplog.text
        blocked.unlink()
        await written(ledger, file, [f"/{number}" for number in range(5)])


def fill(disk: Path) -> Path:
    """A file that takes all that is left of *disk*."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as sink, pytest.raises(OSError, match="No space left"):
        while True:
            sink.write(bytes(512))
    return filler


def test_on_a_disk_that_becomes_full_it_goes_on_and_catches_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    caplog.set_level(logging.INFO)

    async def body() -> None:
        file = disk / "ledger.sqlite"
        async with new(file) as ledger:
            ledger.record_publish(entry("/a"))
            await written(ledger, file, ["/a"])
            filler = fill(disk)
            passing = 0
            async with asyncio.timeout(10):
                while "cannot be used" not in caplog.text:
                    passing += 1
                    ledger.record_publish(entry(f"/passing/{passing}", "x" * 1000))
                    await asyncio.sleep(0.01)
            ledger.record_publish(entry("/b"))
            assert {found.target for found in ledger.publications()} >= {"/a", "/b", "/passing/1"}
            for number in range(1, passing + 1):
                ledger.record_unpublish(f"/passing/{number}")
            await asyncio.sleep(0.1)
            assert len(caplog.records) == 1
            filler.unlink()
            await written(ledger, file, ["/a", "/b"])
            assert [record.getMessage() for record in caplog.records][1:] == [f"the ledger {file} is written again"]

    on_small_disk(disk, "tmpfs", 1, body)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_begun_on_a_disk_that_takes_nothing_it_knows_the_past_and_catches_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    """On a full disk the order of collection is needed most."""
    disk = tmp_path / "disk"
    disk.mkdir()

    async def body() -> None:
        file = disk / "ledger.sqlite"
        async with new(file) as ledger:
            for number in range(3):
                ledger.record_publish(entry("/a", f"c{number}"))
                ledger.record_unpublish("/a")
        uses = [ClosureUse(f"c{number}", 1001.0 + 2 * number, 1002.0 + 2 * number, 1) for number in range(3)]
        if trouble == "full":
            filler = fill(disk)
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        async with new(file) as ledger:
            assert ledger.closures_by_last_use() == uses
            ledger.record_publish(entry("/b", "c0"))
            assert [use.closure_id for use in ledger.closures_by_last_use()] == ["c1", "c2", "c0"]
            await asyncio.sleep(0.1)
            assert len(caplog.records) == 1
            if trouble == "full":
                filler.unlink()
            else:
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            await written(ledger, file, ["/b"])
        assert (await contents(file))[1][:2] == uses[1:]

    on_small_disk(disk, "tmpfs", 1, body)


VICTIM = """
import asyncio, sqlite3, sys
from contextlib import closing, suppress
from pathlib import Path
from cknix_csi.volumes.ledger import Ledger, Published

async def main():
    written = False
    async with Ledger(Path(sys.argv[1]), gather_seconds=0) as ledger:
        for number in range(10**9):
            ledger.record_publish(Published(f"/{number:09d}", f"v{number}", f"c{number:09d}", False))
            if number % 7 == 6:
                await asyncio.sleep(0)
            if number == 50:
                print("begun", flush=True)
            if number % 1000 == 50 and not written:
                with closing(sqlite3.connect(sys.argv[1])) as file, suppress(sqlite3.Error):
                    written = bool(file.execute("SELECT count(*) FROM publications").fetchone()[0])
                if written:
                    print("written", flush=True)

asyncio.run(main())
"""


def test_killed_while_it_writes_it_holds_what_was_true_a_moment_ago(file: Path) -> None:
    file.parent.mkdir()
    for round_ in range(5):
        shutil.rmtree(file.parent)
        with subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(file)], stdout=subprocess.PIPE, cwd=ROOT, text=True
        ) as victim:
            assert victim.stdout is not None
            assert victim.stdout.readline() == "begun\n"
            assert victim.stdout.readline() == "written\n"
            with pytest.raises(subprocess.TimeoutExpired):
                victim.wait(0.07 * round_)
            victim.send_signal(signal.SIGKILL)
        ledger = asyncio.run(_reopen(file))
        targets = [found.target for found in ledger.publications()]
        assert targets == [f"/{number:09d}" for number in range(len(targets))], "the first so many, none missing"
        uses = sorted(use.closure_id for use in ledger.closures_by_last_use())
        assert uses == [f"c{number:09d}" for number in range(len(targets))]
        assert targets, "it was killed while it wrote, not before"


async def _reopen(file: Path) -> Ledger:
    async with Ledger(file) as ledger:
        return ledger


async def test_recording_does_not_wait_for_the_disk(file: Path) -> None:
    async with new(file) as ledger:
        ledger.record_publish(entry("/a"))
        await written(ledger, file, ["/a"])
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            ledger.record_publish(entry("/b"))
            await asyncio.sleep(0.05)
            assert [found.target for found in ledger.publications()] == ["/a", "/b"]
            other.execute("ROLLBACK")
        await written(ledger, file, ["/a", "/b"])
