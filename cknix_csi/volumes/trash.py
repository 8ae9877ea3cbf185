"""Deletion in the background: renamed out of the way at once, taken apart slowly.

The only recursive deletion of the program.  It works by descriptors, never through a symbolic link and never into
another mount (openat2 with RESOLVE_NO_XDEV), so that nothing outside of what was thrown away can be reached.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
import time
import uuid

from cknix_csi.volumes import syscalls
from cknix_csi.volumes.failures import explained

log = logging.getLogger(__name__)

_BATCH = 256
_PAUSE = 0.005
"""Seconds of rest after each _BATCH entries: a big deletion must not hold up what pods wait for."""
_CLOSE_SECONDS = 3.0
"""Enough for what a few pods leave; a process that is to end has half a minute for everything."""
_DEPTH = 64
"""Deeper directories are first moved to the top: descriptors are few, and a pod may nest without limit."""
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class Trash:
    """The directory *directory* (made when missing), on the same mount as everything that is thrown away."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._task: asyncio.Task[None] | None = None
        self._pending = False
        self._stop = threading.Event()

    def take(self, path: str) -> None:
        """Rename *path* into the trash; the caller knows that no mount uses it.  Raises VolumeFailed."""
        name = f"{self._directory}/{uuid.uuid4().hex}"
        with explained(f"move {path} to {self._directory}"):
            try:
                os.rename(path, name)
            except FileNotFoundError:  # somebody has emptied the trash by taking it away
                os.makedirs(self._directory, 0o700, exist_ok=True)
                os.rename(path, name)
        self._pending = True

    def empty(self) -> None:
        """Delete what was taken, in the background.  Failures are logged; :meth:`retry` or what comes next retries."""
        if self._pending and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(), name="cknix trash")

    def retry(self) -> None:
        """:meth:`empty`, also of what could not be deleted before."""
        self._pending = True
        self.empty()

    async def emptied(self, patience: float) -> None:
        """Wait until what was taken is deleted, at most *patience* seconds."""
        self.empty()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=patience)

    async def close(self, patience: float = _CLOSE_SECONDS) -> None:
        """Give what :meth:`empty` began *patience* seconds, then stop it; what is left waits for the next process."""
        if self._task is None:
            return
        if not (await asyncio.wait({self._task}, timeout=patience))[0]:
            self._stop.set()
            await self._task
            self._stop.clear()

    async def _run(self) -> None:
        while self._pending and not self._stop.is_set():
            self._pending = False
            await asyncio.to_thread(self._delete_all)
        self._pending = self._stop.is_set()

    def _delete_all(self) -> None:
        try:
            with os.scandir(self._directory) as entries:
                found = [entry.path for entry in entries]
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("cannot empty %s: %s", self._directory, error)
            return
        for path in found:
            try:
                delete_tree(path, self._stop)
            except _Stopped:
                log.info("deleting what is in %s has stopped, and goes on at the next start", self._directory)
                return
            except OSError as error:
                log.warning("cannot delete %s: %s", path, error)


def delete_tree(path: str, stop: threading.Event | None = None) -> None:
    """Delete *path* and all below it; raises :class:`OSError`, EXDEV where a mount stands in the way.

    Raises :class:`_Stopped` between two entries when *stop* is set.
    """
    with syscalls.owned(os.open(os.path.dirname(path), _FLAGS)) as parent:
        _Deletion(parent, stop or threading.Event()).remove(os.path.basename(path))


class _Stopped(Exception):
    """Somebody wants the deletion to end before it is done."""


class _Deletion:
    """One deletion; *top* is the descriptor of the directory it happens in, and too deep directories are moved to."""

    def __init__(self, top: int, stop: threading.Event) -> None:
        self._top = top
        self._stop = stop
        self._moved: list[str] = []
        self._removed = 0

    def remove(self, name: str) -> None:
        self._one(self._top, name, is_directory=_is_directory(self._top, name), depth=0)
        while self._moved:
            self._one(self._top, self._moved.pop(), is_directory=True, depth=0)

    def _one(self, parent: int, name: str, *, is_directory: bool, depth: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        if not is_directory:
            os.unlink(name, dir_fd=parent)
        elif depth > _DEPTH:
            self._moved.append(uuid.uuid4().hex)
            os.rename(name, self._moved[-1], src_dir_fd=parent, dst_dir_fd=self._top)
        else:
            with syscalls.owned(syscalls.openat2(parent, name, _FLAGS, syscalls.RESOLVE_NO_XDEV)) as directory:
                with os.scandir(directory) as entries:
                    children = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
                for child, child_is_directory in children:
                    self._one(directory, child, is_directory=child_is_directory, depth=depth + 1)
            os.rmdir(name, dir_fd=parent)
        self._removed += 1
        if self._removed % _BATCH == 0:
            time.sleep(_PAUSE)


def _is_directory(parent: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
