"""Who lives in a data root: one process at a time, and what to do with what a controller left behind.

The controller's store is on the disk of its node.  When Kubernetes starts the controller on another node, the old store
stays with its GC roots; no controller would ever look at it again.  The node daemon, whose data root it is in, takes it
away once it knows where the controller lives now.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation

_LOCK = ".lock"
_POLL_SECONDS = 0.5

_log = logging.getLogger(__name__)


class DataRootOccupied(CknixError):
    """Another process works on the data root."""

    situation = Situation.DATA_ROOT_OCCUPIED


async def move_in(data_root: Path, *, patience: float) -> int:
    """Lock *data_root* for this process; gives the descriptor that holds the lock.

    Waits *patience* seconds for a predecessor to end, then raises :class:`DataRootOccupied`.
    """
    data_root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = asyncio.get_running_loop().time() + patience
    while not _try_lock(descriptor):
        if asyncio.get_running_loop().time() > deadline:
            os.close(descriptor)
            raise DataRootOccupied(f"another process has worked on {data_root} for {patience:.0f} s; end it first")
        await asyncio.sleep(_POLL_SECONDS)
    return descriptor


def clear_out(data_root: Path, throw_away: Callable[[str], None]) -> int:
    """Give everything in *data_root* to *throw_away*, unless somebody lives there; gives the number of entries.

    The directory itself stays: it may be the source of a container's mount already, whose process waits for the lock.
    """
    with _vacant(data_root) as vacant:
        if not vacant:
            return 0
        entries = [entry.path for entry in os.scandir(data_root) if entry.name != _LOCK]
        for path in entries:
            throw_away(path)
        if entries:
            _log.info("removed the store that a controller left in %s", data_root)
        return len(entries)


@contextmanager
def _vacant(data_root: Path) -> Iterator[bool]:
    """Holds the lock of *data_root* and gives True, if it has one and nobody else holds it."""
    try:
        descriptor = os.open(data_root / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
