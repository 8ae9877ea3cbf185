"""The Node service: what kubelet asks of the driver on this node."""

from __future__ import annotations

import logging

from cknix_csi import logs
from cknix_csi.api.progress import humanise
from cknix_csi.api.topology import segments_of
from cknix_csi.csi.errors import unimplemented
from cknix_csi.csi.publisher import Publisher
from cknix_csi.csi.requests import PublishCall, StatsCall, UnpublishCall
from cknix_csi.csi.rpc import Service, rpc
from cknix_csi.csi.stats import Measures, stats_response
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
    Topology,
)
from cknix_csi.repeats import Repeats

log = logging.getLogger(__name__)

CAPABILITIES = (
    NodeServiceCapability.RPC.GET_VOLUME_STATS,
    NodeServiceCapability.RPC.VOLUME_CONDITION,
    # Without it one claim could not be shared by two pods of a node (CSI spec, table of NodePublishVolume).
    NodeServiceCapability.RPC.SINGLE_NODE_MULTI_WRITER,
)


class Node(Service, NodeBase):
    """*node_id* is the Kubernetes node's name; *system* its Nix system."""

    def __init__(self, *, node_id: str, system: str, publisher: Publisher, measures: Measures) -> None:
        super().__init__()
        self._node_id = node_id
        self._system = system
        self._publisher = publisher
        self._measures = measures
        self._unwell = Repeats()

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
        return NodeGetInfoResponse(
            node_id=self._node_id, accessible_topology=Topology(segments=segments_of(self._system))
        )

    @rpc
    async def NodeStageVolume(self, request: NodeStageVolumeRequest) -> NodeStageVolumeResponse:
        raise unimplemented("NodeStageVolume", "STAGE_UNSTAGE_VOLUME")

    @rpc
    async def NodeUnstageVolume(self, request: NodeUnstageVolumeRequest) -> NodeUnstageVolumeResponse:
        raise unimplemented("NodeUnstageVolume", "STAGE_UNSTAGE_VOLUME")

    @rpc
    async def NodeGetVolumeStats(self, request: NodeGetVolumeStatsRequest) -> NodeGetVolumeStatsResponse:
        call = StatsCall.parse(request)
        measured = await self._measures.measure(call.volume_id, call.path)
        self._tell(call, measured.problem)
        return stats_response(measured)

    @rpc
    async def NodeExpandVolume(self, request: NodeExpandVolumeRequest) -> NodeExpandVolumeResponse:
        raise unimplemented("NodeExpandVolume", "EXPAND_VOLUME")

    def _tell(self, call: StatsCall, problem: str | None) -> None:
        """Log what is wrong with a volume, once: kubelet asks every minute, and gets no more than its first words."""
        self._unwell.idle()
        if problem is not None:
            repeated = self._unwell.failed(call, problem, logs.fields())
            log.log(logging.WARNING if repeated.aloud else logging.DEBUG, "the volume is not well: %s", problem)
        elif (ended := self._unwell.over(call)) is not None:
            log.info("the volume is well again after %s", humanise(ended.seconds))
