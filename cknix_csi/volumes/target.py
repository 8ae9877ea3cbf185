"""The directory kubelet wants a volume at: the only thing of ours outside the data root, and made with suspicion."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from cknix_csi.volumes.failures import TargetUnusable, explained

_MODE = 0o750


def resolve(target: Path) -> str:
    """*target* as the mount table names it: symbolic links of its parent are resolved, its last part is taken as it is.

    Raises :class:`TargetUnusable` for a path without a usable last part.
    """
    if not target.is_absolute() or target.name in {"", ".."}:
        raise TargetUnusable(f"target path {str(target)!r} must be absolute and end in a directory name")
    return os.path.join(os.path.realpath(target.parent), target.name)


def check(path: str) -> None:
    """Raise :class:`TargetUnusable` unless *path* is an empty directory, or free to be made one; or VolumeFailed."""
    with explained(f"look at target path {path!r}"):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            parent = os.path.dirname(path)
            if not os.path.isdir(parent):
                raise TargetUnusable(
                    f"the directory {parent} of target path {path!r} does not exist; kubelet makes it before it calls"
                ) from None
            return
        except NotADirectoryError:
            raise TargetUnusable(f"a parent of target path {path!r} is not a directory") from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise TargetUnusable(f"target path {path[:64]!r}… is too long, or a name in it") from None
        if not stat.S_ISDIR(found.st_mode):
            raise TargetUnusable(f"target path {path!r} is {_kind(found)}, not a directory; remove it")
        with os.scandir(path) as entries:
            if (entry := next(entries, None)) is not None:
                raise TargetUnusable(
                    f"target path {path!r} is not empty: it holds {entry.name!r}, which is not this driver's; remove it"
                )


def create(path: str) -> bool:
    """Make the directory unless it is there; True when it was made.  Raises like :func:`check`."""
    check(path)
    if os.path.lexists(path):
        return False
    with explained(f"make the target directory {path}"):
        os.mkdir(path, _MODE)
    return True


def remove(path: str) -> None:
    """Remove the directory, which must be empty; nothing there is fine.  Never recursive.

    Raises TargetUnusable for what is no empty directory, VolumeFailed.
    """
    with explained(f"remove target path {path!r}"):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            try:
                kind = _kind(os.lstat(path))
            except NotADirectoryError:  # it is a parent that is a file
                return
            raise TargetUnusable(
                f"target path {path!r} is {kind}, not a directory; this driver did not make it"
            ) from None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # nothing can be there
                return
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            raise TargetUnusable(
                f"cannot remove target path {path!r}: {error.strerror}; "
                f"what is in it is not this driver's and is never deleted by it"
            ) from error


def _kind(found: os.stat_result) -> str:
    return "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a file"
