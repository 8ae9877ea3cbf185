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
    """A descriptor of the directory that the command inherits: it stays locked until that is closed everywhere."""

    @property
    def owner(self) -> str:
        """The directory of this run's GC roots."""
        return f"{_DIRECTORY}/{self.directory.name}"

    @property
    def short(self) -> Path:
        """A path to the directory for this process alone, short enough for a socket in it (107 bytes: unix(7))."""
        return Path(f"/proc/self/fd/{self.lock}")


@contextmanager
def scratch(store: Store, data_root: Path) -> Iterator[Scratch]:
    """A locked directory, removed at the end with the run's GC roots; first removes those of dead runs.

    Raises OSError.
    """
    runs = data_root / _DIRECTORY
    runs.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Held while directories are made and looked at, so that no other run takes a new one for a leftover.
    looking = _lock(runs, fcntl.LOCK_EX)
    try:
        leftovers = {path: lock for path in runs.iterdir() if (lock := _try_lock(path)) is not None}
        directory = runs / uuid.uuid4().hex[:12]
        directory.mkdir(mode=0o700)
        lock = _lock(directory, fcntl.LOCK_EX)
    finally:
        os.close(looking)
    try:
        for leftover, its_lock in leftovers.items():
            _remove(store, leftover)
            os.close(its_lock)
        yield Scratch(directory, lock)
    finally:
        _remove(store, directory)
        os.close(lock)


def _lock(directory: Path, how: int) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _try_lock(directory: Path) -> int | None:
    try:
        return _lock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return None


def _remove(store: Store, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.rmtree(store.gcroots / _DIRECTORY / directory.name, ignore_errors=True)
