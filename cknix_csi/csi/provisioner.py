"""The Controller service: volumes for claims, made of nothing but a record of what was asked for.

No process keeps anything of a volume in memory, so any number of them may serve, and be killed between any two steps:
whatever is asked again finds the record, or its absence, and goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path

from cknix_csi import logs
from cknix_csi.api.attributes import EXPRESSION, user_attributes
from cknix_csi.api.claims import volume_attributes
from cknix_csi.api.errors import InProgress, Invalid, NotFound, Problem
from cknix_csi.api.quantity import MAXIMUM
from cknix_csi.api.topology import SYSTEM_KEY, fitting, systems_of
from cknix_csi.csi.errors import unimplemented
from cknix_csi.csi.identity import Identity
from cknix_csi.csi.presence import Kept, keep, until
from cknix_csi.csi.provisioning import CreateCall, ValidateCall, capability_problems, volume_of
from cknix_csi.csi.readiness import Readiness, Step
from cknix_csi.csi.rpc import Service, rpc
from cknix_csi.csi.server import Observer, serve
from cknix_csi.kube.api import DeletingApi
from cknix_csi.kube.claims import annotations_of, systems_for
from cknix_csi.kube.volumerecords import MAX_PAGE, VolumeRecord, VolumeRecords, volume_id
from cknix_csi.proto.csi_grpc import ControllerBase
from cknix_csi.proto.csi_pb2 import (
    ControllerExpandVolumeRequest,
    ControllerExpandVolumeResponse,
    ControllerGetCapabilitiesRequest,
    ControllerGetCapabilitiesResponse,
    ControllerGetVolumeRequest,
    ControllerGetVolumeResponse,
    ControllerModifyVolumeRequest,
    ControllerModifyVolumeResponse,
    ControllerPublishVolumeRequest,
    ControllerPublishVolumeResponse,
    ControllerServiceCapability,
    ControllerUnpublishVolumeRequest,
    ControllerUnpublishVolumeResponse,
    CreateSnapshotRequest,
    CreateSnapshotResponse,
    CreateVolumeRequest,
    CreateVolumeResponse,
    DeleteSnapshotRequest,
    DeleteSnapshotResponse,
    DeleteVolumeRequest,
    DeleteVolumeResponse,
    GetCapacityRequest,
    GetCapacityResponse,
    GetSnapshotRequest,
    GetSnapshotResponse,
    ListSnapshotsRequest,
    ListSnapshotsResponse,
    ListVolumesRequest,
    ListVolumesResponse,
    ValidateVolumeCapabilitiesRequest,
    ValidateVolumeCapabilitiesResponse,
)

log = logging.getLogger(__name__)

CAPABILITIES = (
    ControllerServiceCapability.RPC.CREATE_DELETE_VOLUME,
    ControllerServiceCapability.RPC.LIST_VOLUMES,
    ControllerServiceCapability.RPC.GET_CAPACITY,
    ControllerServiceCapability.RPC.GET_VOLUME,
    # Without it external-provisioner refuses claims with ReadWriteOncePod.
    ControllerServiceCapability.RPC.SINGLE_NODE_MULTI_WRITER,
)
_GRACE_SECONDS = 20.0


async def run_provisioner(
    api: DeletingApi,
    *,
    namespace: str,
    endpoint: Path,
    stop: asyncio.Event,
    observe: Observer = lambda *call: None,
    readiness: Readiness | None = None,
) -> None:
    """Serve at *endpoint* until *stop* is set; records are kept in *namespace*.

    *observe* is told of every call, and *readiness* when the socket is there.  Raises :class:`SocketUnavailable`.
    """
    readiness = readiness or Readiness()
    reached, left = partial(readiness.reach, Step.SERVED), partial(readiness.leave, Step.SERVED)
    service = Provisioner(api, namespace)
    async with serve([Identity(), service], endpoint, grace=_GRACE_SECONDS, observe=observe) as socket:
        reached()
        await until(stop, keep([Kept(socket=socket, lost=left, served=reached, found=reached)]))
        left()


class Provisioner(Service, ControllerBase):
    """*namespace* is that of the records."""

    def __init__(self, api: DeletingApi, namespace: str) -> None:
        super().__init__()
        self._api = api
        self._records = VolumeRecords(api, namespace)

    @rpc
    async def CreateVolume(self, request: CreateVolumeRequest) -> CreateVolumeResponse:
        call = CreateCall.parse(request)
        if call.claim is not None:
            logs.note(claim=str(call.claim))
        record = await self._records.get(volume_id(call.name)) or await self._make(call)
        call.require_same(record)
        return CreateVolumeResponse(volume=volume_of(record))

    @rpc
    async def DeleteVolume(self, request: DeleteVolumeRequest) -> DeleteVolumeResponse:
        if await self._records.remove(_id_in(request.volume_id)):
            log.info("deleted volume %s", request.volume_id)
        return DeleteVolumeResponse()

    @rpc
    async def ValidateVolumeCapabilities(
        self, request: ValidateVolumeCapabilitiesRequest
    ) -> ValidateVolumeCapabilitiesResponse:
        call = ValidateCall.parse(request)
        problems = call.problems(await self._known(call.volume_id))
        if problems:
            return ValidateVolumeCapabilitiesResponse(message="; ".join(map(str, problems)))
        return ValidateVolumeCapabilitiesResponse(
            confirmed=ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )

    @rpc
    async def ListVolumes(self, request: ListVolumesRequest) -> ListVolumesResponse:
        if request.max_entries < 0:
            raise Invalid([Problem("max_entries", f"{request.max_entries} is negative")])
        page = await self._records.page(request.max_entries or MAX_PAGE, request.starting_token)
        entries = [ListVolumesResponse.Entry(volume=volume_of(record)) for record in page.records]
        return ListVolumesResponse(entries=entries, next_token=page.more)

    @rpc
    async def ControllerGetVolume(self, request: ControllerGetVolumeRequest) -> ControllerGetVolumeResponse:
        record = await self._known(_id_in(request.volume_id))
        return ControllerGetVolumeResponse(volume=volume_of(record), status=ControllerGetVolumeResponse.VolumeStatus())

    @rpc
    async def GetCapacity(self, request: GetCapacityRequest) -> GetCapacityResponse:
        """Nothing is set aside for a volume: it is all or, where one could not be had at all, nothing."""
        systems = systems_of(user_attributes(request.parameters), ())
        where = request.accessible_topology.segments.get(SYSTEM_KEY)
        elsewhere = where is not None and bool(systems) and where not in systems
        if elsewhere or (request.volume_capabilities and capability_problems(request.volume_capabilities)):
            return GetCapacityResponse(available_capacity=0)
        return GetCapacityResponse(available_capacity=MAXIMUM)

    @rpc
    async def ControllerGetCapabilities(
        self, request: ControllerGetCapabilitiesRequest
    ) -> ControllerGetCapabilitiesResponse:
        kinds = ControllerServiceCapability.RPC
        return ControllerGetCapabilitiesResponse(
            capabilities=[ControllerServiceCapability(rpc=kinds(type=kind)) for kind in CAPABILITIES]
        )

    @rpc
    async def ControllerPublishVolume(self, request: ControllerPublishVolumeRequest) -> ControllerPublishVolumeResponse:
        raise unimplemented("ControllerPublishVolume", "PUBLISH_UNPUBLISH_VOLUME")

    @rpc
    async def ControllerUnpublishVolume(
        self, request: ControllerUnpublishVolumeRequest
    ) -> ControllerUnpublishVolumeResponse:
        raise unimplemented("ControllerUnpublishVolume", "PUBLISH_UNPUBLISH_VOLUME")

    @rpc
    async def ControllerExpandVolume(self, request: ControllerExpandVolumeRequest) -> ControllerExpandVolumeResponse:
        raise unimplemented("ControllerExpandVolume", "EXPAND_VOLUME")

    @rpc
    async def ControllerModifyVolume(self, request: ControllerModifyVolumeRequest) -> ControllerModifyVolumeResponse:
        raise unimplemented("ControllerModifyVolume", "MODIFY_VOLUME")

    @rpc
    async def CreateSnapshot(self, request: CreateSnapshotRequest) -> CreateSnapshotResponse:
        raise unimplemented("CreateSnapshot", "CREATE_DELETE_SNAPSHOT")

    @rpc
    async def DeleteSnapshot(self, request: DeleteSnapshotRequest) -> DeleteSnapshotResponse:
        raise unimplemented("DeleteSnapshot", "CREATE_DELETE_SNAPSHOT")

    @rpc
    async def ListSnapshots(self, request: ListSnapshotsRequest) -> ListSnapshotsResponse:
        raise unimplemented("ListSnapshots", "LIST_SNAPSHOTS")

    @rpc
    async def GetSnapshot(self, request: GetSnapshotRequest) -> GetSnapshotResponse:
        raise unimplemented("GetSnapshot", "GET_SNAPSHOT")

    async def _make(self, call: CreateCall) -> VolumeRecord:
        """The record of a volume that there is not; when somebody else is faster, theirs."""
        claim = call.claim
        annotations = {} if claim is None else await annotations_of(self._api, claim)
        attributes = volume_attributes(call.parameters, annotations, requested=call.required)
        runs_on: tuple[str, ...] = ()
        if claim is not None and EXPRESSION in attributes:
            runs_on = await systems_for(self._api, claim.namespace, attributes[EXPRESSION])
        record = VolumeRecord(
            name=call.name,
            capacity=call.required,
            parameters=call.parameters,
            attributes=attributes,
            systems=fitting(systems_of(attributes, runs_on), call.requisite, call.preferred),
        )
        if await self._records.add(record):
            log.info("made volume %s of %s", record.id, " ".join(f"{key}={text}" for key, text in attributes.items()))
            return record
        made = await self._records.get(record.id)
        if made is None:
            raise InProgress(f"volume {call.name!r} was deleted while it was asked for; ask again")
        return made

    async def _known(self, identity: str) -> VolumeRecord:
        record = await self._records.get(identity)
        if record is None:
            raise NotFound(f"there is no volume {identity!r}")
        return record


def _id_in(identity: str) -> str:
    if not identity:
        raise Invalid([Problem("volume_id", "is missing")])
    return identity
