"""Waiting for a state, with a limit, and with everything there is to see when the limit is reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from .command import CommandFailed

T = TypeVar("T")
INTERVAL = 0.25


class WaitTimeout(AssertionError):
    """What was waited for did not come."""


def wait(description: str, predicate: Callable[[], T], *, timeout: float, seen: Callable[[], str]) -> T:
    """The first true value of *predicate*.  A command that fails in it is a "not yet"; *seen* describes a failure."""
    deadline = time.monotonic() + timeout
    refusal = ""
    while True:
        try:
            if value := predicate():
                return value
            refusal = ""
        except CommandFailed as failed:
            refusal = f"\nlast attempt: {failed}"
        if time.monotonic() > deadline:
            raise WaitTimeout(f"not within {timeout:g} s: {description}{refusal}\n{seen()}")
        time.sleep(INTERVAL)
