"""The Node service: what kubelet asks of the driver on this node."""

from __future__ import annotations

from cknix_csi.csi.errors import unimplemented
from cknix_csi.csi.publisher import Publisher
from cknix_csi.csi.requests import PublishCall, UnpublishCall
from cknix_csi.csi.rpc import rpc
from cknix_csi.proto.csi_grpc import NodeBase
from cknix_csi.proto.csi_pb2 import (
    NodeExpandVolumeRequest,
    NodeExpandVolumeResponse,
    NodeGetCapabilitiesRequest,
    NodeGetCapabilitiesResponse,
    NodeGetInfoRequest,
    NodeGetInfoResponse,
    NodeGetVolumeStatsRequest,
    NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest,
    NodePublishVolumeResponse,
    NodeServiceCapability,
    NodeStageVolumeRequest,
    NodeStageVolumeResponse,
    NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse,
    NodeUnstageVolumeRequest,
    NodeUnstageVolumeResponse,
)

# Without it one claim could not be shared by two pods of a node (CSI spec, table of NodePublishVolume).
CAPABILITIES = (NodeServiceCapability.RPC.SINGLE_NODE_MULTI_WRITER,)


class Node(NodeBase):
    """*node_id* is the Kubernetes node's name; *system* its Nix system."""

    def __init__(self, *, node_id: str, system: str, publisher: Publisher) -> None:
        self._node_id = node_id
        self._system = system
        self._publisher = publisher

    @rpc
    async def NodePublishVolume(self, request: NodePublishVolumeRequest) -> NodePublishVolumeResponse:
        await self._publisher.publish(PublishCall.parse(request, system=self._system))
        return NodePublishVolumeResponse()

    @rpc
    async def NodeUnpublishVolume(self, request: NodeUnpublishVolumeRequest) -> NodeUnpublishVolumeResponse:
        await self._publisher.unpublish(UnpublishCall.parse(request))
        return NodeUnpublishVolumeResponse()

    @rpc
    async def NodeGetCapabilities(self, request: NodeGetCapabilitiesRequest) -> NodeGetCapabilitiesResponse:
        return NodeGetCapabilitiesResponse(
            capabilities=[NodeServiceCapability(rpc=NodeServiceCapability.RPC(type=kind)) for kind in CAPABILITIES]
        )

    @rpc
    async def NodeGetInfo(self, request: NodeGetInfoRequest) -> NodeGetInfoResponse:
        return NodeGetInfoResponse(node_id=self._node_id)

    @rpc
    async def NodeStageVolume(self, request: NodeStageVolumeRequest) -> NodeStageVolumeResponse:
        raise unimplemented("NodeStageVolume", "STAGE_UNSTAGE_VOLUME")

    @rpc
    async def NodeUnstageVolume(self, request: NodeUnstageVolumeRequest) -> NodeUnstageVolumeResponse:
        raise unimplemented("NodeUnstageVolume", "STAGE_UNSTAGE_VOLUME")

    @rpc
    async def NodeGetVolumeStats(self, request: NodeGetVolumeStatsRequest) -> NodeGetVolumeStatsResponse:
        raise unimplemented("NodeGetVolumeStats", "GET_VOLUME_STATS")

    @rpc
    async def NodeExpandVolume(self, request: NodeExpandVolumeRequest) -> NodeExpandVolumeResponse:
        raise unimplemented("NodeExpandVolume", "EXPAND_VOLUME")
