"""Requests for volumes: what is refused, with which words, and when a volume that exists is the one asked for."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.errors import CknixError, Conflict, Invalid
from cknix_csi.csi.provisioning import CreateCall, ValidateCall, volume_of
from cknix_csi.kube.volumerecords import VolumeRecord, volume_id
from cknix_csi.proto.csi_pb2 import (
    CapacityRange,
    CreateVolumeRequest,
    Topology,
    TopologyRequirement,
    ValidateVolumeCapabilitiesRequest,
    VolumeCapability,
    VolumeContentSource,
)

GIB = 1 << 30
Mode = VolumeCapability.AccessMode
MOUNT = VolumeCapability(mount=VolumeCapability.MountVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER))
BLOCK = VolumeCapability(block=VolumeCapability.BlockVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER))


def request(**changes: Any) -> CreateVolumeRequest:
    fields = {
        "name": "pvc-1",
        "volume_capabilities": [MOUNT],
        "parameters": {"expression": "hello"},
        "capacity_range": CapacityRange(required_bytes=GIB),
        **changes,
    }
    return CreateVolumeRequest(**fields)


def problems(**changes: Any) -> list[str]:
    with pytest.raises(Invalid) as raised:
        CreateCall.parse(request(**changes))
    return [str(problem) for problem in raised.value.problems]


def made(**changes: Any) -> VolumeRecord:
    fields: dict[str, Any] = {
        "name": "pvc-1",
        "capacity": GIB,
        "parameters": {"expression": "hello"},
        "attributes": {"expression": "hello"},
        "systems": (),
        **changes,
    }
    return VolumeRecord(**fields)


def at(*systems: str) -> TopologyRequirement:
    return TopologyRequirement(requisite=[Topology(segments={"cknix.cool/system": system}) for system in systems])


def test_every_problem_is_named_at_once() -> None:
    fancy = VolumeCapability(
        mount=VolumeCapability.MountVolume(fs_type="ext4", mount_flags=["secret"]), access_mode=Mode(mode=Mode.UNKNOWN)
    )
    assert problems(
        name="",
        volume_capabilities=[BLOCK, fancy],
        capacity_range=CapacityRange(required_bytes=2, limit_bytes=1),
        volume_content_source=VolumeContentSource(volume=VolumeContentSource.VolumeSource(volume_id="v")),
        mutable_parameters={"a": "b"},
    ) == [
        "name: is missing",
        "volume_capabilities[0].block: is not supported: a closure is a directory tree; use volumeMode: Filesystem",
        "volume_capabilities[1].mount.fs_type: 'ext4' is not supported; remove fsType",
        "volume_capabilities[1].mount.mount_flags: are not supported; remove mountOptions",
        "volume_capabilities[1].access_mode: is missing",
        "capacity_range: its limit of 1 bytes is less than the 2 it requires",
        "volume_content_source: is not supported: a volume shows what its Expression says; remove dataSource from the "
        "claim",
        "mutable_parameters: is not supported: parameters do not change; remove volumeAttributesClassName from the "
        "claim",
    ]


def test_a_request_without_capabilities_is_refused() -> None:
    assert problems(volume_capabilities=[]) == ["volume_capabilities: are missing"]


@pytest.mark.parametrize("mode", range(1, 8))
def test_every_access_mode_can_be_had(mode: int) -> None:
    capability = VolumeCapability(mount=VolumeCapability.MountVolume())
    capability.access_mode.mode = mode  # type: ignore[assignment]
    CreateCall.parse(request(volume_capabilities=[capability]))


def test_a_name_may_be_as_long_as_the_specification_says_and_no_longer() -> None:
    CreateCall.parse(request(name="n" * 128))
    assert problems(name="ä" * 65) == ["name: is 130 bytes long; the limit is 128"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"capacity_range": CapacityRange()},
        {"capacity_range": CapacityRange(required_bytes=5, limit_bytes=GIB)},
        {"secrets": {"password": "other"}},
        {"accessibility_requirements": at("x86_64-linux")},
    ],
)
def test_the_same_volume_may_be_asked_for_again(changes: dict[str, Any]) -> None:
    CreateCall.parse(request(**changes)).require_same(made(systems=("x86_64-linux",)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capacity_range": CapacityRange(required_bytes=2 * GIB)}, "its size is 1Gi"),
        ({"capacity_range": CapacityRange(limit_bytes=5)}, "its size is 1Gi"),
        ({"parameters": {"expression": "other"}}, "it was made with another expression;"),
        ({"parameters": {}}, "it was made with another expression;"),
        ({"accessibility_requirements": at("aarch64-linux")}, "the volume can run on x86_64-linux only"),
        ({"name": "other"}, "its name is 'pvc-1'"),
    ],
)
def test_another_volume_of_the_same_name_is_a_conflict(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Conflict, match=re.escape(words)):
        CreateCall.parse(request(**changes)).require_same(made(systems=("x86_64-linux",)))


def test_validation_compares_what_it_is_given() -> None:
    def told(**fields: Any) -> list[str]:
        call = ValidateCall.parse(ValidateVolumeCapabilitiesRequest(volume_id="v", **fields))
        return [str(problem) for problem in call.problems(made(parameters={"a": "b"}))]

    assert told(volume_capabilities=[MOUNT]) == []
    right = {"volume_context": {"expression": "hello"}, "parameters": {"a": "b"}}
    assert told(volume_capabilities=[MOUNT], **right) == []
    # As external-provisioner writes it into a PersistentVolume.
    identity = {"storage.kubernetes.io/csiProvisionerIdentity": "1732000000000-8081-csi.cknix.cool"}
    assert told(volume_capabilities=[MOUNT], volume_context={"expression": "hello", **identity}) == []
    assert told(volume_capabilities=[MOUNT], volume_context=identity) == ["volume_context: is not the volume's"]
    wrong = {"volume_context": {"expression": "x"}, "parameters": {"a": "c"}}
    assert told(volume_capabilities=[MOUNT, BLOCK], **wrong) == [
        "volume_capabilities[1].block: is not supported: a closure is a directory tree; use volumeMode: Filesystem",
        "volume_context: is not the volume's",
        "parameters: are not those that the volume was made with",
    ]


@given(st.text(min_size=1, max_size=128))
def test_an_id_is_a_bounded_name_that_the_api_server_takes(name: str) -> None:
    identity = volume_id(name)
    assert re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", identity)
    assert len(identity) <= 88
    assert volume_id(name) == identity


def test_ids_can_be_read_and_never_meet() -> None:
    name = "pvc-0e4c7c1e-7a59-4b6c-8b6d-1f2a3b4c5d6e"
    assert volume_id(name).startswith(f"volume-{name}-")
    names = ["a", "A", "a-", "-a", "a" * 127, "a" * 128, "ä"]
    assert len({volume_id(name) for name in names}) == len(names)


def test_a_record_survives_being_written() -> None:
    record = made(
        name="N\u00e4me", parameters={"expression": "hello", "csi.storage.k8s.io/pvc/name": "x"}, systems=("a",)
    )
    assert VolumeRecord.parse(record.manifest("ns")) == record
    volume = volume_of(record)
    assert (volume.volume_id, volume.capacity_bytes) == (record.id, GIB)
    assert [dict(each.segments) for each in volume.accessible_topology] == [{"cknix.cool/system": "a"}]


@pytest.mark.parametrize(
    "damage",
    [
        {"data": None},
        {"data": {"name": "pvc-1"}},
        {"data": {**made().manifest("ns")["data"], "parameters": "[]"}},
        {"data": {**made().manifest("ns")["data"], "systems": "7"}},
        {"data": made(name="other").manifest("ns")["data"]},
    ],
)
def test_a_record_that_somebody_else_wrote_is_told_and_not_believed(damage: dict[str, Any]) -> None:
    with pytest.raises(CknixError, match="does not hold a volume"):
        VolumeRecord.parse({**made().manifest("ns"), **damage})
