"""Registration with kubelet, in our own process (KEP-595, the service that node-driver-registrar would run).

kubelet finds the socket in its plugins_registry directory, asks for the driver's own socket, calls NodeGetInfo there,
and says how it went.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.csi.rpc import Service, rpc
from cknix_csi.proto.pluginregistration_grpc import RegistrationBase
from cknix_csi.proto.pluginregistration_pb2 import (
    InfoRequest,
    PluginInfo,
    RegistrationStatus,
    RegistrationStatusResponse,
)

log = logging.getLogger(__name__)

# kubelet compares these with its own range of CSI versions, in which 1.x is "1.0.0".
SUPPORTED_VERSIONS = ("1.0.0",)


class RegistrationRefused(CknixError):
    """kubelet does not take this driver; only a restart of the daemon makes it ask again."""

    situation = Situation.REGISTRATION_REFUSED


class Registration(Service, RegistrationBase):
    """*endpoint* is the driver's socket as kubelet sees it; *registered* is told when kubelet has taken the driver."""

    def __init__(self, *, driver: str, endpoint: Path, registered: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._registered = registered
        self._driver = driver
        self._endpoint = endpoint
        self._refusal: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def refused(self) -> NoReturn:
        """Wait until kubelet refuses the driver, and raise :class:`RegistrationRefused`."""
        reason = await asyncio.shield(self._refusal)
        raise RegistrationRefused(f"kubelet refused the driver {self._driver} at {self._endpoint}: {reason}")

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
            log.info("registered with kubelet as %s", self._driver)
            self._registered()
        elif not self._refusal.done():
            self._refusal.set_result(request.error or "kubelet gave no reason")
        return RegistrationStatusResponse()
