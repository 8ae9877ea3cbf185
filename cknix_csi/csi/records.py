"""A note of every publish and unpublish, for the ledger.  Volumes do not need it: what fails here is only logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cknix_csi.api.errors import CknixError
from cknix_csi.api.presentation import Presentation
from cknix_csi.csi.requests import PublishCall
from cknix_csi.volumes import target as targets
from cknix_csi.volumes.ledger import Published

log = logging.getLogger(__name__)


class Notes(Protocol):
    """Takes notes without waiting; satisfied by ``volumes.ledger.Ledger``."""

    def record_publish(self, entry: Published) -> None:
        """*entry* is mounted; said of the same volume again it changes nothing."""

    def record_unpublish(self, target: str) -> None:
        """Nothing is mounted at *target* any more; fine when nothing was."""

    def publications(self) -> Sequence[Published]:
        """What is noted as mounted, also by earlier daemons."""


class Records:
    """Notes under the name that the mount table has for a target."""

    def __init__(self, notes: Notes | None) -> None:
        """*notes*: None where nobody wants any."""
        self._notes = notes

    def published(self, call: PublishCall, closure_id: str, presentation: Presentation | None) -> None:
        """What *call* asks for is mounted; *presentation*: None when it is not known."""
        if self._notes is None:
            return
        with _logged(call.target):
            self._notes.record_publish(
                Published(
                    target=targets.resolve(call.target),
                    volume_id=call.volume_id,
                    closure_id=closure_id,
                    writable=call.writable,
                    presentation="" if presentation is None else presentation.value,
                    pod_namespace=call.pod.namespace,
                    pod_name=call.pod.name,
                    pod_uid=call.pod.uid,
                )
            )

    def targets(self, volume_id: str) -> set[Path]:
        """Where the volume is noted as mounted, whoever has mounted it."""
        if self._notes is None:
            return set()
        return {Path(entry.target) for entry in self._notes.publications() if entry.volume_id == volume_id}

    def volume_at(self, target: Path) -> str:
        """The volume that is noted as mounted at *target*, whoever has mounted it; empty when that is not known."""
        name = None if self._notes is None else self.name(target)
        if self._notes is None or name is None:
            return ""
        return next((entry.volume_id for entry in self._notes.publications() if entry.target == name), "")

    def name(self, target: Path) -> str | None:
        """What :meth:`unpublished` is to be told once *target* is gone; None for what can be no target."""
        try:
            return targets.resolve(target)
        except (CknixError, OSError):
            return None

    def unpublished(self, name: str | None) -> None:
        """Nothing is mounted any more at the target of that :meth:`name`."""
        if self._notes is None or name is None:
            return
        with _logged(name):
            self._notes.record_unpublish(name)


@contextmanager
def _logged(target: object) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.exception("what has happened at %s is missing from the ledger", target)
