"""A progress bar for standard error: one line that is redrawn on a terminal, one line per step elsewhere."""

from __future__ import annotations

import sys
import time

_WIDTH = 30


class Progress:
    """*total* steps, of which the caller names each as it begins."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = -1
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def step(self, what: str) -> None:
        """*what* begins; whatever came before is done."""
        self._done = min(self._done + 1, self._total)
        if self._terminal:
            self.detail(what, 0.0)
        else:
            print(f"[{self._done + 1}/{self._total} {self._elapsed():5.0f} s] {what}", file=sys.stderr, flush=True)

    def detail(self, what: str, share: float) -> None:
        """*share* (0 to 1) of the current step is done."""
        if not self._terminal:
            return
        part = (self._done + share) / self._total
        bar = ("#" * int(_WIDTH * part)).ljust(_WIDTH, ".")
        print(f"\r\033[K[{bar}] {part:4.0%} {self._elapsed():5.0f} s  {what}", end="", file=sys.stderr, flush=True)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def close(self) -> None:
        """Leave the line."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
