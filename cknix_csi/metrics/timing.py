"""How long a block of code takes, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cknix_csi.metrics.ports import OK, outcome_of


@contextmanager
def timed(tell: Callable[[str, float], None]) -> Iterator[None]:
    """*tell* how the block has ended, and its seconds."""
    started = time.monotonic()
    outcome = OK
    try:
        yield
    except BaseException as error:
        outcome = outcome_of(error)
        raise
    finally:
        tell(outcome, time.monotonic() - started)
