"""Notes of what is not synced yet: when they are there, what they say, and what is done about those that are found."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.closure import Closure, Member, PathInfo
from cknix_csi.api.errors import OutOfSpace
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import powercut, unsynced
from cknix_csi.nix.cache import nar
from cknix_csi.nix.database import is_valid, newest, register, registered, write_database
from cknix_csi.nix.store import Store
from cknix_csi.nix.unsynced import Note, Unsynced

LIBRARY = StorePath("0" * 32, "library")
PROGRAM = StorePath("1" * 32, "program")
OTHER = StorePath("2" * 32, "other")


class Shelf:
    """A store whose paths are directories with one file."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Store.chroot(root)
        self.store.physical.mkdir(parents=True)
        self.notes = self.store.state / "cknix/unsynced"
        self.syncs = 0
        self.may_sync = threading.Event()
        self.may_sync.set()
        self.fault: OSError | None = None
        self.opened: list[Unsynced] = []
        monkeypatch.setattr(unsynced, "sync_file_systems", self._sync)

    def _sync(self, directories: Any) -> None:
        assert {self.store.physical, self.store.state} == set(directories)
        self.syncs += 1
        self.may_sync.wait(10)
        if self.fault is not None:
            raise self.fault

    def open(self, boot: str = "one", delay: float = 0.0, **rest: Any) -> Unsynced:
        opened = Unsynced(self.store, boot_id=lambda: boot, delay=delay, **rest)
        self.opened.append(opened)
        return opened

    def add(self, path: StorePath, *references: StorePath) -> None:
        """Register *path*, whole."""
        place = self.store.physical_path(path)
        (place / "bin").mkdir(parents=True)
        (place / "bin/file").write_text(f"the content of {path}")
        dump = b"".join(nar.dump(place))
        digest = f"sha256:{hashlib.sha256(dump).hexdigest()}"
        register(self.store, [PathInfo(path, digest, len(dump), references)])

    def damage(self, path: StorePath) -> None:
        os.truncate(self.store.physical_path(path) / "bin/file", 0)

    def there(self) -> set[StorePath]:
        return {path for path in (LIBRARY, PROGRAM, OTHER) if self.store.physical_path(path).exists()}

    def valid(self) -> set[StorePath]:
        return {path for path in (LIBRARY, PROGRAM, OTHER) if is_valid(self.store, path)}

    def noted(self) -> list[Note]:
        while True:
            with suppress(FileNotFoundError):  # one is being replaced
                return [Note.parse(file.read_bytes()) for file in sorted(self.notes.glob("*"))]

    def leave(self, *notes: Note) -> None:
        """What processes that are gone have left."""
        self.notes.mkdir(parents=True, exist_ok=True)
        for number, note in enumerate(notes):
            (self.notes / str(number)).write_bytes(note.written())

    async def settled(self) -> None:
        async with asyncio.timeout(10):
            while self.noted():
                await asyncio.sleep(0.01)


@pytest.fixture
async def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shelf]:
    shelf = Shelf(tmp_path, monkeypatch)
    shelf.add(LIBRARY)
    yield shelf
    shelf.may_sync.set()
    for opened in shelf.opened:
        await opened.close()


# --- what is noted ---


async def test_what_is_registered_is_noted_before_and_until_it_is_synced(shelf: Shelf) -> None:
    shelf.may_sync.clear()
    async with shelf.open().noted():
        assert shelf.noted() == [Note("one", newest(shelf.store))]
        before = shelf.noted()
        shelf.add(PROGRAM)
    await until(lambda: shelf.syncs == 1)
    assert shelf.noted() == before
    shelf.may_sync.set()
    await shelf.settled()


async def test_a_note_is_on_the_disk_before_the_operation_begins(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it gets its name, and then the name."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def replaced(file: Path, target: Path) -> Path:
        calls.append(f"replace {file.name}")
        return replace(file, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    async with shelf.open().noted():
        [note] = shelf.notes.iterdir()
        assert calls[-3:] == [f"fsync .{note.name}", f"replace .{note.name}", "fsync unsynced"]
        assert calls[:-3] == ["fsync nix", "fsync cknix"] or calls[:-3] == ["fsync var", "fsync nix", "fsync cknix"]


async def test_operations_that_overlap_share_a_note_and_a_sync(shelf: Shelf) -> None:
    opened = shelf.open(delay=0.05)
    async with opened.noted():
        [inode] = [file.stat().st_ino for file in shelf.notes.iterdir()]
        async with opened.noted():
            shelf.add(PROGRAM)
            assert [file.stat().st_ino for file in shelf.notes.iterdir()] == [inode]
    await shelf.settled()
    assert shelf.syncs == 1


async def test_while_another_operation_goes_on_only_what_is_synced_is_left_out_of_the_note(shelf: Shelf) -> None:
    opened = shelf.open()
    async with opened.noted([OTHER]):
        async with opened.noted([LIBRARY]):
            shelf.add(PROGRAM)
            [note] = shelf.noted()
            assert note == Note("one", newest(shelf.store) - 1, frozenset(map(str, (LIBRARY, OTHER))))
        await until(lambda: shelf.noted() == [Note("one", newest(shelf.store), frozenset({str(OTHER)}))])
    await shelf.settled()


async def test_what_begins_during_a_sync_is_not_taken_for_synced(shelf: Shelf) -> None:
    opened = shelf.open()
    shelf.may_sync.clear()
    async with opened.noted():
        shelf.add(PROGRAM)
    await until(lambda: shelf.syncs == 1)
    number = newest(shelf.store)
    async with opened.noted():
        shelf.add(OTHER)
    shelf.may_sync.set()
    await until(lambda: [note.newest for note in shelf.noted()] in ([number], []))
    await shelf.settled()
    assert shelf.syncs == 2


async def test_where_nothing_was_registered_nothing_is_synced(shelf: Shelf) -> None:
    async with shelf.open().noted():
        assert shelf.noted()
    await shelf.settled()
    assert shelf.syncs == 0


async def test_what_is_deleted_is_synced_as_well(shelf: Shelf) -> None:
    async with shelf.open().noted([LIBRARY]):
        pass
    await shelf.settled()
    assert shelf.syncs == 1


async def test_a_sync_that_fails_leaves_the_note_and_the_next_one_serves_both(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    opened = shelf.open()
    shelf.fault = OSError(5, "Input/output error")
    async with opened.noted():
        shelf.add(PROGRAM)
    await until(lambda: "stays noted" in caplog.text)
    [note] = shelf.noted()
    shelf.fault = None
    async with opened.noted():
        assert shelf.noted() == [note]
    await shelf.settled()
    assert shelf.syncs == 2


async def test_an_operation_that_fails_or_is_cancelled_is_synced_too(shelf: Shelf) -> None:
    opened = shelf.open()
    with pytest.raises(ZeroDivisionError):
        async with opened.noted():
            shelf.add(PROGRAM)
            raise ZeroDivisionError
    await shelf.settled()
    assert shelf.syncs == 1


async def test_without_room_for_the_note_nothing_begins(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    opened = shelf.open()
    with monkeypatch.context() as patch, pytest.raises(OutOfSpace):
        patch.setattr(os, "fsync", full)
        async with opened.noted():
            raise AssertionError("it has begun")
    assert not any(shelf.notes.glob("*"))
    async with opened.noted():
        assert len(shelf.noted()) == 1
    await shelf.settled()


async def test_what_is_closed_leaves_its_note_to_the_next_process_which_syncs_it(shelf: Shelf) -> None:
    first = shelf.open(delay=60)
    async with first.noted():
        shelf.add(PROGRAM)
    await first.close()
    assert shelf.syncs == 0
    assert len(shelf.noted()) == 1
    await shelf.open().survived()
    await shelf.settled()
    assert shelf.syncs == 1
    assert shelf.valid() == {LIBRARY, PROGRAM}


async def test_a_note_of_this_boot_whose_process_lives_is_its_own_affair(shelf: Shelf) -> None:
    async with shelf.open().noted():
        [note] = shelf.noted()
        other = shelf.open()
        async with other.noted([LIBRARY]):
            assert len(shelf.noted()) == 2
        await until(lambda: shelf.noted() == [note])
    await shelf.settled()


async def test_when_the_database_is_begun_anew_its_old_numbers_are_forgotten(shelf: Shelf) -> None:
    opened = shelf.open()
    async with opened.noted():
        assert shelf.noted()[0].newest == 1
        shelf.store.database.write_bytes(bytes(4096))
        await opened.recovered()
        assert shelf.noted()[0].newest == 0
    await shelf.settled()


# --- what is found ---


async def test_without_a_note_nothing_is_looked_at(shelf: Shelf) -> None:
    shelf.damage(LIBRARY)
    await shelf.open("two").survived()
    assert shelf.valid() == {LIBRARY}


async def test_what_was_registered_since_the_note_is_compared_and_the_rest_is_not(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.leave(Note("one", newest(shelf.store)))
    shelf.add(PROGRAM, LIBRARY)
    shelf.add(OTHER)
    shelf.damage(LIBRARY)
    shelf.damage(PROGRAM)
    with caplog.at_level(logging.INFO):
        await shelf.open("two").survived()
    assert shelf.valid() == {LIBRARY, OTHER}
    assert shelf.there() == {LIBRARY, OTHER}
    assert f"1 of 2 store paths are damaged (0s), and 1 are to be fetched or built anew: {PROGRAM}" in caplog.text
    assert shelf.noted() == []


async def test_what_refers_to_something_damaged_is_forgotten_with_it(shelf: Shelf) -> None:
    shelf.add(OTHER)
    shelf.leave(Note("one", 0))
    shelf.add(PROGRAM, LIBRARY)
    shelf.damage(LIBRARY)
    await shelf.open("two").survived()
    assert shelf.valid() == {OTHER}
    assert registered(shelf.store) == {str(OTHER)}


async def test_what_was_to_be_deleted_is_compared_however_long_it_was_registered(shelf: Shelf) -> None:
    shelf.add(PROGRAM)
    shelf.leave(Note("one", newest(shelf.store), frozenset({str(LIBRARY)})))
    (shelf.store.physical_path(LIBRARY) / "bin/file").unlink()
    shelf.damage(PROGRAM)
    await shelf.open("two").survived()
    assert shelf.valid() == {PROGRAM}


@pytest.mark.parametrize("how", ["gone", "empty", "longer", "a mode", "another type"])
async def test_any_damage_is_found(shelf: Shelf, how: str) -> None:
    file = shelf.store.physical_path(LIBRARY) / "bin/file"
    if how == "gone":
        file.unlink()
        file.parent.rmdir()
        file.parent.parent.rmdir()
    elif how == "empty":
        os.truncate(file, 0)
    elif how == "longer":
        os.truncate(file, 100)
    elif how == "a mode":
        file.chmod(0o755)
    else:
        file.unlink()
        os.mkfifo(file)
    shelf.leave(Note("one", 0))
    await shelf.open("two").survived()
    assert shelf.valid() == set()
    assert shelf.there() == set()


async def test_what_has_lost_its_registration_is_deleted(shelf: Shelf) -> None:
    place = shelf.store.physical_path(OTHER)
    place.mkdir()
    locked = shelf.store.physical_path(PROGRAM)
    locked.write_text("somebody is at work on it")
    shelf.leave(Note("one", 0))
    with locked.with_name(f"{locked.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        await shelf.open("two").survived()
    assert shelf.there() == {LIBRARY, PROGRAM}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"boot": "one"}', "\0" * 20])
async def test_a_note_that_cannot_be_read_mistrusts_everything_but_spares_what_is_shown(
    shelf: Shelf, text: str
) -> None:
    """Who knows of which boot it is: a volume may be mounted."""
    shelf.add(PROGRAM)
    view = shelf.store.physical.parents[1] / "views" / PROGRAM.basename / "meta/nix/var/nix/db"
    view.mkdir(parents=True)
    write_database(shelf.store, Closure(PROGRAM, (Member(PROGRAM, 1),)), view)
    shelf.damage(LIBRARY)
    shelf.damage(PROGRAM)
    shelf.store.physical_path(OTHER).mkdir()
    shelf.notes.mkdir(parents=True)
    (shelf.notes / "note").write_text(text)
    await shelf.open().survived()
    assert shelf.valid() == {PROGRAM}
    assert shelf.there() == {PROGRAM, OTHER}
    assert shelf.noted() == []


async def test_of_several_notes_all_is_looked_at(shelf: Shelf) -> None:
    shelf.add(PROGRAM)
    shelf.add(OTHER)
    for path in (LIBRARY, PROGRAM, OTHER):
        shelf.damage(path)
    shelf.leave(Note("one", 2), Note("earlier", 1), Note("one", 3, frozenset({str(LIBRARY)})))
    await shelf.open("two").survived()
    assert shelf.valid() == set()
    assert shelf.noted() == []


async def test_two_that_find_a_note_look_once(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    mend = powercut.mend

    def counted(*arguments: Any, **rest: Any) -> None:
        nonlocal looks
        looks += 1
        mend(*arguments, **rest)

    monkeypatch.setattr(powercut, "mend", counted)
    monkeypatch.setattr(unsynced, "_POLL_SECONDS", 0.01)
    shelf.leave(Note("one", 0))
    shelf.damage(LIBRARY)
    one, other = shelf.open("two"), shelf.open("two")
    await asyncio.gather(*(each.survived() for each in (one, one, other, other)))
    assert looks == 1
    assert shelf.valid() == set()


async def test_a_look_that_is_interrupted_goes_on_where_it_was(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.add(PROGRAM)
    shelf.leave(Note("one", 0))
    monkeypatch.setattr(powercut, "_TOLD_SECONDS", 0.0)
    entered, go = threading.Event(), threading.Event()
    dump = nar.dump_of_size

    def slow(path: Path, size: int) -> Any:
        if path.name == PROGRAM.basename:
            entered.set()
            go.wait(10)
        return dump(path, size)

    with monkeypatch.context() as patch:
        patch.setattr(nar, "dump_of_size", slow)
        first = shelf.open("two")
        waiting = asyncio.create_task(first.survived())
        await asyncio.to_thread(entered.wait, 10)
        closing = asyncio.create_task(first.close())
        for _ in range(10):  # until it is told to stop
            await asyncio.sleep(0)
        go.set()
        await closing
        await asyncio.wait({waiting})
    assert [note.newest for note in shelf.noted()] == [1]
    shelf.damage(LIBRARY)
    shelf.damage(PROGRAM)
    await shelf.open("two").survived()
    assert shelf.valid() == {LIBRARY}, "it was found whole by the first"


async def test_what_keeps_from_looking_is_told_and_the_next_look_finds_all(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shelf.leave(Note("one", 0))
    shelf.damage(LIBRARY)
    opened = shelf.open("two")
    with monkeypatch.context() as patch:
        patch.setattr(powercut, "mend", lambda *_, **__: full())
        for _ in range(2):
            with pytest.raises(OutOfSpace):
                await opened.survived()
    assert shelf.valid() == {LIBRARY}
    await opened.survived()
    assert shelf.valid() == set()


async def test_who_gives_up_waiting_does_not_end_the_look(shelf: Shelf) -> None:
    shelf.leave(Note("one", 0))
    shelf.damage(LIBRARY)
    opened = shelf.open("two")
    impatient = asyncio.create_task(opened.survived())
    await asyncio.sleep(0)
    impatient.cancel()
    await opened.survived()
    assert shelf.valid() == set()


async def test_after_a_power_cut_caches_are_forgotten_and_after_a_crash_they_are_not(shelf: Shelf) -> None:
    forgotten: list[str] = []
    shelf.leave(Note("one", 0))
    await shelf.open("one", after_cut=lambda: forgotten.append("one")).survived()
    await shelf.settled()
    shelf.leave(Note("one", 0))
    await shelf.open("two", after_cut=lambda: forgotten.append("two")).survived()
    assert forgotten == ["two"]


async def test_a_note_that_never_got_its_name_is_swept_up_unless_somebody_writes_it(shelf: Shelf) -> None:
    shelf.notes.mkdir(parents=True)
    (shelf.notes / ".rest").write_bytes(b'{"boot')
    with (shelf.notes / ".written").open("w") as written:
        fcntl.flock(written, fcntl.LOCK_EX)
        await shelf.open("two").survived()
        assert [file.name for file in shelf.notes.iterdir()] == [".written"]
    assert shelf.valid() == {LIBRARY}


def test_a_note_is_what_it_was_written_as() -> None:
    note = Note("boot", 7, frozenset({str(LIBRARY), str(OTHER)}))
    assert Note.parse(note.written()) == note
    assert json.loads(note.written())["newest"] == 7


async def until(reached: Any) -> None:
    async with asyncio.timeout(10):
        while not reached():
            await asyncio.sleep(0.01)
