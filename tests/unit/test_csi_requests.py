"""Requests: every bad input with the message that its sender reads."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.attributes import KNOWN_KEYS, FromExpression, FromStorePath, PodInfo
from cknix_csi.api.errors import Invalid
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.options import VolumeOptions
from cknix_csi.api.situations import Code
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.requests import AccessMode, PublishCall, StatsCall, UnpublishCall
from cknix_csi.proto.csi_pb2 import (
    NodeGetVolumeStatsRequest,
    NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest,
    VolumeCapability,
)

SYSTEM = "x86_64-linux"
HELLO = "/nix/store/" + "1" * 32 + "-hello-2.12"
TARGET = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/nix/mount"
POD = {
    "csi.storage.k8s.io/pod.name": "web",
    "csi.storage.k8s.io/pod.namespace": "default",
    "csi.storage.k8s.io/pod.uid": "u-1",
    "csi.storage.k8s.io/serviceAccount.name": "sa",
    "csi.storage.k8s.io/ephemeral": "true",
}
Mode = VolumeCapability.AccessMode.Mode


def capability(mode: int = 7) -> VolumeCapability:
    request = VolumeCapability(mount=VolumeCapability.MountVolume())
    request.access_mode.mode = mode  # type: ignore[assignment]  # also numbers that are not in the enum
    return request


def publish_request(**changes: object) -> NodePublishVolumeRequest:
    fields: dict[str, object] = {
        "volume_id": "csi-1",
        "target_path": TARGET,
        "volume_capability": capability(),
        "readonly": True,
        "volume_context": {**POD, "expression": "hello"},
        **changes,
    }
    return NodePublishVolumeRequest(**{name: value for name, value in fields.items() if value is not None})  # type: ignore[arg-type]


def problems(request: NodePublishVolumeRequest) -> list[str]:
    with pytest.raises(Invalid) as raised:
        PublishCall.parse(request, system=SYSTEM)
    assert raised.value.code is Code.INVALID_ARGUMENT
    return [str(problem) for problem in raised.value.problems]


def test_an_inline_volume_is_read_whole() -> None:
    assert PublishCall.parse(publish_request(), system=SYSTEM) == PublishCall(
        volume_id="csi-1",
        target=Path(TARGET),
        source=FromExpression("default", "hello"),
        writable=False,
        access_mode=AccessMode.SINGLE_NODE_MULTI_WRITER,
        pod=PodInfo("web", "default", "u-1", "sa", ephemeral=True),
    )


def test_what_kubelet_does_not_say_is_not_guessed() -> None:
    call = PublishCall.parse(publish_request(volume_context={"storePath": HELLO}), system=SYSTEM)
    assert call.source == FromStorePath(StorePath.parse(HELLO))
    assert call.pod == PodInfo()


@pytest.mark.parametrize(
    ("readonly", "mode", "writable"),
    [
        (False, Mode.SINGLE_NODE_WRITER, True),
        (True, Mode.SINGLE_NODE_WRITER, False),
        (False, Mode.MULTI_NODE_MULTI_WRITER, True),
        (False, Mode.SINGLE_NODE_READER_ONLY, False),
        (False, Mode.MULTI_NODE_READER_ONLY, False),
    ],
)
def test_a_volume_is_writable_when_neither_the_request_nor_its_mode_says_read_only(
    readonly: bool, mode: int, writable: bool
) -> None:
    request = publish_request(readonly=readonly, volume_capability=capability(mode))
    assert PublishCall.parse(request, system=SYSTEM).writable is writable


def test_options_are_read_and_problems_with_them_told_beside_all_others() -> None:
    asked = {**POD, "expression": "hello", "sizeLimit": "1Gi", "medium": "Memory"}
    call = PublishCall.parse(publish_request(readonly=False, volume_context=asked), system=SYSTEM)
    assert call.options == VolumeOptions(Limit(1 << 30, Medium.MEMORY))
    found = problems(publish_request(volume_id=None, volume_context={**asked, "storePath": HELLO}))
    assert [problem.split(":")[0] for problem in found] == [
        "volume_id",
        'volume attribute "expression"',
        'volume attribute "sizeLimit"',
        'volume attribute "medium"',
    ]


@pytest.mark.parametrize("mode", [value for value in Mode.values() if value])
def test_every_access_mode_of_the_specification_is_known(mode: int) -> None:
    call = PublishCall.parse(publish_request(volume_capability=capability(mode)), system=SYSTEM)
    assert call.access_mode.name == Mode.Name(mode)


def mount(**fields: object) -> VolumeCapability:
    return VolumeCapability(
        mount=VolumeCapability.MountVolume(**fields),  # type: ignore[arg-type]
        access_mode=VolumeCapability.AccessMode(mode=Mode.SINGLE_NODE_WRITER),
    )


BAD = {
    "no volume id": ({"volume_id": None}, "volume_id: is missing"),
    "a volume id with NUL": ({"volume_id": "a\0b"}, r"volume_id: 'a\x00b' holds a NUL character"),
    "no target path": ({"target_path": None}, "target_path: is missing"),
    "a relative target path": (
        {"target_path": "pods/1/mount"},
        "target_path: 'pods/1/mount' is not an absolute path without \"..\"",
    ),
    "a target path that climbs": (
        {"target_path": "/a/../etc"},
        "target_path: '/a/../etc' is not an absolute path without \"..\"",
    ),
    "the root as target path": (
        {"target_path": "/"},
        "target_path: '/' is not an absolute path without \"..\"",
    ),
    "no capability": ({"volume_capability": None}, "volume_capability: is missing"),
    "neither block nor mount": (
        {"volume_capability": VolumeCapability(access_mode=VolumeCapability.AccessMode(mode=Mode.SINGLE_NODE_WRITER))},
        "volume_capability.mount: is missing",
    ),
    "block access": (
        {
            "volume_capability": VolumeCapability(
                block=VolumeCapability.BlockVolume(),
                access_mode=VolumeCapability.AccessMode(mode=Mode.SINGLE_NODE_WRITER),
            )
        },
        "volume_capability.block: is not supported: a closure is a directory tree; use volumeMode: Filesystem",
    ),
    "a file system type": (
        {"volume_capability": mount(fs_type="ext4")},
        "volume_capability.mount.fs_type: 'ext4' is not supported; remove fsType",
    ),
    "mount flags, whose text stays secret": (
        {"volume_capability": mount(mount_flags=["password=hunter2"])},
        "volume_capability.mount.mount_flags: are not supported; remove mountOptions",
    ),
    "a mount group": (
        {"volume_capability": mount(volume_mount_group="1000")},
        "volume_capability.mount.volume_mount_group: '1000' is not supported: files belong to the store and keep "
        "their owner",
    ),
    "no access mode": ({"volume_capability": capability(0)}, "volume_capability.access_mode: is missing"),
    "an access mode of the future": (
        {"volume_capability": capability(99)},
        "volume_capability.access_mode.mode: 99 is not a known access mode; known are 1 (SINGLE_NODE_WRITER), "
        "2 (SINGLE_NODE_READER_ONLY), 3 (MULTI_NODE_READER_ONLY), 4 (MULTI_NODE_SINGLE_WRITER), "
        "5 (MULTI_NODE_MULTI_WRITER), 6 (SINGLE_NODE_SINGLE_WRITER), 7 (SINGLE_NODE_MULTI_WRITER)",
    ),
    "a misspelt attribute": (
        {"volume_context": {**POD, "expresion": "hello"}},
        'volume attribute "expresion": is not known; did you mean "expression"?',
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_a_request_is_refused_for(changes: dict[str, object], message: str) -> None:
    assert problems(publish_request(**changes)) == [message]


def test_all_problems_are_reported_at_once() -> None:
    assert problems(NodePublishVolumeRequest(volume_context={"expresion": "hello"})) == [
        "volume_id: is missing",
        "target_path: is missing",
        "volume_capability: is missing",
        'volume attribute "expresion": is not known; did you mean "expression"?',
    ]


def test_secrets_and_tokens_are_not_kept() -> None:
    context = {**POD, "expression": "hello", "csi.storage.k8s.io/serviceAccount.tokens": "t0ken"}
    call = PublishCall.parse(
        publish_request(secrets={"k": "s3cret"}, publish_context={"k": "s3cret"}, volume_context=context), system=SYSTEM
    )
    assert "s3cret" not in repr(call)
    assert "t0ken" not in repr(call)


def test_a_long_target_path_with_odd_characters_is_taken_as_it_is() -> None:
    target = "/" + "/".join(["a b\n\\é,:" * 8] * 40)
    assert str(PublishCall.parse(publish_request(target_path=target), system=SYSTEM).target) == target


def test_an_unpublish_is_read() -> None:
    request = NodeUnpublishVolumeRequest(volume_id="csi-1", target_path=TARGET)
    assert UnpublishCall.parse(request) == UnpublishCall("csi-1", Path(TARGET))


def test_an_unpublish_without_fields_names_both() -> None:
    with pytest.raises(Invalid) as raised:
        UnpublishCall.parse(NodeUnpublishVolumeRequest())
    assert [str(problem) for problem in raised.value.problems] == ["volume_id: is missing", "target_path: is missing"]


@pytest.mark.parametrize("path", [TARGET, "some/path", "/", "../.."])
def test_a_request_for_stats_may_name_any_path(path: str) -> None:
    request = NodeGetVolumeStatsRequest(volume_id="csi-1", volume_path=path, staging_target_path="/staged")
    assert StatsCall.parse(request) == StatsCall("csi-1", Path(path))


def test_all_problems_of_a_request_for_stats_are_reported_at_once() -> None:
    for request, message in (
        (NodeGetVolumeStatsRequest(), "volume_id: is missing; volume_path: is missing"),
        (NodeGetVolumeStatsRequest(volume_id="csi-1"), "volume_path: is missing"),
        (
            NodeGetVolumeStatsRequest(volume_id="a\0b", volume_path="/a\0b"),
            r"volume_id: 'a\x00b' holds a NUL character; volume_path: '/a\x00b' holds a NUL character",
        ),
    ):
        with pytest.raises(Invalid) as raised:
            StatsCall.parse(request)
        assert (raised.value.code, raised.value.message) == (Code.INVALID_ARGUMENT, message)


FEW = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # UTF-8, as protobuf has it
PATHS = FEW | FEW.map("/{}".format) | st.lists(FEW, max_size=4).map(lambda parts: "/" + "/".join(parts))
ATTRIBUTES = st.dictionaries(st.sampled_from([*POD, *sorted(KNOWN_KEYS)]) | FEW, FEW | st.just(HELLO), max_size=6)
MOUNTS = st.builds(
    VolumeCapability.MountVolume, fs_type=FEW, mount_flags=st.lists(FEW, max_size=2), volume_mount_group=FEW
)
MODES = st.builds(VolumeCapability.AccessMode, mode=st.integers(0, 9))
CAPABILITIES = st.one_of(
    st.none(),
    st.builds(VolumeCapability, mount=MOUNTS, access_mode=MODES),
    st.builds(VolumeCapability, block=st.just(VolumeCapability.BlockVolume()), access_mode=MODES),
    st.builds(VolumeCapability, access_mode=MODES),
)


@given(
    st.builds(
        NodePublishVolumeRequest,
        volume_id=FEW,
        target_path=PATHS,
        volume_capability=CAPABILITIES,
        readonly=st.booleans(),
        volume_context=ATTRIBUTES,
        publish_context=ATTRIBUTES,
        secrets=ATTRIBUTES,
    )
)
def test_any_request_is_read_or_refused_in_words(request: NodePublishVolumeRequest) -> None:
    try:
        call = PublishCall.parse(request, system=SYSTEM)
    except Invalid as error:
        assert error.problems
        assert all(problem.field and problem.message for problem in error.problems)
    else:
        assert call.volume_id
        assert call.target.is_absolute()
