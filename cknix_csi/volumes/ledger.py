"""What is published where and which closure was used when: for reports, statistics and the order of collection.

The mount table is the truth and this is a note of it.  All of it is held in memory, where it is read and changed
without waiting, and one task writes changes to SQLite behind the caller.  So a crash may lose the last ones; and a file
that is missing, damaged, of a newer version or cannot be written costs what it knew of the past, and nothing else:
:meth:`Ledger.reconcile` puts right what is published.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import quote

import aiosqlite

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.boot import boot_id

log = logging.getLogger(__name__)

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE boot (id TEXT NOT NULL) STRICT",
        """CREATE TABLE publications (
            target BLOB PRIMARY KEY NOT NULL,
            volume_id TEXT NOT NULL,
            closure_id TEXT NOT NULL,
            writable INTEGER NOT NULL,
            presentation TEXT NOT NULL,
            pod_namespace TEXT NOT NULL,
            pod_name TEXT NOT NULL,
            pod_uid TEXT NOT NULL,
            published_at REAL NOT NULL
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE closures (
            closure_id TEXT PRIMARY KEY NOT NULL,
            first_used REAL NOT NULL,
            last_used REAL NOT NULL,
            times_used INTEGER NOT NULL,
            nar_size INTEGER,
            paths INTEGER
        ) STRICT, WITHOUT ROWID""",
    ),
)
"""The statements that lead from each version of the schema to the next; never changed, only added to.  The version is
SQLite's ``user_version``."""

FILE = Path("state/ledger.sqlite")
"""Below a data root."""

_BUSY_SECONDS = 5.0
_MOST_CLOSURES = 10_000
_RETRY_SECONDS = 30.0
_GATHER_SECONDS = 0.25
_MOST_NAMED = 3
_POD = re.compile(r"/pods/([^/]+)/volumes/")


@dataclass(frozen=True, slots=True)
class Published:
    """One volume at one target.  What nobody has told is empty."""

    target: str
    volume_id: str
    closure_id: str
    writable: bool
    presentation: str = ""
    pod_namespace: str = ""
    pod_name: str = ""
    pod_uid: str = ""
    published_at: float = 0.0
    """Seconds since the epoch; the ledger's business."""


@dataclass(frozen=True, slots=True)
class ClosureUse:
    """How a closure has been used on this node, whether it is still there or not.  Times: seconds since the epoch."""

    closure_id: str
    first_used: float
    last_used: float
    """When it was last published or unpublished."""
    times_used: int
    nar_size: int | None = None
    """Bytes, when it was told."""
    paths: int | None = None


class LedgerUnreadable(CknixError):
    """The file of a ledger is no use to a reader."""

    situation = Situation.LEDGER_UNREADABLE


class Mounted(Protocol):
    """What the mount table says of a target; ``volumes.Publication`` is one."""

    @property
    def closure_id(self) -> str: ...

    @property
    def writable(self) -> bool: ...


@dataclass(slots=True)
class Corrections:
    """In what the ledger did not agree with the mount table: targets."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def words(self) -> str:
        """One sentence, empty when there was nothing to correct."""
        parts = [("added", self.added), ("removed", self.removed), ("changed", self.changed)]
        return ", ".join(f"{verb} {len(targets)} ({_some(targets)})" for verb, targets in parts if targets)


class Ledger:
    """The ledger of one node, an async context manager; everything but opening and closing is immediate."""

    def __init__(
        self,
        file: Path,
        *,
        boot_id: Callable[[], str] = boot_id,
        clock: Callable[[], float] = time.time,
        retry_seconds: float = _RETRY_SECONDS,
        gather_seconds: float = _GATHER_SECONDS,
    ) -> None:
        """*file* is made with its directory.

        Changes are written together, *gather_seconds* after the first of them: many pods that start at once share a
        transaction.  After a write that failed, the next try comes *retry_seconds* later.
        """
        self._file = _File(file, boot_id)
        self._clock = clock
        self._retry_seconds = retry_seconds
        self._gather_seconds = gather_seconds
        self._published: dict[str, Published] = {}
        self._uses: dict[str, ClosureUse] = {}
        self._changes = _Changes()
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._complained = False
        self._writer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Read what is known.  Never fails: what cannot be read is begun anew."""
        try:
            content = await self._file.open()
            self._published = {entry.target: entry for entry in content.published}
            self._uses = {use.closure_id: use for use in content.uses}
        except (sqlite3.Error, OSError) as error:
            self._complain(error)
            await self._file.close()
            self._uses = {use.closure_id: use for use in await self._file.glimpse()}
            self._changes.rewrite = True
        self._writer = asyncio.create_task(self._write_on(), name="ledger")

    async def close(self) -> None:
        """Write what is not written yet, trying once, and close the file."""
        self._closing.set()
        self._changed.set()
        try:
            if self._writer is not None:
                await self._writer
        finally:
            self._writer = None
            await self._file.close()

    def record_publish(self, entry: Published, *, nar_size: int | None = None, paths: int | None = None) -> None:
        """*entry* is mounted, since now; what was mounted there already is no new use, and keeps its time.

        *nar_size* (bytes) and *paths* are those of its closure, where the caller knows them.
        """
        now = self._clock()
        before = self._published.get(entry.target)
        if before is not None and _is_same(before, entry):
            if before != (entry := replace(entry, published_at=before.published_at)):
                self._put(entry)
            return
        self._put(replace(entry, published_at=now))
        self._use(entry.closure_id, now, nar_size, paths)

    def record_unpublish(self, target: str) -> None:
        """Nothing is mounted at *target* any more; fine when nothing was."""
        before = self._published.pop(target, None)
        if before is None:
            return
        self._changes.targets.add(target)
        if use := self._uses.get(before.closure_id):
            self._uses[before.closure_id] = replace(use, last_used=max(self._clock(), use.last_used))
            self._changes.closures.add(before.closure_id)
        self._changed.set()

    def count(self) -> tuple[int, int]:
        """How many volumes are published, and how many closures are remembered."""
        return len(self._published), len(self._uses)

    @property
    def is_written(self) -> bool:
        """False when the file could not be written or read last time."""
        return not self._complained

    def publications(self) -> list[Published]:
        """What is published, by target."""
        return [self._published[target] for target in sorted(self._published)]

    def closures_by_last_use(self) -> list[ClosureUse]:
        """All closures that were ever published here and are remembered: the least recently used first, those that are
        published now last."""
        in_use = self._in_use()
        return sorted(self._uses.values(), key=lambda use: (use.closure_id in in_use, use.last_used, use.closure_id))

    def reconcile(self, mounted: Mapping[str, Mounted]) -> Corrections:
        """Believe *mounted*, all that the mount table shows by target; returns what had to be corrected."""
        now = self._clock()
        corrections = Corrections()
        for target in sorted(self._published.keys() - mounted.keys()):
            del self._published[target]
            self._changes.targets.add(target)
            self._changed.set()
            corrections.removed.append(target)
        for target, found in sorted(mounted.items()):
            known = self._published.get(target)
            if known is not None and (known.closure_id, known.writable) == (found.closure_id, found.writable):
                continue
            (corrections.added if known is None else corrections.changed).append(target)
            pod = _POD.search(target)
            entry = Published(target, "", found.closure_id, found.writable, pod_uid=pod[1] if pod else "")
            self._put(replace(entry, published_at=now))
            if found.closure_id not in self._uses:
                self._use(found.closure_id, now, None, None)
        return corrections

    def _put(self, entry: Published) -> None:
        self._published[entry.target] = entry
        self._changes.targets.add(entry.target)
        self._changed.set()

    def _use(self, closure_id: str, now: float, nar_size: int | None, paths: int | None) -> None:
        use = self._uses.get(closure_id) or ClosureUse(closure_id, now, now, 0)
        self._uses[closure_id] = ClosureUse(
            closure_id,
            use.first_used,
            # Never back in time, whatever the clock does.
            max(now, use.last_used),
            use.times_used + 1,
            use.nar_size if nar_size is None else nar_size,
            use.paths if paths is None else paths,
        )
        self._changes.closures.add(closure_id)
        self._changed.set()
        if len(self._uses) > _MOST_CLOSURES:
            self._forget()

    def _forget(self) -> None:
        """Drop a tenth of the closures, those that nobody has used for longest."""
        in_use = self._in_use()
        for use in self.closures_by_last_use()[: _MOST_CLOSURES // 10]:
            if use.closure_id not in in_use:
                del self._uses[use.closure_id]
                self._changes.closures.add(use.closure_id)

    def _in_use(self) -> set[str]:
        return {entry.closure_id for entry in self._published.values()}

    # Writing

    async def _write_on(self) -> None:
        while not self._closing.is_set():
            await self._changed.wait()
            await self._closes_within(self._gather_seconds)
            self._changed.clear()
            if self._changes and not await self._write() and not await self._closes_within(self._retry_seconds):
                self._changed.set()
        if self._changes:
            await self._write()

    async def _closes_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._closing.wait()
        except TimeoutError:
            return False

    async def _write(self) -> bool:
        """Write all changes in one transaction; False when that failed, and everything is to be written next time."""
        changes, self._changes = self._changes, _Changes()
        try:
            if changes.rewrite or not self._file.is_open():
                await self._file.rewrite(list(self._published.values()), list(self._uses.values()))
            else:
                gone = changes.targets - self._published.keys(), changes.closures - self._uses.keys()
                published = [self._published[target] for target in changes.targets - gone[0]]
                uses = [self._uses[closure_id] for closure_id in changes.closures - gone[1]]
                await self._file.write(published, uses, *gone)
        except (sqlite3.Error, OSError) as error:
            self._complain(error)
            await self._file.close()
            self._changes.rewrite = True
            return False
        if self._complained:
            self._complained = False
            log.info("the ledger %s is written again", self._file.path)
        return True

    def _complain(self, error: Exception) -> None:
        """Once, until it goes well again."""
        if not self._complained:
            self._complained = True
            log.warning(
                "the ledger %s cannot be used: %s; volumes work without it, reports will know less of the past",
                self._file.path,
                error,
            )


def _some(targets: Sequence[str]) -> str:
    return ", ".join(targets[:_MOST_NAMED]) + (", …" if len(targets) > _MOST_NAMED else "")


def _is_same(before: Published, entry: Published) -> bool:
    """True for the same volume, or one that the mount table has shown without saying which it is."""
    same = (before.closure_id, before.writable) == (entry.closure_id, entry.writable)
    return same and before.volume_id in ("", entry.volume_id)


@dataclass(slots=True)
class _Changes:
    """Keys of what has changed since the last write; a write that fails turns them into *rewrite*."""

    targets: set[str] = field(default_factory=set)
    closures: set[str] = field(default_factory=set)
    rewrite: bool = False
    """Everything is to be written, whatever the file holds."""

    def __bool__(self) -> bool:
        return bool(self.targets or self.closures or self.rewrite)


@dataclass(frozen=True, slots=True)
class _Content:
    published: list[Published]
    uses: list[ClosureUse]


class _Damaged(sqlite3.DatabaseError):
    """A file that SQLite can open and finds damaged."""


class _Newer(sqlite3.DatabaseError):
    """A file of a later version of this program."""

    def __init__(self, version: int) -> None:
        super().__init__(f"it has schema {version}, this version of cknix knows {len(MIGRATIONS)}")
        self.version = version


class _NoFile(sqlite3.DatabaseError):
    """A directory where the file should be."""

    def __init__(self) -> None:
        super().__init__("it is a directory")


class _File:
    """The SQLite file: opened, migrated, and begun anew when it is no use."""

    def __init__(self, path: Path, boot_id: Callable[[], str]) -> None:
        self.path = path
        self._boot_id = boot_id
        self._database: aiosqlite.Connection | None = None
        self._identity: tuple[int, int] | None = None

    async def open(self) -> _Content:
        """What is in the file; what was published before the last boot is not.  Raises sqlite3.Error, OSError."""
        await asyncio.to_thread(self.path.parent.mkdir, parents=True, exist_ok=True)
        try:
            if await asyncio.to_thread(self.path.is_dir):
                raise _NoFile
            return await self._open()
        except sqlite3.Error as error:
            if not _is_unfit(error):
                raise
            await self.close()
            await asyncio.to_thread(self._begin_anew, error)
        return await self._open()

    async def glimpse(self) -> list[ClosureUse]:
        """The closures in a file that cannot be opened as it should, for example since its disk is full.

        Without what a crash has left in the write-ahead log; nothing when the file is no ledger of this version.
        """
        uri = f"file:{quote(str(self.path))}?immutable=1"
        try:
            async with aiosqlite.connect(uri, uri=True) as database:
                if await _fetch(database, "PRAGMA user_version") != [(len(MIGRATIONS),)]:
                    return []
                return await _uses(database)
        except sqlite3.Error:
            return []

    async def _open(self) -> _Content:
        database = self._database = await aiosqlite.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        await _fetch(database, "PRAGMA journal_mode = WAL")
        # No sync for each transaction: a power failure costs the last ones, never the file.
        await _fetch(database, "PRAGMA synchronous = NORMAL")
        await self._migrate(database)
        content = await self._read(database)
        state = await asyncio.to_thread(self.path.stat)
        self._identity = (state.st_dev, state.st_ino)
        return content

    async def _migrate(self, database: aiosqlite.Connection) -> None:
        ((version,),) = await _fetch(database, "PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise _Newer(version)
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            await self._transaction([*((sql, [()]) for sql in statements), (f"PRAGMA user_version = {number}", [()])])

    async def _read(self, database: aiosqlite.Connection) -> _Content:
        if (verdict := await _fetch(database, "PRAGMA quick_check(1)")) != [("ok",)]:
            raise _Damaged(str(verdict))
        boot_id = await asyncio.to_thread(self._boot_id)
        if await _fetch(database, "SELECT id FROM boot") != [(boot_id,)]:
            # A reboot leaves no mount.
            await self._transaction(
                [
                    ("DELETE FROM publications", [()]),
                    ("DELETE FROM boot", [()]),
                    ("INSERT INTO boot VALUES (?)", [(boot_id,)]),
                ]
            )
        return _Content([_published(row) for row in await _fetch(database, _ALL_PUBLISHED)], await _uses(database))

    def is_open(self) -> bool:
        """False as well when somebody has taken the file away, or put another there."""
        try:
            state = self.path.stat()
        except OSError:
            return False
        return self._database is not None and self._identity == (state.st_dev, state.st_ino)

    async def write(
        self,
        published: Iterable[Published],
        uses: Iterable[ClosureUse],
        targets_gone: Iterable[str],
        closures_gone: Iterable[str],
    ) -> None:
        """All or nothing.  Raises sqlite3.Error."""
        await self._transaction(
            [
                ("DELETE FROM publications WHERE target = ?", [(os.fsencode(target),) for target in targets_gone]),
                ("DELETE FROM closures WHERE closure_id = ?", [(closure_id,) for closure_id in closures_gone]),
                *_insertions(published, uses),
            ]
        )

    async def rewrite(self, published: Iterable[Published], uses: Iterable[ClosureUse]) -> None:
        """Make the file that is there now hold exactly this.  Raises sqlite3.Error, OSError."""
        await self.close()
        await self.open()
        await self._transaction(
            [("DELETE FROM publications", [()]), ("DELETE FROM closures", [()]), *_insertions(published, uses)]
        )

    async def close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            await database.close()

    async def _transaction(self, statements: Iterable[_Statement]) -> None:
        """Execute each statement once with each of its rows, all or nothing."""
        assert self._database is not None
        await self._database.execute("BEGIN IMMEDIATE")
        try:
            for sql, rows in statements:
                if rows == [()]:
                    await self._database.execute(sql)
                else:
                    await self._database.executemany(sql, rows)
            await self._database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                await self._database.rollback()
            raise

    def _begin_anew(self, why: sqlite3.Error) -> None:
        """Take the file away; one of a newer version is kept for whoever goes back to that version, as is no file."""
        aside = None
        if isinstance(why, _Newer | _NoFile):
            kind = f"schema-{why.version}" if isinstance(why, _Newer) else "no-file"
            aside = f"{self.path}.{kind}-{time.strftime('%Y%m%dT%H%M%S')}"
        for part in ("-shm", "-wal", ""):
            with suppress(FileNotFoundError):
                if aside:
                    os.replace(f"{self.path}{part}", f"{aside}{part}")
                else:
                    os.unlink(f"{self.path}{part}")
        kept = f"; it is now {aside}" if aside else ""
        log.warning("the ledger %s is begun anew: what was there is no use, %s%s", self.path, why, kept)


_Statement = tuple[str, Sequence[tuple[Any, ...]]]

_PUBLISHED = "target, volume_id, closure_id, writable, presentation, pod_namespace, pod_name, pod_uid, published_at"
_ALL_PUBLISHED = f"SELECT {_PUBLISHED} FROM publications"  # noqa: S608 - constant columns
_USE = "closure_id, first_used, last_used, times_used, nar_size, paths"
_UNFIT = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


def read_published(file: Path) -> list[Published]:
    """What the ledger in *file* says, for others than its daemon.  Synchronous.

    Raises :class:`LedgerUnreadable`.
    """
    try:
        with file.open("rb"):
            pass
    except (FileNotFoundError, NotADirectoryError):
        raise LedgerUnreadable(f"there is no ledger {file}: no node daemon has worked with this data root") from None
    except IsADirectoryError:
        raise LedgerUnreadable(
            f"the ledger {file} is a directory; the node daemon puts that aside and begins anew when it starts"
        ) from None
    except OSError as error:
        help_ = "run this as root" if isinstance(error, PermissionError) else "see the kernel log"
        raise LedgerUnreadable(f"the ledger {file} cannot be read: {error.strerror}; {help_}") from error
    try:
        uri = f"file:{quote(str(file))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS)) as database:
            return [_published(row) for row in database.execute(_ALL_PUBLISHED)]
    except sqlite3.Error as error:
        anew = "the node daemon of this version makes it anew when it starts"
        raise LedgerUnreadable(
            f"the ledger {file} cannot be read: {error}; {anew if _is_unfit(error) else 'try again, as root'}"
        ) from error


def _published(row: tuple[Any, ...]) -> Published:
    target, volume_id, closure_id, writable, *rest = row
    return Published(os.fsdecode(target), volume_id, closure_id, bool(writable), *rest)


async def _fetch(database: aiosqlite.Connection, sql: str) -> list[tuple[Any, ...]]:
    async with database.execute(sql) as cursor:
        return [tuple(row) for row in await cursor.fetchall()]


async def _uses(database: aiosqlite.Connection) -> list[ClosureUse]:
    rows = await _fetch(database, f"SELECT {_USE} FROM closures")  # noqa: S608 - constant columns
    return [ClosureUse(*row) for row in rows]


def _insertions(published: Iterable[Published], uses: Iterable[ClosureUse]) -> list[_Statement]:
    entries = [(os.fsencode(entry.target), *astuple(entry)[1:]) for entry in published]
    return [
        ("INSERT OR REPLACE INTO publications VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", entries),
        ("INSERT OR REPLACE INTO closures VALUES (?, ?, ?, ?, ?, ?)", [astuple(use) for use in uses]),
    ]


def _is_unfit(error: sqlite3.Error) -> bool:
    """The file is to blame, and not the disk that it is on."""
    name = getattr(error, "sqlite_errorname", "")
    # SQLITE_ERROR: a table or a column is not there.
    return isinstance(error, _Damaged | _Newer | _NoFile) or name.startswith(_UNFIT) or name == "SQLITE_ERROR"
