"""Processes that a command leaves behind when it ends; they would lose the files below ``/nix`` under their feet."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)

_libc = ctypes.CDLL(None, use_errno=True)


def adopt() -> None:
    """From now on this process is the parent of every descendant whose own parent has ended.  Raises OSError."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl")


def end() -> None:
    """Kill all descendants, as the end of a container does, and wait for them."""
    with suppress(ChildProcessError):
        while True:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises when there are none
            for child in _children():
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            # One at a time: with each, its own children become ours.
            os.waitpid(-1, 0)


def _children() -> Iterator[int]:
    parent = str(os.getpid())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # "pid (name) state parent …": the name may hold anything (proc(5)).
                if (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1] == parent:
                    yield int(entry.name)
