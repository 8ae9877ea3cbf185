"""The whole daemon refuses bad input with all that is wrong with it, and leaves nothing half-done."""

from __future__ import annotations

from typing import Any

import pytest

from cknix_csi.proto.csi_pb2 import NodePublishVolumeRequest, VolumeCapability
from tests.node.whole import Source, WholeNode

KNOWN = (
    "storePath, expression, flakeRef, expr, namespace, sizeLimit, medium, presentation, "
    "or a system such as x86_64-linux"
)
UNKNOWN_PATH = "/nix/store/00000000000000000000000000000000-x"
OPTIONS = 'set one of "expression", "storePath" or a store path per system, for example x86_64-linux: "/nix/store/…"'

ATTRIBUTES: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt attribute": (
        {"expresion": "hello"},
        'volume attribute "expresion": is not known; did you mean "expression"?',
    ),
    "an unknown attribute": (
        {"storePath": UNKNOWN_PATH, "colour": "red"},
        f'volume attribute "colour": is not known; known are {KNOWN}',
    ),
    "two sources": (
        {"expression": "hello", "storePath": UNKNOWN_PATH},
        'volume attribute "expression": cannot stand beside "storePath"; a volume has one source, remove all but one '
        'of "storePath", "expression"',
    ),
    "a malformed store path": (
        {"storePath": "/nix/store/hello"},
        "volume attribute \"storePath\": '/nix/store/hello' is not a store path: the hash must be 32 characters "
        "of Nix base32 (0-9 a-z without e o t u)",
    ),
    "a path outside of the store": (
        {"storePath": "/etc/passwd"},
        "volume attribute \"storePath\": '/etc/passwd' is not a store path: it must begin with /nix/store/, as in "
        "/nix/store/<hash>-<name>",
    ),
    "a derivation": (
        {"storePath": f"{UNKNOWN_PATH}.drv"},
        f'volume attribute "storePath": {UNKNOWN_PATH}.drv is a derivation; name its output path instead',
    ),
    "no source": ({}, f"volume attributes: no source given; {OPTIONS}"),
    "another system": (
        {"aarch64-linux": UNKNOWN_PATH},
        'volume attribute "x86_64-linux": missing: this node\'s system is x86_64-linux, but there are store paths only '
        'for aarch64-linux; add "x86_64-linux", or a fallback such as "expression"',
    ),
    "another namespace": (
        {"expression": "hello", "namespace": "kube-system"},
        "volume attribute \"namespace\": 'kube-system' is not the pod's namespace 'default'; an inline volume can only "
        "use an Expression of its own namespace",
    ),
}


@pytest.mark.parametrize("case", ATTRIBUTES)
async def test_attributes_are_refused_in_words(whole: WholeNode, case: str) -> None:
    attributes, words = ATTRIBUTES[case]
    await whole.start()
    assert await whole.refused(**attributes) == ("INVALID_ARGUMENT", words)
    require_untouched(whole)


def block(request: Any) -> None:
    request.volume_capability.block.SetInParent()


def without_capability(request: Any) -> None:
    request.ClearField("volume_capability")


def without_id(request: Any) -> None:
    request.volume_id = ""


def without_target(request: Any) -> None:
    request.target_path = ""


def without_mode(request: Any) -> None:
    request.volume_capability.access_mode.mode = VolumeCapability.AccessMode.UNKNOWN


def with_mount_options(request: Any) -> None:
    request.volume_capability.mount.mount_flags.append("exec")
    request.volume_capability.mount.fs_type = "ext4"


def relative(request: Any) -> None:
    request.target_path = "../etc"


FIELDS = {
    block: "volume_capability.block: is not supported: a closure is a directory tree; use volumeMode: Filesystem",
    without_capability: "volume_capability: is missing",
    without_id: "volume_id: is missing",
    without_target: "target_path: is missing",
    without_mode: "volume_capability.access_mode: is missing",
    with_mount_options: "volume_capability.mount.fs_type: 'ext4' is not supported; remove fsType; "
    "volume_capability.mount.mount_flags: are not supported; remove mountOptions",
    relative: "target_path: '../etc' is not an absolute path without \"..\"",
}


@pytest.mark.parametrize("change", FIELDS)
async def test_fields_are_refused_in_words(whole: WholeNode, source: Source, change: Any) -> None:
    await whole.start()
    request = whole.publish_request(storePath=source.hello)
    change(request)
    assert await whole.refusal(request) == ("INVALID_ARGUMENT", FIELDS[change])
    require_untouched(whole)


async def test_everything_that_is_wrong_is_said_at_once(whole: WholeNode) -> None:
    await whole.start()
    request = NodePublishVolumeRequest(volume_context={"expresion": "hello", "storePath": "hello"})
    assert await whole.refusal(request) == (
        "INVALID_ARGUMENT",
        "volume_id: is missing; target_path: is missing; volume_capability: is missing; "
        'volume attribute "expresion": is not known; did you mean "expression"?; '
        "volume attribute \"storePath\": 'hello' is not a store path: it must begin with /nix/store/, as in "
        "/nix/store/<hash>-<name>",
    )
    require_untouched(whole)


async def test_a_target_that_is_somebody_elses_is_left_alone(whole: WholeNode, source: Source) -> None:
    await whole.start()
    request = whole.publish_request(storePath=source.file)
    kept = whole.target() / "somebody's"
    kept.mkdir(parents=True)
    code, message = await whole.refusal(request)
    assert code == "FAILED_PRECONDITION"
    assert "is not empty: it holds \"somebody's\", which is not this driver's; remove it" in message
    assert kept.is_dir()
    assert [trace for trace in whole.traces() if not trace.startswith("target")] == []
    kept.rmdir()


async def test_another_volume_at_a_target_is_refused_and_the_first_one_stays(whole: WholeNode, source: Source) -> None:
    await whole.start()
    await whole.publish(storePath=source.file)
    mounted = whole.mount_id()
    code, message = await whole.refused(storePath=source.hello)
    assert code == "ALREADY_EXISTS"
    assert f"it shows {source.file.removeprefix('/nix/store/')}" in message
    assert whole.mount_id() == mounted


def require_untouched(whole: WholeNode) -> None:
    """Nothing mounted, made, rooted, fetched or run."""
    assert whole.traces() == []
    assert whole.registered_paths() == set()
    assert whole.nix_calls() == []
