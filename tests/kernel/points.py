"""Fault points: every call by which an operation changes something, counted as the interpreter and the code make it.

They are enumerated from what runs, not from a list kept by hand: Python's audit events tell of every file operation in
any thread, whoever makes it, and of the calls that have no events (``cknix_csi.volumes.syscalls``) all that is there is
wrapped.  An operation runs in a child of this process, in which anything may be done at any of its points.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cknix_csi.api.errors import CknixError
from cknix_csi.volumes import syscalls

_CHANGES = frozenset(
    {
        *(
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.chmod",
            "os.chown",
            "os.utime",
        ),
        *("os.setxattr", "os.truncate", "fcntl.ioctl", "subprocess.Popen"),
    }
)
"""Audit events of calls that change something, as the table in Python's documentation names them."""
_DELETIONS = frozenset({"os.remove", "os.rmdir"})
_LOOKS = frozenset({"statx_attributes", "statx_mount_id", "openat2", "owned"})
"""Functions of ``syscalls`` that change nothing."""

Operation = Callable[[], Coroutine[Any, Any, object]]


@dataclass(frozen=True)
class Outcome:
    """How an operation ended that was met by a fault."""

    points: int
    """How many it came to."""
    error: str = ""
    """The type of what it raised; empty when it succeeded."""
    code: str = ""
    transient: bool = False
    message: str = ""

    @property
    def in_words(self) -> bool:
        """True when what it raised is an error of ours, for the reader of an Event."""
        return bool(self.code)


class _Points:
    """Counts the points of this process, and does something at one."""

    def __init__(self, at: int, do: Callable[[], object]) -> None:
        self.count = 0
        self._at = at
        self._do = do
        self._lock = threading.Lock()
        self._busy = threading.local()

    def arm(self) -> None:
        sys.addaudithook(self._hook)
        for name, function in inspect.getmembers(syscalls, inspect.isfunction):
            if not name.startswith("_") and name not in _LOOKS:
                setattr(syscalls, name, self._announced(function))

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _DELETIONS and arguments[1] != -1:
            return  # by descriptor: the trash is emptied, where each deletion is as good a moment as any other
        if event in _CHANGES or (event == "open" and _writes(arguments)):
            self._point()

    def _announced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._point()
            return function(*arguments, **keywords)

        return call

    def _point(self) -> None:
        if getattr(self._busy, "is_set", False):  # what is done at a point has no points of its own
            return
        with self._lock:
            self.count += 1
            due = self.count == self._at
        if due:
            self._busy.is_set = True
            try:
                self._do()
            finally:
                self._busy.is_set = False


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = (*arguments, None, None, None)[:3]
    if isinstance(flags, int):
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return bool(set(str(mode)) & set("wxa+"))


def killed_at(point: int, operation: Operation) -> bool:
    """Run *operation* in a child that is killed (SIGKILL) just before its *point*; False when it ended before that."""
    return _child(operation, point, lambda: os.kill(os.getpid(), signal.SIGKILL)) is None


def struck_at(point: int, fault: Callable[[], object], operation: Operation) -> Outcome:
    """Run *operation* in a child in which *fault* is done just before its *point* (from 1)."""
    outcome = _child(operation, point, fault)
    assert outcome is not None
    return outcome


def points_of(operation: Operation) -> int:
    """How many points *operation* has when all goes well."""
    outcome = struck_at(0, lambda: None, operation)
    assert not outcome.error, outcome
    return outcome.points


def every_point(operation: Operation) -> Iterator[tuple[int, bool]]:
    """Run *operation* again and again, killed at its first, second ... point; at last not.  (Point, whether killed)."""
    point, killed = 0, True
    while killed:
        point += 1
        killed = killed_at(point, operation)
        yield point, killed


def _child(operation: Operation, point: int, do: Callable[[], object]) -> Outcome | None:
    """None when it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):
            os.close(reading)
            points = _Points(point, do)
            points.arm()
            outcome = asyncio.run(_tried(operation))
            parts = (str(points.count), *outcome)
            os.write(writing, "\0".join(parts).encode(errors="surrogateescape")[:60_000])
            status = 0
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGKILL:
        return None
    assert status == 0, "the child broke outside of its operation"
    count, error, code, transient, message = said.decode(errors="surrogateescape").split("\0")
    return Outcome(int(count), error, code, bool(transient), message)


async def _tried(operation: Operation) -> tuple[str, str, str, str]:
    try:
        await operation()
    except CknixError as error:
        return type(error).__name__, error.code.name, "yes" if error.code.transient else "", str(error)
    except Exception as error:
        return type(error).__name__, "", "", repr(error)
    return "", "", "", ""
