"""Nix's SQLite database, read and written directly.

One ``nix`` process costs 14-20 ms; the recursive query below takes under a millisecond.  The schema (version 10) has
not changed between Nix 2.8 and 2.34; any other version is refused rather than guessed at.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from cknix_csi.api.closure import Closure, PathInfo
from cknix_csi.api.errors import CknixError, Code, OutOfSpace
from cknix_csi.api.storepath import HASH_LENGTH, STORE_DIR, StorePath
from cknix_csi.nix.store import Store

SCHEMA_VERSION = "10"

_BUSY_SECONDS = 10.0
# In WAL mode SQLite makes an index beside the database even to read it: 32 KiB (sqlite.org/walformat.html).
_FULL = {"SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"}

_HASH = re.compile(rf"[0-9a-df-np-sv-z]{{{HASH_LENGTH}}}")

_COLUMNS = "v.id, v.path, v.hash, v.registrationTime, v.deriver, v.narSize, v.ultimate, v.sigs, v.ca"

# UNION (not UNION ALL) ends the recursion on cycles: paths may refer to themselves.
_CLOSURE = f"""
    WITH RECURSIVE closure(id) AS (
        SELECT id FROM ValidPaths WHERE path = ?
        UNION
        SELECT r.reference FROM Refs r JOIN closure c ON r.referrer = c.id
    )
    SELECT {_COLUMNS} FROM closure c JOIN ValidPaths v ON v.id = c.id ORDER BY v.path
"""  # noqa: S608 - a constant list of columns, no input

# As Nix creates it (schema.sql of Nix 2.8 to 2.34), and the table that read-only clients look for.
_SCHEMA = """
    CREATE TABLE ValidPaths (
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
    CREATE TABLE Refs (
        referrer  integer not null,
        reference integer not null,
        primary key (referrer, reference),
        foreign key (referrer) references ValidPaths(id) on delete cascade,
        foreign key (reference) references ValidPaths(id) on delete restrict
    );
    CREATE INDEX IndexReferrer on Refs(referrer);
    CREATE INDEX IndexReference on Refs(reference);
    CREATE TRIGGER DeleteSelfRefs before delete on ValidPaths
      begin
        delete from Refs where referrer = old.id and reference = old.id;
      end;
    CREATE TABLE DerivationOutputs (
        drv  integer not null,
        id   text not null,
        path text not null,
        primary key (drv, id),
        foreign key (drv) references ValidPaths(id) on delete cascade
    );
    CREATE INDEX IndexDerivationOutputs on DerivationOutputs(path);
    CREATE TABLE SchemaMigrations (migration text primary key not null);
"""


class PathNotValid(CknixError):
    """A store path that the store's database does not hold."""

    code = Code.NOT_FOUND
    reason = "PathNotValid"

    def __init__(self, store: Store, path: StorePath | str) -> None:
        super().__init__(f"{path} is not in the store {store.uri}")


class UnknownSchema(CknixError):
    """A Nix database of a version this program does not know."""

    reason = "UnknownNixSchema"


class DatabaseUnreadable(CknixError):
    """A Nix database that SQLite cannot read: locked for too long, damaged, or out of reach."""

    code = Code.UNAVAILABLE
    reason = "NixDatabaseUnreadable"


def is_valid(store: Store, path: StorePath) -> bool:
    """True when *path* is registered.  False as well for a store that does not exist yet."""
    with _reading(store) as database:
        if database is None:
            return False
        return database.execute("SELECT 1 FROM ValidPaths WHERE path = ?", (str(path),)).fetchone() is not None


def query_closure(store: Store, root: StorePath) -> Closure:
    """*root* with everything it refers to.  Raises :class:`PathNotValid` and :class:`UnknownSchema`."""
    with _reading(store) as database:
        rows = [] if database is None else database.execute(_CLOSURE, (str(root),)).fetchall()
        if database is None or not rows:
            raise PathNotValid(store, root)
        return Closure(root, tuple(_path_infos(database, rows)))


def path_info(store: Store, hash_part: str) -> PathInfo | None:
    """The valid path whose hash is *hash_part* (32 characters of Nix base32), or None."""
    if not _HASH.fullmatch(hash_part):
        return None
    with _reading(store) as database:
        if database is None:
            return None
        prefix = f"{STORE_DIR}/{hash_part}"
        # A range on the unique index of paths; '-' is followed by '.' in ASCII.
        row = database.execute(
            f"SELECT {_COLUMNS} FROM ValidPaths v WHERE v.path >= ? AND v.path < ? LIMIT 1",  # noqa: S608
            (f"{prefix}-", f"{prefix}."),
        ).fetchone()
        return None if row is None else next(_path_infos(database, [row]))


def write_database(closure: Closure, directory: Path) -> None:
    """Write a database of exactly *closure* as ``<directory>/db.sqlite`` with its ``schema`` file; nothing is synced.

    The same closure gives the same bytes: rows are in the order of their paths and registration times are fixed.  It
    is in rollback-journal mode, which a client can read on a read-only file system.
    Raises :class:`OutOfSpace`, OSError.
    """
    target = directory / "db.sqlite"
    target.unlink(missing_ok=True)
    try:
        _write_rows(closure, target)
    except sqlite3.Error as error:
        # In a fresh file nothing else can go wrong: SQLite says "disk I/O error" for some kinds of a full disk.
        raise OutOfSpace(f"the database of {closure.root} cannot be written to {directory}: {error}") from error
    (directory / "schema").write_text(SCHEMA_VERSION)


def _write_rows(closure: Closure, target: Path) -> None:
    ids = {info.path: number for number, info in enumerate(closure.paths, start=1)}
    with closing(sqlite3.connect(target, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.executescript(_SCHEMA)
        database.execute("BEGIN")
        database.executemany(
            "INSERT INTO ValidPaths VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    ids[info.path],
                    str(info.path),
                    info.nar_hash,
                    1,
                    info.deriver,
                    info.nar_size,
                    1 if info.ultimate else None,
                    " ".join(info.signatures) or None,
                    info.content_address,
                )
                for info in closure.paths
            ),
        )
        database.executemany(
            "INSERT INTO Refs VALUES (?, ?)",
            ((ids[info.path], ids[reference]) for info in closure.paths for reference in info.references),
        )
        database.execute("COMMIT")


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
def _reading(store: Store) -> Iterator[sqlite3.Connection | None]:
    """A read transaction on the store's database; None when the store has none yet."""
    try:
        version = (store.state / "db/schema").read_text().strip()
    except FileNotFoundError:
        yield None
        return
    if version != SCHEMA_VERSION:
        raise UnknownSchema(
            f"the Nix database {store.database} has schema {version!r}; this version of cknix knows {SCHEMA_VERSION}"
        )
    # Read-write is needed even to read: in WAL mode SQLite maps its -shm file for writing.
    uri = f"file:{quote(str(store.database))}?mode=rw"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN")
            yield database
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") in _FULL:
            raise OutOfSpace(
                f"the file system of the store {store.physical} is full, so that not even its database can be read "
                f"({error}); free space there"
            ) from error
        raise DatabaseUnreadable(f"the Nix database {store.database} cannot be read: {error}") from error
