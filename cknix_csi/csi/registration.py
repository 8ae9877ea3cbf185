"""Registration with kubelet, in our own process (KEP-595, the service that node-driver-registrar would run).

kubelet finds the socket in its plugins_registry directory, asks for the driver's own socket, calls NodeGetInfo there,
and says how it went.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.csi.rpc import Service, rpc
from cknix_csi.kube.backoff import Backoff
from cknix_csi.proto.pluginregistration_grpc import RegistrationBase
from cknix_csi.proto.pluginregistration_pb2 import (
    InfoRequest,
    PluginInfo,
    RegistrationStatus,
    RegistrationStatusResponse,
)
from cknix_csi.repeats import Repeats

log = logging.getLogger(__name__)

# kubelet compares these with its own range of CSI versions, in which 1.x is "1.0.0".
SUPPORTED_VERSIONS = ("1.0.0",)


# Each time kubelet writes the Node and CSINode objects.  As long as the longest pause lasts, a node waits for its
# driver though the API server is back.
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 8.0


class RegistrationRefused(CknixError):
    """kubelet does not take this driver, now or at all."""

    situation = Situation.REGISTRATION_REFUSED


class Registration(Service, RegistrationBase):
    """*endpoint* is the driver's socket as kubelet sees it; *taken* and *refused* are told what kubelet says."""

    def __init__(
        self,
        *,
        driver: str,
        endpoint: Path,
        taken: Callable[[], None] = lambda: None,
        refused: Callable[[str], None] = lambda words: None,
        backoff: Backoff | None = None,
    ) -> None:
        super().__init__()
        self._driver = driver
        self._endpoint = endpoint
        self._taken = taken
        self._refused = refused
        self._backoff = backoff or Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        self._refusals = Repeats()
        self._to_offer = asyncio.Event()

    def offer(self) -> None:
        """Have kubelet ask again, unless it takes the driver by itself before the pause is over."""
        self._to_offer.set()

    async def offering(self, show: Callable[[], Awaitable[None]]) -> NoReturn:
        """After each refusal, and a pause that grows, *show* kubelet the socket again.

        Most refusals end: kubelet refuses every driver while it cannot write to the API server.  It counts a driver
        that it could not register as done and asks no more, until it sees a socket appear at the path (kubelet's
        pluginmanager: its "actual state of the world" has the plugin before the plugin's handler is asked).
        """
        while True:
            await self._to_offer.wait()
            await asyncio.sleep(self._backoff.next())
            if not self._to_offer.is_set():  # kubelet has taken the driver meanwhile
                continue
            self._to_offer.clear()
            try:
                await show()
            except (CknixError, OSError) as error:
                log.debug("the registration socket is not shown again: %s", error)
                self._to_offer.set()

    @rpc
    async def GetInfo(self, request: InfoRequest) -> PluginInfo:
        return PluginInfo(
            type="CSIPlugin",
            name=self._driver,
            endpoint=str(self._endpoint),
            supported_versions=SUPPORTED_VERSIONS,
        )

    @rpc
    async def NotifyRegistrationStatus(self, request: RegistrationStatus) -> RegistrationStatusResponse:
        if request.plugin_registered:
            self._backoff.reset()
            self._to_offer.clear()
            after = self._refusals.over(self._driver)
            ended = f", which had refused it for {after.seconds:.0f}s" if after else ""
            log.info("registered with kubelet%s as %s", ended, self._driver)
            self._taken()
        else:
            reason = request.error or "kubelet gave no reason"
            who = f"the driver {self._driver} at {self._endpoint}"
            self._refuse(RegistrationRefused(f"kubelet refused {who}: {reason}"))
        return RegistrationStatusResponse()

    def _refuse(self, refusal: RegistrationRefused) -> None:
        level = logging.WARNING if self._refusals.failed(self._driver, refusal.message).aloud else logging.DEBUG
        log.log(level, "%s; it will be asked again", refusal.message)
        self._refused(refusal.message)
        self.offer()
