"""Generated closures as chroot stores with a database that the real Nix has made and reads.

Nix creates the database; the rows are written to it directly, since hashing 700 MB would say nothing here.  NAR hashes,
NAR sizes and signatures are thus well-formed and not true: ``nix path-info`` and ``nix-store --dump-db`` work,
``nix-store --verify --check-contents`` would complain.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from bench.shapes import RECIPE, Entry, Kind, Plan, Planned, Shape, entries, plan, store_path
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.store import Store

PROGRAM = "program"
"""The store with one closure of one large file."""
_EPOCH = (1_000_000_000, 1_000_000_000)
_BLOB = random.Random(RECIPE).randbytes(1 << 20)
_WORKERS = 2
_NIX_CONFIG = "experimental-features = nix-command\nbuild-users-group =\n"


def provide(stores: Path, shape: Shape, tell: Callable[[float], None]) -> tuple[Store, Plan]:
    """The store of *shape* below *stores*, generated unless it is there already; *tell* gets the share that is done."""
    wanted = plan(shape)
    return _provided(stores, shape.name, [*wanted.paths, *wanted.others], tell), wanted


def provide_program(stores: Path, size: int) -> tuple[Store, Planned]:
    """A store with a program of *size* bytes: a directory with the one file ``bin/program``."""
    program = Planned(store_path(f"program-{size}"), Kind.DIRECTORY, 1, size, ())
    return _provided(stores, f"{PROGRAM}-{size}", [program], lambda _: None), program


def _provided(stores: Path, name: str, paths: list[Planned], tell: Callable[[float], None]) -> Store:
    home = stores / f"{name}-{RECIPE}"
    if home.exists():  # and whole: it was renamed into place
        return Store.chroot(home)
    building = stores / ".building"
    shutil.rmtree(building, ignore_errors=True)
    store = Store.chroot(building)
    store.physical.mkdir(parents=True)
    with multiprocessing.get_context("fork").Pool(_WORKERS) as pool:
        jobs = [(str(store.physical), path) for path in paths]
        for done, _ in enumerate(pool.imap_unordered(_write, jobs, chunksize=4)):
            tell(done / len(paths))
    _register(store, paths)
    subprocess.run(["sync", "--file-system", stores], check=True)
    building.rename(home)
    return Store.chroot(home)


def nix_environment(store: Store) -> dict[str, str]:
    """For Nix commands that shall work on *store*."""
    return {**os.environ, "NIX_REMOTE": store.uri, "NIX_CONFIG": _NIX_CONFIG}


def _register(store: Store, paths: list[Planned]) -> None:
    subprocess.run(["nix-store", "--init"], env=nix_environment(store), check=True)
    ids = {planned.path: number for number, planned in enumerate(paths, start=1)}
    now = int(time.time())
    with closing(sqlite3.connect(store.database)) as database, database:
        database.executemany(
            "INSERT INTO ValidPaths (id, path, hash, registrationTime, deriver, narSize, sigs) VALUES (?,?,?,?,?,?,?)",
            ((ids[one.path], str(one.path), *_details(one, now)) for one in paths),
        )
        database.executemany("INSERT INTO Refs VALUES (?, ?)", _references(paths, ids))


def _details(one: Planned, now: int) -> tuple[str, int, str, int, str]:
    digest = hashlib.sha256(str(one.path).encode()).hexdigest()
    deriver = f"{store_path(f'{one.path.name}.drv')}"
    signature = f"cache.example.org-1:{digest}{digest[:22]}=="  # as long as a real one
    return f"sha256:{digest}", now, deriver, one.size + 200 * one.files, signature


def _references(paths: Iterable[Planned], ids: dict[StorePath, int]) -> Iterable[tuple[int, int]]:
    return ((ids[one.path], ids[reference]) for one in paths for reference in one.references)


def _write(job: tuple[str, Planned]) -> None:
    physical, planned = job
    at = f"{physical}/{planned.path.basename}"
    if planned.kind is Kind.LINK:
        os.symlink(str(planned.references[0]), at)
        os.utime(at, ns=_EPOCH, follow_symlinks=False)
    elif planned.kind is Kind.FILE:
        _write_file(at, planned.size, executable=True)
    else:
        _write_directory(at, planned)


def _write_directory(at: str, planned: Planned) -> None:
    os.mkdir(at)
    directories = [at]
    for entry in _entries_of(planned):
        path = f"{at}/{entry.name}"
        if entry.kind is Kind.DIRECTORY:
            os.mkdir(path)
            directories.append(path)
        elif entry.kind is Kind.LINK:
            os.symlink(entry.target, path)
            os.utime(path, ns=_EPOCH, follow_symlinks=False)
        else:
            _write_file(path, entry.size, executable=entry.executable)
    for directory in reversed(directories):
        os.chmod(directory, 0o555)
        os.utime(directory, ns=_EPOCH)


def _entries_of(planned: Planned) -> Iterable[Entry]:
    if planned.path.name.startswith(PROGRAM):
        return [Entry("bin", Kind.DIRECTORY), Entry("bin/program", Kind.FILE, planned.size, executable=True)]
    return entries(planned)


def _write_file(path: str, size: int, *, executable: bool) -> None:
    with open(path, "wb", buffering=0) as file:
        rest = size
        while rest > 0:
            rest -= file.write(_BLOB[:rest])
        os.fchmod(file.fileno(), 0o555 if executable else 0o444)
    os.utime(path, ns=_EPOCH)
