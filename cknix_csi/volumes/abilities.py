"""What this node can do, found out once per process, and the choices that follow from it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from cknix_csi.volumes.choose import Choice, Wish, choose, prospects
from cknix_csi.volumes.mounts import Mounts
from cknix_csi.volumes.probe import TITLES, Finding, ProbeResult

log = logging.getLogger(__name__)

Prober = Callable[[Path, Path, Mounts], ProbeResult]
"""Tries what works: :func:`.probe.probe`, or what a test knows already."""


class Abilities:
    """Of the node whose store objects are in *store_dir*, tried in the directory *scratch* of its data root."""

    def __init__(self, scratch: Path, store_dir: Path, mounts: Mounts, prober: Prober) -> None:
        self._scratch = scratch
        self._store_dir = store_dir
        self._mounts = mounts
        self._prober = prober
        self._found: ProbeResult | None = None
        self._one_at_a_time = threading.Lock()

    def found(self) -> ProbeResult:
        """What works on this node; tried at the first call, in some 50 ms, and logged.

        Call it in a worker thread.  Raises what the prober raises, and tries again at the next call.
        """
        with self._one_at_a_time:
            if self._found is None:
                self._found = self._prober(self._scratch, self._store_dir, self._mounts)
                _tell(self._found)
            return self._found

    def choose(self, wish: Wish) -> Choice:
        """How to make a volume.  Raises PresentationUnavailable, and what :meth:`found` raises."""
        return choose(self.found(), wish)


def _tell(found: ProbeResult) -> None:
    for name, title in TITLES.items():
        finding: Finding = getattr(found, name)
        if not finding.ok:
            log.info("this node: %s: no (%s)", title, finding.detail)
    for prospect in prospects(found):
        if prospect.choice is not None:
            made = prospect.choice.presentation.value
            log.info("this node: volumes that are %s: %s (%s)", prospect.kind, made, prospect.reason)
        elif prospect.ordinary:
            log.warning("this node: %s", prospect.reason)
