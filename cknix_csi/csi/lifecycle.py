"""What callers are told while the daemon stops."""

from __future__ import annotations

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation


def shutting_down(work: str) -> CknixError:
    """kubelet keeps the volume as "uncertain" and retries with the next daemon."""
    return CknixError(
        f"{work} was interrupted: the node daemon is shutting down; kubelet will retry",
        Situation.SHUTTING_DOWN,
    )
