"""Requests of the Controller service as values, and the volumes it answers with.

Rules: CSI specification, "CreateVolume", "ValidateVolumeCapabilities" and "Error Scheme".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cknix_csi.api.attributes import user_attributes
from cknix_csi.api.claims import Claim
from cknix_csi.api.errors import CknixError, Conflict, Invalid, Problem
from cknix_csi.api.quantity import format_quantity
from cknix_csi.api.topology import Segments, fitting, segments_of
from cknix_csi.csi.requests import parse_capability
from cknix_csi.kube.volumerecords import VolumeRecord
from cknix_csi.proto.csi_pb2 import (
    CapacityRange,
    CreateVolumeRequest,
    Topology,
    ValidateVolumeCapabilitiesRequest,
    Volume,
    VolumeCapability,
)

MAX_NAME = 128
"""Bytes (CSI spec, "Size Limits")."""


@dataclass(frozen=True, slots=True)
class CreateCall:
    """A CreateVolume that this driver can serve, but for what its parameters say.  Secrets have no meaning here."""

    name: str
    required: int
    """Bytes; 0: any size will do."""
    limit: int
    """Bytes; 0: none."""
    parameters: Mapping[str, str]
    requisite: Sequence[Segments]
    preferred: Sequence[Segments]

    @classmethod
    def parse(cls, request: CreateVolumeRequest) -> CreateCall:
        """Raises :class:`Invalid` with every problem."""
        problems: list[Problem] = []
        size = len(request.name.encode())
        if not request.name:
            problems.append(Problem("name", "is missing"))
        elif size > MAX_NAME:
            problems.append(Problem("name", f"is {size} bytes long; the limit is {MAX_NAME}"))
        problems += capability_problems(request.volume_capabilities)
        problems += _capacity_problems(request.capacity_range)
        if request.HasField("volume_content_source"):
            problems.append(
                Problem(
                    "volume_content_source",
                    "is not supported: a volume shows what its Expression says; remove dataSource from the claim",
                )
            )
        if request.mutable_parameters:
            remedy = "is not supported: parameters do not change; remove volumeAttributesClassName from the claim"
            problems.append(Problem("mutable_parameters", remedy))
        if problems:
            raise Invalid(problems)
        return cls(
            name=request.name,
            required=request.capacity_range.required_bytes,
            limit=request.capacity_range.limit_bytes,
            parameters=dict(request.parameters),
            requisite=_segments(request.accessibility_requirements.requisite),
            preferred=_segments(request.accessibility_requirements.preferred),
        )

    @property
    def claim(self) -> Claim | None:
        return Claim.parse(self.parameters)

    def require_same(self, made: VolumeRecord) -> None:
        """Raises :class:`Conflict` when *made*, which has this call's id, is not what it asks for.

        What the claim's annotation says is not compared: it was read when the volume was made.
        """
        differences = []
        if made.name != self.name:
            differences.append(f"its name is {made.name!r}")
        if made.capacity < self.required or (self.limit and made.capacity > self.limit):
            differences.append(f"its size is {format_quantity(made.capacity)}")
        if made.parameters != self.parameters:
            keys = sorted(key for key, _ in made.parameters.items() ^ self.parameters.items())
            differences.append(f"it was made with another {' and '.join(dict.fromkeys(keys))}")
        try:
            fitting(made.systems, self.requisite, ())
        except CknixError as error:
            differences.append(error.message)
        if differences:
            raise Conflict(
                f"volume {self.name!r} exists already, and is another one: {'; '.join(differences)}; "
                "delete the claim and make it again"
            )


@dataclass(frozen=True, slots=True)
class ValidateCall:
    """A valid ValidateVolumeCapabilities."""

    volume_id: str
    unsupported: Sequence[Problem]
    """With the capabilities it asks about."""
    context: Mapping[str, str]
    parameters: Mapping[str, str]

    @classmethod
    def parse(cls, request: ValidateVolumeCapabilitiesRequest) -> ValidateCall:
        """Raises :class:`Invalid` with every problem."""
        problems = [] if request.volume_id else [Problem("volume_id", "is missing")]
        if not request.volume_capabilities:
            problems.append(Problem("volume_capabilities", "are missing"))
        if problems:
            raise Invalid(problems)
        return cls(
            volume_id=request.volume_id,
            unsupported=capability_problems(request.volume_capabilities),
            context=dict(request.volume_context),
            parameters=dict(request.parameters),
        )

    def problems(self, made: VolumeRecord) -> list[Problem]:
        """Why *made* cannot be used as it is asked."""
        found = list(self.unsupported)
        # A PersistentVolume has also what the provisioner has put there.
        if self.context and user_attributes(self.context) != made.attributes:
            found.append(Problem("volume_context", "is not the volume's"))
        if self.parameters and self.parameters != made.parameters:
            found.append(Problem("parameters", "are not those that the volume was made with"))
        return found


def capability_problems(capabilities: Sequence[VolumeCapability]) -> list[Problem]:
    """What this driver cannot do of *capabilities*, of which there must be one."""
    if not capabilities:
        return [Problem("volume_capabilities", "are missing")]
    problems: list[Problem] = []
    for index, capability in enumerate(capabilities):
        found: list[Problem] = []
        parse_capability(capability, found)
        field = f"volume_capabilities[{index}]"
        problems += [Problem(each.field.replace("volume_capability", field, 1), each.message) for each in found]
    return problems


def volume_of(record: VolumeRecord) -> Volume:
    return Volume(
        volume_id=record.id,
        capacity_bytes=record.capacity,
        volume_context=record.attributes,
        accessible_topology=[Topology(segments=segments_of(system)) for system in record.systems],
    )


def _capacity_problems(capacity: CapacityRange) -> list[Problem]:
    required, limit = capacity.required_bytes, capacity.limit_bytes
    if required < 0 or limit < 0:
        return [Problem("capacity_range", f"from {required} to {limit} bytes: neither can be negative")]
    if 0 < limit < required:
        return [Problem("capacity_range", f"its limit of {limit} bytes is less than the {required} it requires")]
    return []


def _segments(topologies: Iterable[Topology]) -> list[Segments]:
    return [dict(topology.segments) for topology in topologies]
