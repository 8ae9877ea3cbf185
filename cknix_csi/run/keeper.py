"""The keeper: a process between a run and its command that ends the command with the run, however the run ends.

It is forked from the run before that has threads, starts the command when it is told to, and passes signals on.  The
end of the run, by SIGKILL as well, closes their socket; then the keeper kills all that the command has started, so that
the volume's mounts go and the next run can clear up.

A parent-death signal alone would reach the command and not what it has started, such as the jobs of a shell.  A PID
namespace would reach all of it, but the command is to see the machine as it is: in one, a shell started from a terminal
does not know the number of the terminal's process group and cannot give it back, ``$$`` is not what ``ps`` outside
shows, and ``/proc`` would have to be another one.  The command does have the parent-death signal as well, for the case
that run and keeper are killed at once.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cknix_csi.run import orphans, signals

EXIT_SIGNALLED = 128

_PR_SET_PDEATHSIG = 1  # prctl(2)
_START = b"\0"
_STATUS = struct.Struct("i")

# Below the run's own mount namespace, so that the run's own programs may come from /nix; the FIFO tells the moment
# before the command takes over.
_ENTER = 'mount --bind "$1" /nix && printf . > "$2" && shift 2 && exec "$@"'

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Command:
    """What the keeper will start: *argv* with *volume* at ``/nix``."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    volume: Path
    fifo: Path
    """Gets one byte at the moment the command takes over."""
    lock: int
    """A descriptor that the command inherits."""


class Keeper:
    """The run's end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._end.setblocking(False)

    def start(self) -> None:
        """Start the command."""
        self._end.send(_START)

    def signal(self, number: signal.Signals) -> None:
        """Send *number* to the command, if it has not ended."""
        with suppress(OSError):  # a keeper that has ended has ended it as well
            self._end.send(bytes([number]))

    async def ended(self) -> int:
        """Wait until the command and all it has started have ended; its exit code, as a shell would tell it."""
        message = b""
        with suppress(ConnectionError):
            message = await asyncio.get_running_loop().sock_recv(self._end, _STATUS.size)
        if not message:  # somebody has killed the keeper
            await asyncio.to_thread(orphans.end)
            return EXIT_SIGNALLED + signal.SIGKILL
        code: int = _STATUS.unpack(message)[0]
        return code if code >= 0 else EXIT_SIGNALLED - code


@contextmanager
def kept(command: Command) -> Iterator[Keeper]:
    """A keeper for *command*; at the end of the block all that it has started has ended.

    To be entered while there is one thread and :func:`signals.held`.  Raises OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        ours.close()
        _keep(theirs, command)
    theirs.close()
    try:
        yield Keeper(ours)
    finally:
        ours.close()
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        orphans.end()


def _keep(end: socket.socket, command: Command) -> NoReturn:
    """The keeper's whole life."""
    code = 0
    try:
        orphans.adopt()
        status = _serve(end, command)
        orphans.end()
        if status is not None:
            end.send(_STATUS.pack(status))
    except BrokenPipeError:  # the run ended at the same moment
        pass
    except BaseException as error:
        print(f"cknix: the command's keeper failed: {error!r}", file=sys.stderr, flush=True)
        with suppress(BaseException):
            orphans.end()
        code = 1
    finally:
        os._exit(code)


def _serve(end: socket.socket, command: Command) -> int | None:
    """Do as the run says until the command has ended; its status, or None when the run has ended first."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(end, select.POLLIN)
    poll.register(woken, select.POLLIN)
    child = None
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == woken:
                with suppress(BlockingIOError):
                    os.read(woken, 4096)
                for pid, status in _ended():
                    if pid == child:
                        return status
                continue
            message = end.recv(1)
            if not message:
                return None
            if message == _START:
                child = _start(command)
            elif child is not None:
                os.kill(child, message[0])  # not reaped yet, so the number is still its own


def _ended() -> Iterator[tuple[int, int]]:
    """Children that have ended, and what the command has left and nobody else would wait for."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def _start(command: Command) -> int:
    keeper = os.getpid()
    if pid := os.fork():
        return pid
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))
        if os.getppid() == keeper:  # else it ended before it could be the one whose death counts
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # the last two Python itself ignores
                signal.signal(number, signal.SIG_DFL)
            os.set_inheritable(command.lock, True)
            enter = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, "cknix")
            words = [*enter, str(command.volume), str(command.fifo), *command.argv]
            signals.let_through()
            os.execvpe(words[0], words, dict(command.environment))  # noqa: S606 - exactly these words
    except BaseException as error:
        print(f"cknix: the command cannot be started: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(126)
