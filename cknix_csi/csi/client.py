"""A CSI client for one inline volume, as kubelet would be: what ``cknix-csi run`` speaks to its own node service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from grpclib.client import Channel
from grpclib.exceptions import GRPCError

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.proto.csi_grpc import NodeStub
from cknix_csi.proto.csi_pb2 import NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability


@asynccontextmanager
async def published(
    endpoint: Path, volume_id: str, target: Path, attributes: Mapping[str, str], *, writable: bool
) -> AsyncIterator[None]:
    """The volume is mounted at *target* inside the block.  Raises :class:`CknixError` with the service's own words."""
    channel = Channel(path=str(endpoint))
    try:
        node = NodeStub(channel)
        capability = VolumeCapability(
            mount=VolumeCapability.MountVolume(),
            access_mode=VolumeCapability.AccessMode(mode=VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
        )
        try:
            await node.NodePublishVolume(
                NodePublishVolumeRequest(
                    volume_id=volume_id,
                    target_path=str(target),
                    volume_capability=capability,
                    readonly=not writable,
                    volume_context=dict(attributes),
                )
            )
            yield
        finally:
            await node.NodeUnpublishVolume(NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(target)))
    except GRPCError as error:
        raise CknixError(error.message or error.status.name, Situation.VOLUME_REFUSED) from None
    finally:
        channel.close()
