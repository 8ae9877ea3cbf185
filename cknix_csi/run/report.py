"""What ``cknix-csi run`` tells on stderr while it works."""

from __future__ import annotations

import sys
import time

from cknix_csi.api.progress import Progress

_EVERY_SECONDS = 2.0


class Reporter:
    """Progress on one line that is rewritten in a terminal, and now and then a line elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0
        self._open = False

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        self._clear()
        print(f"cknix: {text}", file=sys.stderr, flush=True)

    def progress(self, progress: Progress) -> None:
        """Where a build is now; called as often as it changes."""
        now = time.monotonic()
        if self._quiet or not progress.building or (not self._terminal and now - self._shown < _EVERY_SECONDS):
            return
        self._shown = now
        if self._terminal:
            self._clear()
            print(f"cknix: building {progress}"[:120], end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            print(f"cknix: building {progress}", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._open:
            print("\r\x1b[K", end="", file=sys.stderr)
            self._open = False
