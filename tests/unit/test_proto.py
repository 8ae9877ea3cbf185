"""The committed protocol code is what the .proto files give, and the .proto files carry the wire contract."""

from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor

from cknix_csi.proto import csi_pb2, generate


def test_the_committed_code_is_what_the_proto_files_give(tmp_path: Path) -> None:
    assert generate.outdated(generate.generate(tmp_path)) == []


def test_a_file_that_differs_is_named(tmp_path: Path) -> None:
    wanted = generate.generate(tmp_path)
    wanted["csi_pb2.py"] += b"# changed\n"
    assert generate.outdated(wanted) == ["csi_pb2.py"]


def test_every_map_of_secrets_is_marked_as_secret() -> None:
    marked: dict[str, bool] = {
        message.name: field.GetOptions().Extensions[csi_pb2.csi_secret]  # type: ignore[index]  # protoc's stub is vague
        for message in csi_pb2.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.name == "secrets"
    }
    assert {"NodePublishVolumeRequest", "CreateVolumeRequest", "NodeExpandVolumeRequest"} <= marked.keys()
    assert set(marked.values()) == {True}


def test_a_publish_request_has_the_bytes_of_the_specification() -> None:
    # Written by hand from the field numbers of CSI 1.12: 1 volume_id, 4 target_path, 5 volume_capability
    # {2 mount {}, 3 access_mode {1 mode}}, 6 readonly, 8 volume_context {1 key, 2 value}.
    wire = (
        b"\x0a\x02v1"
        + b"\x22\x02/t"
        + b"\x2a\x06\x12\x00\x1a\x02\x08\x07"
        + b"\x30\x01"
        + b"\x42\x06\x0a\x01k\x12\x01v"
    )
    request = csi_pb2.NodePublishVolumeRequest.FromString(wire)
    assert (request.volume_id, request.target_path, request.readonly) == ("v1", "/t", True)
    assert request.volume_capability.WhichOneof("access_type") == "mount"
    assert request.volume_capability.access_mode.mode == 7
    assert dict(request.volume_context) == {"k": "v"}
    assert request.SerializeToString(deterministic=True) == wire


def test_fields_of_a_newer_specification_are_tolerated_and_kept() -> None:
    wire = b"\x0a\x02v1" + b"\xfa\x3e\x03new"  # field 1007, length-delimited
    assert csi_pb2.NodeUnpublishVolumeRequest.FromString(wire).SerializeToString() == wire


def test_no_field_is_required_or_has_a_default_of_its_own() -> None:
    for message in csi_pb2.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            assert not field.is_required
            assert field.type == FieldDescriptor.TYPE_MESSAGE or field.is_repeated or not field.default_value
