"""May this volume be published here?  The table of the CSI specification, "NodePublishVolume", as pure functions.

What is at a target comes from the kernel's mount table.  What else was asked for is not in that table: the volume id is
in the ledger, and the source is known only for what this process published itself.  Where something is not known it is
not held against the caller.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cknix_csi.api.attributes import FromStorePath
from cknix_csi.api.errors import CknixError, Conflict
from cknix_csi.api.situations import Situation
from cknix_csi.csi.requests import PublishCall
from cknix_csi.volumes.volumes import Publication


def require_same(call: PublishCall, there: Publication, remembered: PublishCall | None, noted: str = "") -> None:
    """Accept *call* when *there*, mounted at its target, is what it asks for; *noted*: as which volume, if known.

    Raises :class:`Conflict` naming what differs.
    An Expression may have a newer result by now: a running pod keeps the closure it started with, so for an Expression
    any closure will do.
    """
    differs = []
    if there.writable != call.writable:
        differs.append(f"it is {_mode(there.writable)}, asked for is {_mode(call.writable)}")
    if isinstance(call.source, FromStorePath) and there.closure_id != call.source.path.basename:
        differs.append(f"it shows {there.closure_id}, asked for is {call.source.path.basename}")
    asked = call.options.presentation
    if asked is not None and asked is not there.presentation:
        differs.append(f"it is presented as {there.presentation.value}, asked for is {asked.value}")
    # A limit that nobody asked for is the node's, and may be another one after a restart of the daemon.
    limit = call.options.limit.whole() if call.options.limit else there.limit
    if limit != there.limit:
        differs.append(f"it may hold {there.limit or 'any amount'}, asked for is {limit}")
    volume_id = noted if remembered is None else remembered.volume_id
    if volume_id and volume_id != call.volume_id:
        differs.append(f"it is volume {volume_id}, asked for is volume {call.volume_id}")
    if remembered is not None and remembered.source != call.source and not isinstance(call.source, FromStorePath):
        differs.append(f"it was published from {remembered.source}, asked for is {call.source}")
    if remembered is not None and remembered.options.limit and not call.options.limit:
        differs.append(f"it was published with a limit of {remembered.options.limit}, asked for is none")
    if differs:
        raise Conflict(
            f"another volume is published at target_path {call.target}: {'; '.join(differs)}; unpublish it first"
        )


def require_only(call: PublishCall, targets: Iterable[Path]) -> None:
    """Refuse *call* when its access mode allows one target and the volume is published at another of *targets*."""
    others = sorted(str(target) for target in targets if target != call.target)
    if call.access_mode.one_target and others:
        raise CknixError(
            f"volume {call.volume_id} is published at {others[0]} already, and access mode {call.access_mode.name} "
            "allows one target on a node; use accessModes ReadWriteOnce or ReadOnlyMany to share it",
            Situation.ALREADY_PUBLISHED,
        )


def _mode(writable: bool) -> str:
    return "writable" if writable else "read-only"
