"""Places of unix sockets in the file system: whole as soon as they can be seen, taken from nobody, and had again."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation

log = logging.getLogger(__name__)

# sockaddr_un.sun_path holds 108 bytes with the closing NUL (unix(7)).
_MAX_SOCKET_PATH = 107
_LOCK_TRIES = 200
_LOCK_POLL_SECONDS = 0.05


class SocketUnavailable(CknixError):
    """The socket's place cannot be had: somebody lives there, or it is no place for a socket."""

    situation = Situation.SOCKET_UNAVAILABLE


class Place:
    """A path, and this process's socket there.  Raises :class:`SocketUnavailable` when no socket can have the path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # kubelet's plugin watcher ignores names that begin with a dot.
        self._aside = path.with_name(f".{path.name}")
        self._ours: tuple[int, int] | None = None
        excess = len(os.fsencode(self._aside)) - _MAX_SOCKET_PATH
        if excess > 0:
            raise SocketUnavailable(
                f"socket path {path} is {excess} bytes too long for a unix socket; choose a shorter one"
            )

    @property
    def held(self) -> bool:
        """Whether the socket at the path is the one that was put there last.

        Nobody else's can have its inode: a socket keeps it as long as it listens.
        """
        try:
            return _identity(self.path) == self._ours
        except OSError:
            return False

    async def take(self, accept: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Listen under another name in the same directory, then rename, and have *accept* accept connections.

        Raises :class:`SocketUnavailable` when somebody lives at the path, and OSError.
        """
        async with _locked(self.path.parent):
            _refuse_live(self.path)
            self._aside.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                listener.bind(str(self._aside))
                self._aside.chmod(0o600)
                listener.listen()
                ours = _identity(self._aside)
                self._aside.rename(self.path)
                await accept(listener)
                self._ours = ours
            except BaseException:
                listener.close()
                self._aside.unlink(missing_ok=True)
                raise

    async def show_again(self) -> None:
        """Take the socket away and put it back at once, if it is there: who watches the directory sees it appear.

        Raises :class:`SocketUnavailable` and OSError.
        """
        async with _locked(self.path.parent):
            if self.held:
                self.path.rename(self._aside)
                self._aside.rename(self.path)

    async def leave(self) -> None:
        """Remove the socket, unless another process has put its own there."""
        try:
            async with _locked(self.path.parent):
                if self.held:
                    self.path.unlink()
                else:
                    log.info("socket %s was gone already", self.path)
        except SocketUnavailable:
            log.info("socket %s was gone already", self.path)


def _refuse_live(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketUnavailable(f"{path} exists and is not a socket; remove it or set CSI_ENDPOINT to another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        outcome = probe.connect_ex(str(path))
    if outcome == errno.ECONNREFUSED:
        log.info("socket %s was left by a process that is gone; replacing it", path)
    elif outcome != errno.ENOENT:
        raise SocketUnavailable(
            f"another process serves at {path}; stop it first (two node daemons cannot share a node)"
        )


@asynccontextmanager
async def _locked(directory: Path) -> AsyncIterator[None]:
    """Hold *directory* against other daemons that look whether a socket in it is alive."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SocketUnavailable(f"directory {directory} for a socket: {error.strerror}; create it") from error
    try:
        await _lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


async def _lock(descriptor: int, directory: Path) -> None:
    for _ in range(_LOCK_TRIES):
        if _try_lock(descriptor):
            return
        await asyncio.sleep(_LOCK_POLL_SECONDS)
    raise SocketUnavailable(
        f"directory {directory} has been locked by another process for {_LOCK_TRIES * _LOCK_POLL_SECONDS:.0f}s"
    )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
