"""Signals that end a run: each finds it where it can be obeyed without leaving anything behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from cknix_csi.volumes.syscalls import owned

_ENDING = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
_FROM_TERMINALS = {signal.SIGINT, signal.SIGQUIT}


def ending() -> tuple[signal.Signals, ...]:
    """Those that a run obeys: not what the caller had it ignore, as nohup does."""
    return tuple(number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """They wait until the end of the block, except within :func:`delivered`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def delivered() -> Iterator[None]:
    """They arrive in the block: their handlers are in place."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignored() -> None:
    """From now on they are nothing to this process, nor are those that wait: it ends by one of them already."""
    for number in ending():
        signal.signal(number, signal.SIG_IGN)


def let_through() -> None:
    """From now on they arrive, in this process and in what it becomes."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def command_has_it(number: signal.Signals) -> bool:
    """True when *number* came from the terminal, which has sent it to the command as well."""
    if number not in _FROM_TERMINALS:
        return False
    try:
        with owned(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)) as terminal:
            return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
