"""Nix's SQLite database, read and written directly.

One ``nix`` process costs 14-20 ms; the recursive query below takes under a millisecond.  The schema (version 10) has
not changed between Nix 2.8 and 2.34; any other version is refused rather than guessed at.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cknix_csi.api.closure import Closure, Member, PathInfo
from cknix_csi.api.errors import CknixError, OutOfSpace
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import HASH_LENGTH, STORE_DIR, StorePath
from cknix_csi.nix.store import Store

SCHEMA_VERSION = "10"

_BUSY_SECONDS = 10.0
# What SQLite says of a file that will never be readable again.
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_NO_TABLES = "no such table"
# In WAL mode SQLite makes an index beside the database even to read it: 32 KiB (sqlite.org/walformat.html).
_FULL = {"SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"}

_FILES_OF_SQLITE = 2
"""Beside the database: -wal and -shm."""

_HASH = re.compile(rf"[0-9a-df-np-sv-z]{{{HASH_LENGTH}}}")

_COLUMNS = "v.id, v.path, v.hash, v.registrationTime, v.deriver, v.narSize, v.ultimate, v.sigs, v.ca"

# UNION (not UNION ALL) ends the recursion on cycles: paths may refer to themselves.
_OF_CLOSURE = """
    WITH RECURSIVE closure(id) AS (
        SELECT id FROM ValidPaths WHERE path = ?
        UNION
        SELECT r.reference FROM Refs r JOIN closure c ON r.referrer = c.id
    )
    SELECT {} FROM closure c JOIN ValidPaths v ON v.id = c.id
"""
_CLOSURE = f"{_OF_CLOSURE.format('v.path, v.narSize')} ORDER BY v.path"
_SIZE_SINCE = f"{_OF_CLOSURE.format('ifnull(sum(v.narSize), 0)')} WHERE v.id > ?"
# Of the path of a number, and that path.
_REFERRERS = """
    WITH RECURSIVE referrers(id) AS (
        SELECT ?
        UNION
        SELECT r.referrer FROM Refs r JOIN referrers f ON r.reference = f.id
    )
    SELECT v.id, v.path FROM referrers f JOIN ValidPaths v ON v.id = f.id
"""

_MEMBERS = "CREATE TEMP TABLE Members (new integer primary key, old integer unique not null)"
# Run with a new database as "main", the store's as "node", and the closure's paths as a JSON array, in their order.
# CROSS JOIN holds SQLite to the order given (sqlite.org/optoverview.html, 7.3): of its own it scans all of the store's.
_COPY = (
    "INSERT INTO Members SELECT p.key + 1, v.id FROM json_each(?) p CROSS JOIN node.ValidPaths v ON v.path = p.value",
    """
    INSERT INTO main.ValidPaths (id, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca)
    SELECT m.new, v.path, v.hash, 1, v.deriver, coalesce(v.narSize, 0), nullif(v.ultimate, 0), nullif(v.sigs, ''),
           nullif(v.ca, '')
    FROM Members m CROSS JOIN node.ValidPaths v ON v.id = m.old ORDER BY m.new
    """,
    """
    INSERT INTO main.Refs (referrer, reference)
    SELECT m.new, n.new FROM Members m CROSS JOIN node.Refs r ON r.referrer = m.old
    CROSS JOIN Members n ON n.old = r.reference ORDER BY m.new, n.new
    """,
)

# As Nix creates it (schema.sql of Nix 2.8 to 2.34), and the table that read-only clients look for.
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS ValidPaths (
        id               integer primary key autoincrement not null,
        path             text unique not null,
        hash             text not null,
        registrationTime integer not null,
        deriver          text,
        narSize          integer,
        ultimate         integer,
        sigs             text,
        ca               text
    );
    CREATE TABLE IF NOT EXISTS Refs (
        referrer  integer not null,
        reference integer not null,
        primary key (referrer, reference),
        foreign key (referrer) references ValidPaths(id) on delete cascade,
        foreign key (reference) references ValidPaths(id) on delete restrict
    );
    CREATE INDEX IF NOT EXISTS IndexReferrer on Refs(referrer);
    CREATE INDEX IF NOT EXISTS IndexReference on Refs(reference);
    CREATE TRIGGER IF NOT EXISTS DeleteSelfRefs before delete on ValidPaths
      begin
        delete from Refs where referrer = old.id and reference = old.id;
      end;
    CREATE TABLE IF NOT EXISTS DerivationOutputs (
        drv  integer not null,
        id   text not null,
        path text not null,
        primary key (drv, id),
        foreign key (drv) references ValidPaths(id) on delete cascade
    );
    CREATE INDEX IF NOT EXISTS IndexDerivationOutputs on DerivationOutputs(path);
    CREATE TABLE IF NOT EXISTS SchemaMigrations (migration text primary key not null);
"""


@dataclass(frozen=True, slots=True)
class Registered:
    """A registered path: what its files are to be compared with."""

    number: int
    """Grows from one registration to the next; of a path that is registered again it is another one."""
    path: str
    nar_hash: str
    """``sha256:`` and 64 hexadecimal digits."""
    nar_size: int
    """Bytes; 0 when Nix does not know."""


class PathNotValid(CknixError):
    """A store path that the store's database does not hold."""

    situation = Situation.PATH_NOT_VALID

    def __init__(self, store: Store, path: StorePath | str) -> None:
        super().__init__(f"{path} is not in the store {store.uri}")


class UnknownSchema(CknixError):
    """A Nix database of a version this program does not know."""

    situation = Situation.UNKNOWN_NIX_SCHEMA


class DatabaseUnreadable(CknixError):
    """A Nix database that SQLite cannot read: locked for too long, damaged, or out of reach."""

    situation = Situation.NIX_DATABASE_UNREADABLE


class DatabaseDamaged(DatabaseUnreadable):
    """A Nix database that is no whole database any more: trying again does not help."""

    situation = Situation.NIX_DATABASE_DAMAGED


def is_valid(store: Store, path: StorePath) -> bool:
    """True when *path* is registered.  False as well for a store that does not exist yet."""
    with reading(store) as database:
        if database is None:
            return False
        return database.execute("SELECT 1 FROM ValidPaths WHERE path = ?", (str(path),)).fetchone() is not None


def query_closure(store: Store, root: StorePath) -> Closure:
    """*root* with everything it refers to.  Raises :class:`PathNotValid` and :class:`UnknownSchema`."""
    with reading(store) as database:
        rows = [] if database is None else database.execute(_CLOSURE, (str(root),)).fetchall()
    if not rows:
        raise PathNotValid(store, root)
    paths = StorePath.parse_all([path for path, _ in rows])
    return Closure(root, tuple(Member(path, size or 0) for path, (_, size) in zip(paths, rows, strict=True)))


def newest(store: Store) -> int:
    """The number of the path that was registered last, which only grows; 0 where none ever was."""
    with reading(store) as database:
        if database is None:
            return 0
        return int(database.execute("SELECT ifnull(max(id), 0) FROM ValidPaths").fetchone()[0])


def size_since(store: Store, root: StorePath, number: int) -> int:
    """Bytes, as NARs, of what of *root*'s closure was registered after the path of that *number*."""
    with reading(store) as database:
        if database is None:
            return 0
        return int(database.execute(_SIZE_SINCE, (str(root), number)).fetchone()[0])


def registered_since(store: Store, number: int, also: Iterable[str] = ()) -> list[Registered]:
    """What was registered after the path of that *number*, and what of the paths *also* is registered, by number."""
    query = "SELECT id, path, hash, ifnull(narSize, 0) FROM ValidPaths WHERE"
    with reading(store) as database:
        if database is None:
            return []
        rows = {*database.execute(f"{query} id > ?", (number,))}
        for path in also:
            rows.update(database.execute(f"{query} path = ?", (path,)))
    return [Registered(*row) for row in sorted(rows)]


def forget(store: Store, number: int) -> list[str]:
    """Unregister the path of that *number* and all that refer to it, durably; gives all of them.

    Raises :class:`OutOfSpace`, :class:`DatabaseUnreadable`.
    """
    with _opened(store, "rw") as database:
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("BEGIN IMMEDIATE")
        rows = database.execute(_REFERRERS, (number,)).fetchall()
        numbers = [(row[0],) for row in rows]
        # First all references among them: no path can go that another one refers to.
        database.executemany("DELETE FROM Refs WHERE referrer = ?", numbers)
        database.executemany("DELETE FROM ValidPaths WHERE id = ?", numbers)
        database.execute("COMMIT")
    return [path for _, path in rows]


def path_info(store: Store, hash_part: str) -> PathInfo | None:
    """The valid path whose hash is *hash_part* (32 characters of Nix base32), or None."""
    if not _HASH.fullmatch(hash_part):
        return None
    with reading(store) as database:
        if database is None:
            return None
        prefix = f"{STORE_DIR}/{hash_part}"
        # A range on the unique index of paths; '-' is followed by '.' in ASCII.
        row = database.execute(
            f"SELECT {_COLUMNS} FROM ValidPaths v WHERE v.path >= ? AND v.path < ? LIMIT 1",  # noqa: S608
            (f"{prefix}-", f"{prefix}."),
        ).fetchone()
        return None if row is None else next(_path_infos(database, [row]))


def require_whole(store: Store) -> None:
    """Read through the whole database, some 5 ms for 1,000 paths.  Raises :class:`DatabaseDamaged` and others.

    A store that has none is whole: Nix makes one.
    """
    with reading(store) as database:
        if database is not None:
            database.execute("SELECT 1 FROM ValidPaths LIMIT 1")
    if store.database.exists():
        with _opened(store, "rw") as database:
            if (found := str(database.execute("PRAGMA quick_check(1)").fetchone()[0])) != "ok":
                raise DatabaseDamaged(_unreadable(store, found))


def registered(store: Store) -> set[str]:
    """All valid paths; also on a full disk, as long as nobody else has the database open."""
    query = "SELECT path FROM ValidPaths"
    try:
        with reading(store) as database:
            return set() if database is None else {path for (path,) in database.execute(query)}
    except OutOfSpace:
        with _opened(store, "rw") as database:
            # Alone, SQLite keeps in memory what it would need a file for.
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            return {path for (path,) in database.execute(query)}


def read_database(file: Path, known: Collection[str]) -> list[PathInfo]:
    """The paths of a database that :func:`write_database` wrote, but those that are *known*.

    Raises :class:`DatabaseUnreadable`.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM ValidPaths v").fetchall()  # noqa: S608
            return list(_path_infos(database, [row for row in rows if row[1] not in known]))
    except sqlite3.Error as error:
        raise DatabaseUnreadable(f"the Nix database {file} cannot be read: {error}") from error


def read_paths(file: Path) -> set[str]:
    """All paths of a database that :func:`write_database` wrote.  Raises :class:`DatabaseUnreadable`."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as database:
            return {path for (path,) in database.execute("SELECT path FROM ValidPaths")}
    except sqlite3.Error as error:
        raise DatabaseUnreadable(f"the Nix database {file} cannot be read: {error}") from error


def register(store: Store, infos: Collection[PathInfo]) -> None:
    """Add *infos* to the store's database, which is made where none is; paths that it has stay as they are.

    References to paths that neither has are left out.  Raises :class:`OutOfSpace`, :class:`DatabaseUnreadable`.
    """
    (store.state / "db").mkdir(parents=True, exist_ok=True)
    with _opened(store, "rwc") as database:
        database.executescript(_SCHEMA)
        database.execute("BEGIN IMMEDIATE")
        database.executemany(
            "INSERT OR IGNORE INTO ValidPaths (path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (_row(info) for info in infos),
        )
        database.executemany(
            "INSERT OR IGNORE INTO Refs "
            "SELECT a.id, b.id FROM ValidPaths a, ValidPaths b WHERE a.path = ? AND b.path = ?",
            ((str(info.path), str(reference)) for info in infos for reference in info.references),
        )
        database.execute("COMMIT")
    if not (schema := store.state / "db/schema").exists():
        schema.write_text(SCHEMA_VERSION)


def set_aside(store: Store) -> Path:
    """Move the database, with what belongs to it, to ``db/damaged``, over one that is there; gives that directory."""
    directory = store.state / "db"
    aside = directory / "damaged"
    aside.mkdir(exist_ok=True)
    # The schema goes last: without it Nix and this program take the store for a new one.
    for name in ("db.sqlite-wal", "db.sqlite-shm", "db.sqlite", "schema"):
        with suppress(FileNotFoundError):
            (directory / name).replace(aside / name)
    return aside


def write_database(store: Store, closure: Closure, directory: Path) -> None:
    """Copy what *store* knows of *closure* to ``<directory>/db.sqlite`` with its ``schema`` file; nothing is synced.

    The same closure gives the same bytes: rows are in the order of their paths and registration times are fixed.  It
    is in rollback-journal mode, which a client can read on a read-only file system.
    Raises :class:`OutOfSpace`, OSError, :class:`PathNotValid` when *store* has another closure by now, and what
    :func:`query_closure` raises.
    """
    target = directory / "db.sqlite"
    target.unlink(missing_ok=True)
    if not _has_database(store):
        raise PathNotValid(store, closure.root)
    try:
        copied = _copy(store, closure, target)
    except sqlite3.Error as error:
        query_closure(store, closure.root)  # raises when it is the store's that cannot be read
        if getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY"):  # by now it can, but not then
            raise DatabaseUnreadable(_unreadable(store, str(error))) from error
        # In a fresh file nothing else can go wrong: SQLite says "disk I/O error" for some kinds of a full disk.
        raise OutOfSpace(f"the database of {closure.root} cannot be written to {directory}: {error}") from error
    if copied != len(closure.paths):
        raise PathNotValid(store, closure.root)
    (directory / "schema").write_text(SCHEMA_VERSION)


def _copy(store: Store, closure: Closure, target: Path) -> int:
    """Returns the number of paths that the store still has."""
    with closing(_connect(f"file:{quote(str(target))}")) as database:
        for setting in ("main.journal_mode = OFF", "main.synchronous = OFF", "temp_store = MEMORY"):
            database.execute(f"PRAGMA {setting}")
        database.execute("ATTACH ? AS node", (_uri(store, "rw"),))
        database.executescript(f"BEGIN; {_SCHEMA}; {_MEMBERS}")
        # As one value: a statement per path takes twice as long, and the interpreter from who makes the view meanwhile.
        paths = json.dumps(sorted(str(member.path) for member in closure.paths))
        for statement in _COPY:
            database.execute(statement, (paths,) if "?" in statement else ())
        [(copied,)] = database.execute("SELECT count(*) FROM Members")
        database.execute("COMMIT")
        return int(copied)


def _row(info: PathInfo) -> tuple[str | int | None, ...]:
    """The columns of ``ValidPaths`` but its ``id``."""
    return (
        str(info.path),
        info.nar_hash,
        info.registration_time,
        info.deriver,
        info.nar_size,
        1 if info.ultimate else None,
        " ".join(info.signatures) or None,
        info.content_address,
    )


def _path_infos(database: sqlite3.Connection, rows: Sequence[tuple[object, ...]]) -> Iterator[PathInfo]:
    for row in rows:
        key, path, digest, registered, deriver, size, ultimate, signatures, address = row
        references = database.execute(
            "SELECT v.path FROM Refs r JOIN ValidPaths v ON v.id = r.reference WHERE r.referrer = ? ORDER BY v.path",
            (key,),
        )
        yield PathInfo(
            path=StorePath.parse(str(path)),
            nar_hash=str(digest),
            nar_size=int(str(size or 0)),
            references=tuple(StorePath.parse(reference) for (reference,) in references),
            deriver=None if deriver is None else str(deriver),
            registration_time=int(str(registered)),
            ultimate=bool(ultimate),
            signatures=tuple(str(signatures).split()) if signatures else (),
            content_address=str(address) if address else None,
        )


@contextmanager
def reading(store: Store) -> Iterator[sqlite3.Connection | None]:
    """A read transaction on the store's database; None when the store has none yet."""
    if not _has_database(store):
        yield None
        return
    # Read-write is needed even to read: in WAL mode SQLite maps its -shm file for writing.
    with _opened(store, "rw") as database:
        database.execute("BEGIN")
        yield database


def _has_database(store: Store) -> bool:
    """False for a store that Nix has not begun yet.  Raises :class:`UnknownSchema`, :class:`DatabaseDamaged`."""
    try:
        version = (store.state / "db/schema").read_text().strip()
    except FileNotFoundError:
        return False
    if not version:
        raise DatabaseDamaged(_unreadable(store, "its schema file is empty"))
    if version != SCHEMA_VERSION:
        raise UnknownSchema(
            f"the Nix database {store.database} has schema {version!r}; this version of cknix knows {SCHEMA_VERSION}"
        )
    return True


@contextmanager
def _opened(store: Store, mode: str) -> Iterator[sqlite3.Connection]:
    """The store's database, opened in SQLite's *mode*; its errors become this module's."""
    try:
        with closing(_connect(_uri(store, mode))) as database:
            yield database
    except sqlite3.Error as error:
        kind = getattr(error, "sqlite_errorname", "")
        if kind in _FULL or (kind == "SQLITE_CANTOPEN" and _lacks_inodes(store)):
            raise OutOfSpace(
                f"the file system of the store {store.physical} is full, so that not even its database can be read "
                f"({error}); free space there"
            ) from error
        damaged = kind.startswith(_DAMAGED) or _NO_TABLES in str(error) or not store.database.exists()
        raise (DatabaseDamaged if damaged else DatabaseUnreadable)(_unreadable(store, str(error))) from error


def _lacks_inodes(store: Store) -> bool:
    """True where SQLite may not be able to make the files that it wants beside the database."""
    state = os.statvfs(store.database.parent)
    return state.f_files > 0 and state.f_ffree < _FILES_OF_SQLITE


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)


def _uri(store: Store, mode: str) -> str:
    return f"file:{quote(str(store.database))}?mode={mode}"


def _unreadable(store: Store, why: str) -> str:
    return f"the Nix database {store.database} cannot be read: {why}"
