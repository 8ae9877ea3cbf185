"""Telling a garbage collection that runs already about a root that it has not seen.

Nix's collector reads all roots when it begins, and then deletes for as long as it takes; a link that is made meanwhile
comes too late.  So do here what Nix does for a new root of its own (``LocalStore::addTempRoot``, the same from Nix 2.5
to 2.34): take ``gc.lock`` shared, which succeeds when nothing is being collected; otherwise send the path to
``gc-socket/socket``, where the collector answers once it will keep that path with its closure, or has deleted it.

That answer is not to be relied on for a path that exists.  The collector deletes a path together with all that refers
to it, some hundred or all of the garbage, and makes only those wait who name the one that it has looked at last.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.store import Store

_ACKNOWLEDGED = b"1"
_AGAIN_SECONDS = 0.1
# Nix's own clients stay connected while they live.  A collector whose client leaves before it has put that connection
# into its table aborts when the next one gets the same descriptor (seen with Nix 2.26).
_LINGER_SECONDS = 0.1
_PATIENCE_SECONDS = 10.0
# Between two collections, or two portions of one, the lock may be free for no longer.
_LOOK_SECONDS = 0.01


class CollectionRuns(CknixError):
    """A garbage collection may be about to delete what a volume needs."""

    situation = Situation.COLLECTION_RUNS


def tell_collector(store: Store, path: StorePath) -> None:
    """Return when no collection that began before this call can delete *path* any more.

    To be called after the root is there and before *path* is looked up: it may be gone already.  Blocks while the
    collector deletes *path*, unless that goes with others: see :func:`outlast_collector`.  Raises OSError, and
    :class:`CollectionRuns` after 10 seconds: whoever holds the lock may be stopped, or no collector at all.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        descriptor = os.open(store.state / "gc.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # the collector makes it before it reads the roots
    try:
        while not _idle(descriptor) and not _told(store, path, deadline):
            # The collection is about to begin or to end.
            time.sleep(_AGAIN_SECONDS)
            if time.monotonic() > deadline:
                raise CollectionRuns(
                    f"whoever collects garbage in {store.uri} does not answer, and {path} may be about to be deleted; "
                    f"end what holds {store.state}/gc.lock, such as a stopped nix-collect-garbage: it is tried again"
                )
    finally:
        os.close(descriptor)


async def outlast_collector(store: Store, *paths: StorePath) -> None:
    """Return when of *paths*, whose roots are there, no collection that began before can delete any more.

    To be called after :func:`tell_collector`, when the roots are new ones, by whoever could not bear that a path goes
    after it was looked up.  Raises OSError, and :class:`CollectionRuns` after 10 seconds.
    """
    for seconds in _until_outlasted(store, paths):
        await asyncio.sleep(seconds)


def outlast_in_thread(store: Store, *paths: StorePath) -> None:
    """:func:`outlast_collector`, blocking."""
    for seconds in _until_outlasted(store, paths):
        time.sleep(seconds)


def _until_outlasted(store: Store, paths: Sequence[StorePath]) -> Iterator[float]:
    """Seconds to wait before it is looked at again, as long as that must be."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (path := _may_be_deleted(store, paths)) is not None:
        if time.monotonic() > deadline:
            raise CollectionRuns(
                f"{path} was in no use, and the garbage collection that runs on this node may be about to delete it; "
                "wait for that to end: it is tried again"
            )
        yield _LOOK_SECONDS


def _may_be_deleted(store: Store, paths: Sequence[StorePath]) -> StorePath | None:
    """One of *paths* that is there while somebody's collection runs; None: none is in danger."""
    try:
        descriptor = os.open(store.state / "gc.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if _idle(descriptor):
            return None
        # What is made from now on is not among what is being deleted.
        return next((path for path in paths if os.path.lexists(store.physical_path(path))), None)
    finally:
        os.close(descriptor)


def _idle(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told(store: Store, path: StorePath, deadline: float) -> bool:
    """False when the collector has not said by *deadline*, of the monotonic clock, or is not there any more."""
    # A chroot store's path can be longer than an address may be: by descriptor it never is.
    try:
        directory = os.open(store.state / "gc-socket", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as collector:
            collector.settimeout(max(deadline - time.monotonic(), _AGAIN_SECONDS))
            collector.connect(f"/proc/self/fd/{directory}/socket")
            collector.sendall(f"{path}\n".encode())
            told = collector.recv(1) == _ACKNOWLEDGED
            time.sleep(_LINGER_SECONDS)
            return told
    except (ConnectionError, FileNotFoundError, TimeoutError):
        return False
    finally:
        os.close(directory)
