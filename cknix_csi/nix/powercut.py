"""What a power cut has left of the paths that were registered just before it.

Nix registers a path when its files are written, and its database is synced long before they are: for half a minute a
path can come back from a power cut registered, and its files empty or cut off (NixOS/nix#1218, #3498).  Nothing would
ever notice, since to Nix what is registered is whole.  A deletion is the same thing reversed: the files can be gone and
the path be registered again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cknix_csi.api.progress import humanise
from cknix_csi.api.quantity import readable_size
from cknix_csi.nix import database, leftovers
from cknix_csi.nix.cache import nar
from cknix_csi.nix.database import Registered
from cknix_csi.nix.recovery import shown
from cknix_csi.nix.store import Store

_TOLD_SECONDS = 10.0
_MOST_NAMED = 10

_log = logging.getLogger(__name__)


class Stopped(Exception):
    """Somebody has set *stop*."""


def mend(
    store: Store,
    newest: int,
    touched: Iterable[str],
    *,
    certain: bool,
    passed: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Compare what was registered after the path of number *newest*, and *touched*, with the hashes of their NARs.

    What is damaged is deleted and, with all that refers to it, forgotten, so that it is fetched or built anew.
    *certain* that this is another boot: then nothing is in use, and what is in the store and not registered is deleted
    as well, since a power cut takes registrations, too.  Otherwise what views and farms show stays as it is.

    Every ten seconds *passed* is told the number up to which nothing damaged is left.  To be called before anything of
    the store is used, with a database that is whole.  Blocks; raises :class:`Stopped` soon after *stop* is set, and
    what the database and :func:`shown` raise.
    """
    suspects = database.registered_since(store, newest, touched)
    spared = frozenset[str]() if certain else shown(store)
    _log.warning(
        "the machine went down before all of the store %s was on its disk: comparing the %d store paths written last "
        "(%s) with their hashes",
        store.physical,
        len(suspects),
        readable_size(sum(suspect.nar_size for suspect in suspects)),
    )
    began = told = time.monotonic()
    damaged: list[str] = []
    forgotten: set[str] = set()
    for count, suspect in enumerate(suspects, 1):
        if not _is_sound(store, suspect, stop):
            damaged.append(suspect.path)
            if suspect.path not in spared:
                _delete(_physical(store, suspect))
                forgotten.update(database.forget(store, suspect.number))
        if time.monotonic() - told >= _TOLD_SECONDS:
            told = time.monotonic()
            passed(max(suspect.number, newest))
            _log.info("%d of %d store paths compared, %d of them damaged", count, len(suspects), len(damaged))
    if certain:
        _clear(store)
    seconds = humanise(time.monotonic() - began)
    if not damaged:
        _log.info("all %d store paths are whole (%s)", len(suspects), seconds)
        return
    more = f" and {len(damaged) - _MOST_NAMED} more" if len(damaged) > _MOST_NAMED else ""
    _log.warning(
        "%d of %d store paths are damaged (%s), and %d are to be fetched or built anew: %s%s",
        len(damaged),
        len(suspects),
        seconds,
        len(forgotten),
        ", ".join(damaged[:_MOST_NAMED]),
        more,
    )


def _is_sound(store: Store, path: Registered, stop: threading.Event) -> bool:
    digest = hashlib.sha256()
    try:
        physical = _physical(store, path)
        for piece in nar.dump_of_size(physical, path.nar_size) if path.nar_size else nar.dump(physical):
            if stop.is_set():
                raise Stopped
            digest.update(piece)
    except nar.NarUnreadable:
        return False
    return path.nar_hash == f"sha256:{digest.hexdigest()}"


def _delete(path: Path) -> None:
    try:
        leftovers.delete(path)
    except OSError as error:
        # Nix will do so before it puts its own there.
        _log.warning("%s is damaged, and cannot be deleted: %s", path, error)


def _clear(store: Store) -> None:
    try:
        leftovers.clear_all(store)
    except OSError as error:
        _log.warning("what is in %s and not registered was not deleted: %s", store.physical, error)


def _physical(store: Store, path: Registered) -> Path:
    return store.physical / os.path.basename(path.path)
