"""The one directory that a cluster writes to, and the removal of what a killed run left behind.

A cluster holds a lock on `<name>.lock` beside its directory for as long as its process lives.  A lock that can be had
therefore belongs to a run that is gone; its nodes died with it (their init reads a pipe from it), and what is left,
a directory and control groups, is removed by the next start.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from functools import cache
from pathlib import Path
from typing import TextIO

from . import cgroups
from .cache import progress
from .command import run

PREFIX = "cknix-cluster-"
STARTING = 60.0  # seconds for which a lock without a directory may be of a run that is just starting
UNFIT = {"overlay", "tmpfs", "ramfs"}  # an overlay's upper directory cannot be on these, or takes memory


class NoScratch(Exception):
    """No directory is fit to hold a cluster."""


@cache
def scratch_base() -> Path:
    """`$TMPDIR` if it is on a real disk, else `/var/tmp`."""
    candidates = [Path(path) for path in (os.environ.get("TMPDIR"), "/var/tmp") if path]
    for candidate in candidates:
        if filesystem(candidate) not in UNFIT:
            return candidate
    tried = ", ".join(map(str, candidates))
    raise NoScratch(f"{tried}: on {', '.join(sorted(UNFIT))}; set TMPDIR to a directory on a disk")


def filesystem(path: Path) -> str:
    """Name of the filesystem that *path* is on."""
    return run(["findmnt", "--noheadings", "--output", "FSTYPE", "--target", path]).strip()


class Scratch:
    """A new, empty directory with a name that is unique on this machine, held until `remove`."""

    def __init__(self, base: Path | None = None) -> None:
        self._base = base or scratch_base()
        self.name = f"{PREFIX}{secrets.token_hex(3)}"
        self.directory = self._base / self.name
        self._lock = self._base / f"{self.name}.lock"
        self._held: TextIO | None = None

    def create(self) -> None:
        """Take the lock and make the directory, after removing what dead runs left in the same place."""
        reap(self._base)
        self._held = self._lock.open("x")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        self.directory.mkdir(mode=0o755)

    def remove(self) -> None:
        """Remove directory, control groups and lock.  To be called when no process uses them any more."""
        if self._held is None:
            return
        erase(self.directory)
        self._lock.unlink()
        self._held.close()
        self._held = None


def reap(base: Path) -> None:
    """Remove what runs that were killed left in *base*."""
    for lock in base.glob(f"{PREFIX}*.lock"):
        try:
            with lock.open("r+") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                directory = lock.with_suffix("")
                if directory.exists():
                    progress(f"removing what a killed run left: {directory}")
                    erase(directory)
                elif time.time() - lock.stat().st_mtime < STARTING:
                    continue
                lock.unlink()
        except (BlockingIOError, FileNotFoundError):
            continue


def erase(directory: Path) -> None:
    """Remove a cluster's directory and the control groups of its name."""
    cgroups.remove(f"{directory.name}-")
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        shutil.rmtree(directory)  # once more, to say what is in the way
