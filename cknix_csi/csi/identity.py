"""The Identity service: who this driver is."""

from __future__ import annotations

from google.protobuf.wrappers_pb2 import BoolValue

from cknix_csi import __version__
from cknix_csi.csi.rpc import Service, rpc
from cknix_csi.proto.csi_grpc import IdentityBase
from cknix_csi.proto.csi_pb2 import (
    GetPluginCapabilitiesRequest,
    GetPluginCapabilitiesResponse,
    GetPluginInfoRequest,
    GetPluginInfoResponse,
    ProbeRequest,
    ProbeResponse,
)
from cknix_csi.settings import DRIVER_NAME


class Identity(Service, IdentityBase):
    @rpc
    async def GetPluginInfo(self, request: GetPluginInfoRequest) -> GetPluginInfoResponse:
        return GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=__version__)

    @rpc
    async def GetPluginCapabilities(self, request: GetPluginCapabilitiesRequest) -> GetPluginCapabilitiesResponse:
        """None: every process of one version must answer alike, and no process serves a Controller service."""
        return GetPluginCapabilitiesResponse()

    @rpc
    async def Probe(self, request: ProbeRequest) -> ProbeResponse:
        """Ready as soon as it answers: the socket appears only after the node's volumes have been reconciled.

        A cache or API server that is down must not fail this: a restart would not bring it back.
        """
        return ProbeResponse(ready=BoolValue(value=True))
