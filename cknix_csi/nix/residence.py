"""Who lives in a data root: one process at a time, and what to do with what a controller left behind.

The controller's store is on the disk of its node.  When Kubernetes starts the controller on another node, the old store
stays, with its GC roots and with results that nobody may be able to build again.  The node daemon, whose data root it
is in, keeps it for a time, for the controller to come back to, and takes it away then.

A note in the store says since when it has been abandoned.  Only a daemon that knows of a controller on another node
makes it, and whoever moves in takes it away: where there is none, nothing is removed.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from cknix_csi.api.errors import CknixError
from cknix_csi.api.progress import humanise
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.collection import Collected, Space
from cknix_csi.nix.wants import Wants

_LOCK = ".lock"
_NOTE = ".abandoned"
"""An empty file; its time of modification is when the store was first seen abandoned."""
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
    try:
        await asyncio.to_thread(_take_back, data_root)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _take_back(data_root: Path) -> None:
    note = data_root / _NOTE
    with suppress(FileNotFoundError):
        seconds = time.time() - note.stat().st_mtime
        note.unlink()
        _log.info("found the store in %s again, which had been abandoned for %s", data_root, humanise(max(seconds, 0)))


def abandon(data_root: Path, throw_away: Callable[[str], None], *, keep: float) -> int:
    """A controller lives on another node: note that, and *keep* seconds later throw away what is in *data_root*.

    Not while somebody lives there.  Gives the number of entries that were thrown away.  The directory itself stays: it
    may be the source of a container's mount already, whose process waits for the lock.  Raises OSError.
    """
    with _vacant(data_root) as vacant:
        left = _left(data_root) if vacant else []
        if not left:
            return 0
        if keep > 0:
            since = _noted(data_root / _NOTE)
            if since is None:
                _log.info(
                    "the controller has left its store in %s, which is kept for %s (CKNIX_ABANDONED_STORE_TIME)",
                    data_root,
                    humanise(keep),
                )
                return 0
            if time.time() - since < keep:
                return 0
        return _clear_out(data_root, left, throw_away)


def give_up(data_root: Path, throw_away: Callable[[str], None]) -> int:
    """Room is needed: what is noted as abandoned in *data_root* goes now.  Otherwise as :func:`abandon`."""
    with _vacant(data_root) as vacant:
        if not vacant or not (data_root / _NOTE).exists():
            return 0
        return _clear_out(data_root, _left(data_root), throw_away)


class CollectableStore(Protocol):
    """Satisfied by ``collection.Collector``."""

    async def space(self) -> Space: ...

    async def collect(self, want: int, order: Sequence[StorePath], wants: Callable[[], Wants]) -> Collected: ...


class Trash(Protocol):
    """Satisfied by ``volumes.volumes.Volumes``."""

    async def throw_away(self, choose: Callable[[Callable[[str], None]], object]) -> None:
        """Run *choose* in a thread with a function that throws a path away.  Raises CknixError."""

    async def emptied(self) -> None:
        """Return when what was thrown away is deleted, or after a while."""


class AbandonedStore:
    """What a controller leaves in *data_root* on this *node*, kept for *keep* seconds."""

    def __init__(self, data_root: Path, trash: Trash, *, node: str, keep: float) -> None:
        self._data_root = data_root
        self._trash = trash
        self._node = node
        self._keep = keep

    async def controller_is_on(self, node: str) -> None:
        """The controller is on *node*; to be called now and then.  Raises CknixError, OSError."""
        if node != self._node:
            await self._trash.throw_away(lambda take: abandon(self._data_root, take, keep=self._keep))

    def before(self, store: CollectableStore) -> CollectableStore:
        """*store*, whose collections begin with what was abandoned; where that cannot go, it is logged."""
        return _AbandonedFirst(store, self._give_up)

    async def _give_up(self) -> None:
        try:
            await self._trash.throw_away(lambda take: give_up(self._data_root, take))
        except (CknixError, OSError) as error:
            _log.warning("the store that a controller left in %s is not removed: %s", self._data_root, error)
        await self._trash.emptied()


class _AbandonedFirst:
    def __init__(self, store: CollectableStore, give_up: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._give_up = give_up

    async def space(self) -> Space:
        return await self._store.space()

    async def collect(self, want: int, order: Sequence[StorePath], wants: Callable[[], Wants]) -> Collected:
        await self._give_up()
        return await self._store.collect(want, order, wants)


def _left(data_root: Path) -> list[str]:
    return [entry.path for entry in os.scandir(data_root) if entry.name not in {_LOCK, _NOTE}]


def _noted(note: Path) -> float | None:
    """Since when, in seconds since the epoch; None when that is now."""
    try:
        since = note.stat().st_mtime
    except FileNotFoundError:
        note.touch()
        return None
    if since > time.time():
        # A clock that was wrong must not keep it for ever, nor let it go too soon.
        os.utime(note)
        return time.time()
    return since


def _clear_out(data_root: Path, left: Sequence[str], throw_away: Callable[[str], None]) -> int:
    # The note last: until then it says what is going on.
    for path in left:
        throw_away(path)
    (data_root / _NOTE).unlink(missing_ok=True)
    _log.info("removed the store that a controller left in %s", data_root)
    return len(left)


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
