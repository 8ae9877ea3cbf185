"""What is on the disk when a call returns, and stays there through a power cut."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)


def make_directory(directory: Path) -> None:
    """Make *directory* and those above it.  Raises OSError."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Sync the entries of *directory*.  Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file_systems(directories: Iterable[Path]) -> None:
    """Sync all of the file systems that *directories* are on, each once, however long that takes.  Raises OSError."""
    synced = set()
    for directory in directories:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            device = os.fstat(descriptor).st_dev
            if device not in synced and _LIBC.syncfs(descriptor) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(directory))
            synced.add(device)
        finally:
            os.close(descriptor)
