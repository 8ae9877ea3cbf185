"""Whether a view that is found is still what was built: somebody may have removed parts of it, or of the store.

Everything in a view but its entries' own attributes was stamped with one time when it was built, and a directory's time
changes with its entries; so a look at the few fixed files and at each store path's entry and object tells, whatever
number of files is in those.  Contents are not read: after a power cut, which could have lost some, a view has no user,
and one that another process left without a user is not used.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from cknix_csi.volumes import syscalls
from cknix_csi.volumes.failures import StoreDamaged, explained

STAMP = 1_000_000_000
"""Nanoseconds since the epoch: Nix's own time of everything in a store, and ours of what is around it."""
REDIRECT = "trusted.overlay.redirect"
METACOPY = "trusted.overlay.metacopy"
LINKS = ".links"
"""A directory of the store that is no store path."""


Compare = Callable[[str, int, os.stat_result, str], str | None]
"""What is wrong with what was made of a store object: by its directory's path and descriptor, the object, its name."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is looked at in a tree."""

    noun: str
    layer: str
    """The directory in it that holds ``nix``."""
    beside: tuple[str, ...]
    """Directories beside that."""
    lost: str
    """What stands before the closure's id where there is nothing of its root."""
    compare: Compare


def flaw(view: str, closure_id: str, store_dir: str) -> str | None:
    """What is wrong with the view in directory *view*, None when it is whole.  About 10 µs per store path.

    Raises StoreDamaged when an object that the view shows is gone from *store_dir*: healing that heals the view too.
    Raises VolumeFailed when the disk cannot be read.
    """
    return _flaw(_Kind("view", "meta", ("m",), "the entry of ", _flaw_of_entry), view, closure_id, store_dir)


def flaw_of_farm(farm: str, closure_id: str, store_dir: str) -> str | None:
    """:func:`flaw` of the farm in directory *farm*.

    Of each store path only its own attributes are compared, which for a directory change with its entries.
    """
    return _flaw(_Kind("farm", "tree", ("m", "empty"), "", _flaw_of_object), farm, closure_id, store_dir)


def _flaw(kind: _Kind, tree: str, closure_id: str, store_dir: str) -> str | None:
    with (
        explained(f"look at the {kind.noun} of {closure_id}"),
        syscalls.owned(os.open(store_dir, os.O_RDONLY | os.O_DIRECTORY)) as store,
    ):
        layer = f"{tree}/{kind.layer}"
        try:
            return (
                _flaw_of_each(f"{layer}/nix/store", closure_id, store, kind)
                or _flaw_of_fixed(layer)
                or next((f"{name} is missing" for name in kind.beside if not os.path.isdir(f"{tree}/{name}")), None)
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            return f"{str(error.filename).removeprefix(f'{tree}/')} is missing"


def missing(name: str) -> StoreDamaged:
    """The error for a store path whose object is not in the store."""
    return StoreDamaged(
        f"/nix/store/{name} is in the store's database but not in the store; "
        f"repair it on the node with `nix-store --verify --check-contents --repair`"
    )


def _flaw_of_each(directory: str, closure_id: str, store: int, kind: _Kind) -> str | None:
    """What is wrong with the first in *directory* that is not what *kind* expects for the object in *store*."""
    with syscalls.owned(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)) as made:
        names = os.listdir(made)
        for name in names:
            if name == LINKS:
                continue
            try:
                original = os.stat(name, dir_fd=store, follow_symlinks=False)
            except FileNotFoundError:
                raise missing(name) from None
            if found := kind.compare(directory, made, original, name):
                return found
    return None if closure_id in names else f"{kind.lost}{closure_id} is missing"


def _flaw_of_entry(entries: str, shown: int, original: os.stat_result, name: str) -> str | None:
    entry = os.stat(name, dir_fd=shown, follow_symlinks=False)
    if stat.S_IFMT(entry.st_mode) != stat.S_IFMT(original.st_mode):
        return f"the entry of {name} is of another type than the store's"
    if not stat.S_ISLNK(entry.st_mode) and _attribute(f"{entries}/{name}", REDIRECT) != f"/{name}".encode():
        return f"the entry of {name} does not lead to the store"
    if stat.S_ISREG(entry.st_mode) and _attribute(f"{entries}/{name}", METACOPY) != b"":
        return f"the entry of {name} hides the store's file"
    return None


def _flaw_of_object(_: str, made: int, original: os.stat_result, name: str) -> str | None:
    found = os.stat(name, dir_fd=made, follow_symlinks=False)
    same = (found.st_mode, found.st_mtime_ns) == (original.st_mode, original.st_mtime_ns)
    return None if same else f"{name} was changed"


def _attribute(path: str, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return None


def _flaw_of_fixed(meta: str) -> str | None:
    for directory in ("", "/nix", "/nix/store", f"/nix/store/{LINKS}"):
        if not _is_as_built(os.lstat(meta + directory)):
            return f"{os.path.basename(meta)}{directory} was changed"
    if changed := _changed_below(f"{meta}/nix/var"):
        return f"{changed.removeprefix(os.path.dirname(meta) + '/')} was changed"
    if os.lstat(f"{meta}/nix/var/nix/db/db.sqlite").st_size == 0:
        return "the database is empty"
    return None


def _changed_below(path: str) -> str | None:
    """The first of *path* and all below it that is not as it was built."""
    if not _is_as_built(os.lstat(path)):
        return path
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if changed := _changed_below(entry.path):
                    return changed
            elif not _is_as_built(entry.stat(follow_symlinks=False)):
                return entry.path
    return None


def _is_as_built(found: os.stat_result) -> bool:
    if found.st_mtime_ns != STAMP:
        return False
    if stat.S_ISDIR(found.st_mode):
        return stat.S_IMODE(found.st_mode) == 0o755
    return stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o644)
