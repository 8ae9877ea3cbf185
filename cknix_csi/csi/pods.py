"""What a publish wants to know of its pod, and to tell it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from cknix_csi.api.attributes import PodInfo
from cknix_csi.api.errors import CknixError, NotFound

log = logging.getLogger(__name__)

VOLUME_COPIED = "VolumeCopied"
"""Reason of the Event on a pod that got a private copy, and what that cost."""

_PATIENCE_SECONDS = 5.0
"""An API server that takes longer does not answer."""


class Pods(Protocol):
    """The pods of this node; satisfied by ``kube.pods.PodWatch``."""

    async def host_users(self, pod: PodInfo) -> bool:
        """False when *pod* has a user namespace of its own.

        Raises :class:`NotFound` when there is no such pod (any more), :class:`CknixError` when nobody can tell.
        """

    def ending(self, pod: PodInfo) -> bool:
        """True when *pod* is known to be being deleted."""

    def on_ending(self, tell: Callable[[str], None]) -> None:
        """From now on call *tell*, at once, with the uid of each pod that is deleted or gone: once or more."""


class PodEvents(Protocol):
    """Events on pods; satisfied by ``kube.pods.PodEvents``."""

    def post(self, pod: PodInfo, reason: str, message: str) -> None:
        """Tell the reader of ``kubectl describe pod``; returns at once and never fails."""


async def host_users(pods: Pods | None, pod: PodInfo) -> bool:
    """True unless *pod* is known to have a user namespace of its own (``hostUsers: false``).

    A pod of which nobody can tell gets what nearly all pods want, since volumes must not need an API server.  That
    gives nothing away: where it was wrong, the runtime cannot id-map the volume, and the container does not start.
    """
    if pods is None or not pod.name:
        return True
    patience = asyncio.timeout(_PATIENCE_SECONDS)
    try:
        async with patience:
            return await pods.host_users(pod)
    except NotFound:
        return True  # nobody will run in it
    except TimeoutError:
        if not patience.expired():
            raise
        why = f"the API server did not answer within {_PATIENCE_SECONDS:.0f}s"
    except CknixError as error:
        why = error.message
    log.warning("taken for a pod without `hostUsers: false`, since nobody can tell: %s", why)
    return True
