"""What one run has of its own below the data root, and what runs leave that were killed.

Runs share the store.  Views and written data are each run's own, since no run sees the mounts of another; the
directory is locked for as long as the run or the command it started lives.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.nix.store import Store

_DIRECTORY = "runs"


@dataclass(frozen=True, slots=True)
class Scratch:
    directory: Path
    lock: int
    """A descriptor that the command inherits: the directory stays locked until it is closed everywhere."""

    @property
    def owner(self) -> str:
        """The directory of this run's GC roots."""
        return f"{_DIRECTORY}/{self.directory.name}"


@contextmanager
def scratch(store: Store, data_root: Path) -> Iterator[Scratch]:
    """A locked directory, removed at the end with the run's GC roots; first removes those of dead runs."""
    runs = data_root / _DIRECTORY
    runs.mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in runs.iterdir():
        lock = _try_lock(leftover)
        if lock is not None:
            _remove(store, leftover)
            os.close(lock)
    directory = runs / uuid.uuid4().hex[:12]
    # Locked before it has its name, so that no other run takes it for a leftover.
    beside = runs / f".{directory.name}"
    beside.mkdir(mode=0o700)
    lock = os.open(beside, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    beside.rename(directory)
    try:
        yield Scratch(directory, lock)
    finally:
        _remove(store, directory)
        os.close(lock)


def _try_lock(directory: Path) -> int | None:
    if directory.name.startswith("."):
        return None
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _remove(store: Store, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.rmtree(store.gcroots / _DIRECTORY / directory.name, ignore_errors=True)
