"""What an interrupted fetch leaves in the store: a part of a path, beside its lock, that nobody knows of.

Nix overwrites it when it fetches the path again.  Until then it takes space, and a closure that is too big for the disk
would keep the disk full for everybody.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cknix_csi.api.storepath import STORE_DIR
from cknix_csi.nix import database
from cknix_csi.nix.store import Store, is_basename

_LOCK = ".lock"

_log = logging.getLogger(__name__)


def clear(store: Store) -> None:
    """Delete what is not registered, has a lock of Nix's beside it, and is not being written.  Synchronous.

    To be called when the database is whole (:func:`recover`).  Raises OSError and what the database raises.
    """
    for lock in sorted(store.physical.glob(f"*{_LOCK}")):
        path = lock.with_suffix("")
        if not is_basename(path.name) or not os.path.lexists(path):
            continue
        # Nix holds the lock from before it writes until the path is registered.
        with _locked(lock) as mine:
            if mine and _is_unregistered(store, path):
                delete(path)
                _log.info("deleted %s, which an interrupted fetch left", path)


def clear_all(store: Store) -> None:
    """As :func:`clear`, and also what has no lock beside it: for when nobody can have begun to write anything."""
    clear(store)
    for name in sorted(os.listdir(store.physical)):
        path = store.physical / name
        if is_basename(name) and not os.path.lexists(f"{path}{_LOCK}") and _is_unregistered(store, path):
            delete(path)
            _log.info("deleted %s, which is not registered", path)


@contextmanager
def _locked(lock: Path) -> Iterator[bool]:
    """Holds the lock and gives True, unless somebody else has it."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _try_lock(descriptor, lock)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, lock: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever has unlinked it was done with the path, and the next one's lock is another file.
        return os.path.samestat(os.fstat(descriptor), os.lstat(lock))
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_unregistered(store: Store, path: Path) -> bool:
    return f"{STORE_DIR}/{path.name}" not in database.registered(store)


def delete(path: Path) -> None:
    """Delete *path*, whatever it is, with all that is in it; nothing there is fine.  Raises OSError."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        path.unlink()
        return
    for directory, _, _ in os.walk(path):
        os.chmod(directory, stat.S_IRWXU)
    shutil.rmtree(path)
