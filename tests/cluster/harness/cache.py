"""Where built things are kept between runs: outside the tree, made once, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path


def cache_root() -> Path:
    """The directory of everything that is built once: `$XDG_CACHE_HOME/cknix-test`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(base) / "cknix-test"
    root.mkdir(parents=True, exist_ok=True)
    return root


def progress(message: str) -> None:
    """Tell the person who waits; standard error, so that a command's own output stays clean."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Hold the lock *name*, so that two processes do not build the same thing at once."""
    with (cache_root() / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"{name}: waiting for another process that is building")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def built_beside(target: Path) -> Iterator[Path]:
    """A directory beside *target* to build in; it becomes *target* when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """The path of a file beside *target* to write; it becomes *target* when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield partial
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
