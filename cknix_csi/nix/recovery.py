"""What a damaged store needs before anything is fetched into it again.

A disk that lost data, or an administrator, can take store objects or the database away.  Everything can be fetched
again, but nothing that a mounted view shows may change under it, and Nix deletes what it finds on disk and not in its
database before it puts its own there.  So what the views show is registered again first: each view has a database of
exactly its closure, and so has each farm.  What exists is never rewritten; only what is missing is fetched.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.errors import CknixError, OutOfSpace
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database
from cknix_csi.nix.database import DatabaseDamaged, DatabaseUnreadable, PathNotValid
from cknix_csi.nix.store import Store, is_basename

# Where a node's views and farms are, and in them what StoreClosures.write_state wrote.
_VIEWS, _OF_A_VIEW = "views", "meta/nix/var/nix/db/db.sqlite"
_FARMS, _OF_A_FARM = "farms", "tree/nix/var/nix/db/db.sqlite"
_FULL = {errno.ENOSPC, errno.EDQUOT}

_T = TypeVar("_T")

_log = logging.getLogger(__name__)
# For threads: who waits for one may be cancelled while it works on.
_lock = threading.Lock()


class StoreUnreadable(CknixError):
    """The operating system cannot tell what is in the store."""

    situation = Situation.STORE_UNREADABLE


def recover(store: Store) -> bool:
    """Give *store* a database that holds at least what its views and farms show.  Synchronous: call it from a thread.

    To be called before anything is fetched.  A database that cannot be read any more is set aside, and True given.
    Raises :class:`DatabaseUnreadable` also when a view's cannot be read: then nobody knows what must not be touched;
    :class:`OutOfSpace` and :class:`StoreUnreadable`.
    """
    aside = None
    with _lock, told(store):
        try:
            database.require_whole(store)
        except DatabaseDamaged as error:
            lost = _shown(store, set())
            aside = database.set_aside(store)
            _log.error("%s; set aside in %s, and paths are registered or fetched anew", error.message, aside)
        else:
            lost = _shown(store, database.registered(store))
        if lost:
            database.register(store, lost.values())
            _log.warning("%d store paths of volumes were not registered any more, and are again", len(lost))
    return aside is not None


def shown(store: Store) -> set[str]:
    """All paths that views and farms show, in use or not.  Synchronous.

    Raises :class:`DatabaseUnreadable`, :class:`OutOfSpace` and :class:`StoreUnreadable`.
    """
    with told(store):
        return {path for paths in _of_trees(store, database.read_paths) for path in paths}


def is_whole(store: Store, path: StorePath) -> bool:
    """True when *path* is registered with its closure, and all of that is on disk.

    Raises :class:`DatabaseUnreadable`, :class:`StoreUnreadable`.
    """
    try:
        return not missing(store, path)
    except (PathNotValid, DatabaseDamaged):
        return False


def missing(store: Store, path: StorePath) -> list[StorePath]:
    """What is registered of the closure of *path* and not on disk: one lstat each.

    Raises :class:`PathNotValid`, :class:`DatabaseUnreadable`, :class:`StoreUnreadable`.
    """
    closure = database.query_closure(store, path)
    with told(store):
        return [info.path for info in closure.paths if not _exists(store.physical_path(info.path))]


def _exists(path: os.PathLike[str]) -> bool:
    # Not os.path.lexists: what cannot be looked at, on a failing disk, is not known to be missing.
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def told(store: Store) -> Iterator[None]:
    """What the operating system says in the block of *store*'s disk becomes OutOfSpace or :class:`StoreUnreadable`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutOfSpace(
                f"the file system of the store {store.physical} is full ({error}); free space there"
            ) from error
        raise StoreUnreadable(
            f"the store {store.physical} cannot be looked at ({error}); see the kernel log"
        ) from error


def _shown(store: Store, known: set[str]) -> dict[StorePath, PathInfo]:
    """What views and farms show, all of them together, by path and without what is *known*."""
    found = _of_trees(store, lambda file: database.read_database(file, known))
    return {info.path: info for infos in found for info in infos}


def _of_trees(store: Store, read: Callable[[Path], _T]) -> list[_T]:
    """What *read* gives of each view's and each farm's database."""
    found = []
    for view in _entries(store, _VIEWS):
        try:
            found.append(read(view / _OF_A_VIEW))
        except DatabaseUnreadable:
            # One that is being built is not whole yet, one may just have gone, and what is no view shows nothing.
            if is_basename(view.name) and view.exists():
                raise
    for farm in _entries(store, _FARMS):
        try:
            found.append(read(farm / _OF_A_FARM))
        except DatabaseUnreadable as error:
            # Its files have names of their own: they stay as they are, whatever becomes of those in the store.
            if is_basename(farm.name) and farm.exists():
                _log.warning("what the farm %s shows is not known: %s", farm.name, error)
    return found


def _entries(store: Store, name: str) -> list[Path]:
    if store.root is None or not (directory := store.root / name).is_dir():
        return []
    return sorted(directory.iterdir())
