"""What ``cknix-csi run`` tells on stderr while it works."""

from __future__ import annotations

import shutil
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
        if not self._quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """A line that stays, also when only errors are wanted."""
        self.clear()
        print(f"cknix: {text}", file=sys.stderr, flush=True)

    def progress(self, progress: Progress) -> None:
        """Where a build is now; called as often as it changes."""
        now = time.monotonic()
        if self._quiet or not progress.building or (not self._terminal and now - self._shown < _EVERY_SECONDS):
            return
        self._shown = now
        line = f"cknix: building {progress}"
        if self._terminal:
            self.clear()
            # What does not fit would go to a second line, which is not cleared.
            print(line[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take away the line that is rewritten; whoever else writes to stderr calls it before."""
        if self._open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = False
