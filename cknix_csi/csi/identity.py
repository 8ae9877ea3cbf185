"""The Identity service: who this driver is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from google.protobuf.wrappers_pb2 import BoolValue

from cknix_csi import __version__
from cknix_csi.csi.rpc import Service, rpc
from cknix_csi.proto.csi_grpc import IdentityBase
from cknix_csi.proto.csi_pb2 import (
    GetPluginCapabilitiesRequest,
    GetPluginCapabilitiesResponse,
    GetPluginInfoRequest,
    GetPluginInfoResponse,
    PluginCapability,
    ProbeRequest,
    ProbeResponse,
)
from cknix_csi.settings import DRIVER_NAME

CAPABILITIES = (
    PluginCapability.Service.CONTROLLER_SERVICE,
    PluginCapability.Service.VOLUME_ACCESSIBILITY_CONSTRAINTS,
)


async def _well() -> None:
    """Nothing is wrong."""


class Identity(Service, IdentityBase):
    """*check* raises what :meth:`Probe` answers; it takes less than a second."""

    def __init__(self, check: Callable[[], Awaitable[None]] = _well) -> None:
        super().__init__()
        self._check = check

    @rpc
    async def GetPluginInfo(self, request: GetPluginInfoRequest) -> GetPluginInfoResponse:
        return GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=__version__)

    @rpc
    async def GetPluginCapabilities(self, request: GetPluginCapabilitiesRequest) -> GetPluginCapabilitiesResponse:
        """What the driver offers as a whole: every process of one version must answer alike, whatever it serves."""
        kinds = PluginCapability.Service
        return GetPluginCapabilitiesResponse(
            capabilities=[PluginCapability(service=kinds(type=kind)) for kind in CAPABILITIES]
        )

    @rpc
    async def Probe(self, request: ProbeRequest) -> ProbeResponse:
        """Ready as soon as it answers: the socket appears only after the node's volumes have been reconciled.

        Unhealthy is only what breaks the node or what a restart mends.  A cache or API server that is down is neither.
        """
        await self._check()
        return ProbeResponse(ready=BoolValue(value=True))
