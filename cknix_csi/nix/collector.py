"""Telling a garbage collection that runs already about a root that it has not seen.

Nix's collector reads all roots when it begins, and then deletes for as long as it takes; a link that is made meanwhile
comes too late.  So do here what Nix does for a new root of its own (``LocalStore::addTempRoot``, the same from Nix 2.5
to 2.34): take ``gc.lock`` shared, which succeeds when nothing is being collected; otherwise send the path to
``gc-socket/socket``, where the collector answers once it will keep that path with its closure, or has deleted it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time

from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.store import Store

_ACKNOWLEDGED = b"1"
_AGAIN_SECONDS = 0.1
# Nix's own clients stay connected while they live.  A collector whose client leaves before it has put that connection
# into its table aborts when the next one gets the same descriptor (seen with Nix 2.26).
_LINGER_SECONDS = 0.1


def tell_collector(store: Store, path: StorePath) -> None:
    """Return when no collection that began before this call can delete *path* any more.

    To be called after the root is there and before *path* is looked up: it may be gone already.  Blocks while the
    collector deletes *path*.  Raises OSError.
    """
    try:
        descriptor = os.open(store.state / "gc.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # the collector makes it before it reads the roots
    try:
        while not _idle(descriptor) and not _told(store, path):
            # The collection is about to begin or to end.
            time.sleep(_AGAIN_SECONDS)
    finally:
        os.close(descriptor)


def _idle(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told(store: Store, path: StorePath) -> bool:
    # A chroot store's path can be longer than an address may be: by descriptor it never is.
    try:
        directory = os.open(store.state / "gc-socket", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as collector:
            collector.connect(f"/proc/self/fd/{directory}/socket")
            collector.sendall(f"{path}\n".encode())
            told = collector.recv(1) == _ACKNOWLEDGED
            time.sleep(_LINGER_SECONDS)
            return told
    except (ConnectionError, FileNotFoundError):
        return False
    finally:
        os.close(directory)
