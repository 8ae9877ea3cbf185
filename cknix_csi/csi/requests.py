"""Requests as values: which fields must be there, what they may hold, and every problem at once.

Rules: CSI specification, "NodePublishVolume", "NodeUnpublishVolume", "NodeGetVolumeStats" and "Error Scheme" (a missing
or unsupported field is INVALID_ARGUMENT).  Attributes: :mod:`cknix_csi.api.attributes`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from cknix_csi.api.attributes import PodInfo, VolumeSource, excessive, parse_source
from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.options import VolumeOptions, parse_options
from cknix_csi.proto.csi_pb2 import (
    NodeGetVolumeStatsRequest,
    NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest,
    VolumeCapability,
)


class AccessMode(enum.Enum):
    """How many nodes and pods may use a volume at once; values are the protocol's numbers."""

    SINGLE_NODE_WRITER = 1
    SINGLE_NODE_READER_ONLY = 2
    MULTI_NODE_READER_ONLY = 3
    MULTI_NODE_SINGLE_WRITER = 4
    MULTI_NODE_MULTI_WRITER = 5
    SINGLE_NODE_SINGLE_WRITER = 6
    SINGLE_NODE_MULTI_WRITER = 7

    @property
    def reads_only(self) -> bool:
        return self in {AccessMode.SINGLE_NODE_READER_ONLY, AccessMode.MULTI_NODE_READER_ONLY}

    @property
    def one_target(self) -> bool:
        """True when the volume may be published at one path of a node only (CSI spec, "NodePublishVolume", table)."""
        return self in {
            AccessMode.SINGLE_NODE_WRITER,
            AccessMode.SINGLE_NODE_READER_ONLY,
            AccessMode.SINGLE_NODE_SINGLE_WRITER,
        }


@dataclass(frozen=True, slots=True)
class PublishCall:
    """A valid NodePublishVolume.  Secrets, publish context and staging path have no meaning here and are not kept."""

    volume_id: str
    target: Path
    source: VolumeSource
    writable: bool
    access_mode: AccessMode
    pod: PodInfo
    options: VolumeOptions = field(default_factory=VolumeOptions)

    @classmethod
    def parse(cls, request: NodePublishVolumeRequest, *, system: str) -> PublishCall:
        """Read *request* for a node of *system*.  Raises :class:`Invalid` with every problem."""
        problems: list[Problem] = []
        target = _parse_ids(request.volume_id, request.target_path, problems)
        mode = _parse_capability(request, problems)
        writable = not (request.readonly or (mode is not None and mode.reads_only))
        # What kubelet adds to the attributes may hold tokens: only these parsers look inside.
        context = dict(request.volume_context)
        source, options = None, VolumeOptions()
        if too_much := excessive(context):
            raise Invalid([*problems, *too_much])
        try:
            source = parse_source(context, system=system)
        except Invalid as error:
            problems += error.problems
        try:
            options = parse_options(context, writable=writable)
        except Invalid as error:
            problems += error.problems
        if problems or mode is None or source is None:
            raise Invalid(problems)
        return cls(
            volume_id=request.volume_id,
            target=target,
            source=source,
            writable=writable,
            access_mode=mode,
            pod=PodInfo.parse(context),
            options=options,
        )


@dataclass(frozen=True, slots=True)
class UnpublishCall:
    """A valid NodeUnpublishVolume."""

    volume_id: str
    target: Path

    @classmethod
    def parse(cls, request: NodeUnpublishVolumeRequest) -> UnpublishCall:
        """Raises :class:`Invalid` with every problem."""
        problems: list[Problem] = []
        target = _parse_ids(request.volume_id, request.target_path, problems)
        if problems:
            raise Invalid(problems)
        return cls(request.volume_id, target)


@dataclass(frozen=True, slots=True)
class StatsCall:
    """A valid NodeGetVolumeStats.  The staging path has no meaning here and is not kept."""

    volume_id: str
    path: Path
    """Where the volume may be published; relative paths and others where none ever is are no error of the request."""

    @classmethod
    def parse(cls, request: NodeGetVolumeStatsRequest) -> StatsCall:
        """Raises :class:`Invalid` with every problem."""
        problems = _id_problems("volume_id", request.volume_id) + _id_problems("volume_path", request.volume_path)
        if problems:
            raise Invalid(problems)
        return cls(request.volume_id, Path(request.volume_path))


def _id_problems(field: str, value: str) -> list[Problem]:
    if not value:
        return [Problem(field, "is missing")]
    return [Problem(field, f"{value!r} holds a NUL character")] if "\0" in value else []


def _parse_ids(volume_id: str, target_path: str, problems: list[Problem]) -> Path:
    problems += _id_problems("volume_id", volume_id)
    target = Path(target_path)
    if not target_path:
        problems.append(Problem("target_path", "is missing"))
    elif not target.is_absolute() or target.parent == target or ".." in target.parts or "\0" in target_path:
        problems.append(Problem("target_path", f'{target_path!r} is not an absolute path without ".."'))
    return target


def _parse_capability(request: NodePublishVolumeRequest, problems: list[Problem]) -> AccessMode | None:
    if not request.HasField("volume_capability"):
        problems.append(Problem("volume_capability", "is missing"))
        return None
    return parse_capability(request.volume_capability, problems)


def parse_capability(capability: VolumeCapability, problems: list[Problem]) -> AccessMode | None:
    """The access mode of *capability*; whatever this driver cannot do goes to *problems*."""
    access_type = capability.WhichOneof("access_type")
    if access_type == "block":
        problems.append(
            Problem(
                "volume_capability.block",
                "is not supported: a closure is a directory tree; use volumeMode: Filesystem",
            )
        )
    elif access_type is None:
        problems.append(Problem("volume_capability.mount", "is missing"))
    else:
        problems += _mount_problems(capability.mount)
    return _parse_mode(capability, problems)


def _mount_problems(mount: VolumeCapability.MountVolume) -> list[Problem]:
    problems = []
    if mount.fs_type:
        problems.append(
            Problem("volume_capability.mount.fs_type", f"{mount.fs_type!r} is not supported; remove fsType")
        )
    if mount.mount_flags:
        # The flags themselves are possibly sensitive (CSI spec, "MountVolume").
        problems.append(Problem("volume_capability.mount.mount_flags", "are not supported; remove mountOptions"))
    if mount.volume_mount_group:
        problems.append(
            Problem(
                "volume_capability.mount.volume_mount_group",
                f"{mount.volume_mount_group!r} is not supported: files belong to the store and keep their owner",
            )
        )
    return problems


def _parse_mode(capability: VolumeCapability, problems: list[Problem]) -> AccessMode | None:
    number = int(capability.access_mode.mode)
    if number == 0:
        problems.append(Problem("volume_capability.access_mode", "is missing"))
        return None
    try:
        return AccessMode(number)
    except ValueError:
        known = ", ".join(f"{mode.value} ({mode.name})" for mode in AccessMode)
        problems.append(
            Problem("volume_capability.access_mode.mode", f"{number} is not a known access mode; known are {known}")
        )
        return None
