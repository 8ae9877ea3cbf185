"""The directory ``/nix`` of a machine that has none: made for a command to find its volume at, and removed again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def mountpoint(directory: Path) -> Iterator[None]:
    """*directory* exists in the block; one that was made for it is removed, if it is empty and no other run uses it.

    Who uses it holds a shared lock: to remove it would take away what is mounted there in other namespaces (rmdir(2)
    does, since Linux 3.18).  Raises OSError.
    """
    made = False
    descriptor = None
    while descriptor is None:
        with suppress(FileExistsError):
            directory.mkdir()
            made = True
        descriptor = _held(directory)
    try:
        yield
    finally:
        if made:
            _remove(directory, descriptor)
        os.close(descriptor)


def _held(directory: Path) -> int | None:
    """A descriptor of *directory* with a shared lock; None when another run has removed it in this moment."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        if directory.is_symlink():  # to nowhere
            raise
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            return descriptor
    os.close(descriptor)
    return None


def _remove(directory: Path, descriptor: int) -> None:
    with suppress(OSError):  # another run uses it, or it is not empty
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory.rmdir()
