"""The second-publish table of the CSI specification, cell by cell."""

from pathlib import Path

import pytest

from cknix_csi.api.attributes import FromExpression, FromStorePath, PodInfo, VolumeSource
from cknix_csi.api.errors import CknixError, Code, Conflict
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.publications import require_only, require_same
from cknix_csi.csi.requests import AccessMode, PublishCall
from cknix_csi.volumes.volumes import Publication

HELLO = StorePath.parse("/nix/store/" + "1" * 32 + "-hello")
NEWER = StorePath.parse("/nix/store/" + "2" * 32 + "-hello")
HERE, THERE = Path("/pods/1/mount"), Path("/pods/2/mount")
EXPRESSION = FromExpression("default", "hello")


def call(
    source: VolumeSource = FromStorePath(HELLO),  # noqa: B008 - frozen
    *,
    writable: bool = False,
    mode: AccessMode = AccessMode.SINGLE_NODE_MULTI_WRITER,
    volume_id: str = "v1",
) -> PublishCall:
    return PublishCall(volume_id, HERE, source, writable, mode, PodInfo())


@pytest.mark.parametrize("mode", list(AccessMode))
def test_the_same_volume_at_the_same_target_is_fine_in_every_mode(mode: AccessMode) -> None:
    require_same(call(mode=mode), Publication(HELLO.basename, writable=False), None)
    require_only(call(mode=mode), [HERE])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (call(writable=True), "it is read-only, asked for is writable"),
        (call(FromStorePath(NEWER)), f"it shows {HELLO.basename}, asked for is {NEWER.basename}"),
    ],
)
def test_another_volume_at_the_same_target_is_a_conflict_that_names_what_differs(
    wanted: PublishCall, words: str
) -> None:
    with pytest.raises(Conflict) as raised:
        require_same(wanted, Publication(HELLO.basename, writable=False), None)
    assert raised.value.code is Code.ALREADY_EXISTS
    assert raised.value.message == (f"another volume is published at target_path {HERE}: {words}; unpublish it first")


def test_another_volume_id_is_a_conflict_where_it_is_known() -> None:
    with pytest.raises(Conflict, match="it is volume v1, asked for is volume v2"):
        require_same(call(volume_id="v2"), Publication(HELLO.basename, writable=False), call())


def test_another_expression_is_a_conflict_where_it_is_known() -> None:
    other = FromExpression("default", "other")
    with pytest.raises(Conflict, match="it was published from default/hello, asked for is default/other"):
        require_same(call(other), Publication(HELLO.basename, writable=False), call(EXPRESSION))


def test_a_running_pod_keeps_its_closure_when_its_expression_has_a_newer_result() -> None:
    require_same(call(EXPRESSION), Publication(NEWER.basename, writable=False), call(EXPRESSION))


@pytest.mark.parametrize(
    "mode",
    [
        AccessMode.SINGLE_NODE_MULTI_WRITER,
        AccessMode.MULTI_NODE_READER_ONLY,
        AccessMode.MULTI_NODE_SINGLE_WRITER,
        AccessMode.MULTI_NODE_MULTI_WRITER,
    ],
)
def test_another_target_is_fine_in_modes_that_share(mode: AccessMode) -> None:
    require_only(call(mode=mode), [THERE])


@pytest.mark.parametrize(
    "mode",
    [AccessMode.SINGLE_NODE_SINGLE_WRITER, AccessMode.SINGLE_NODE_WRITER, AccessMode.SINGLE_NODE_READER_ONLY],
)
def test_another_target_is_refused_in_modes_for_one_user(mode: AccessMode) -> None:
    with pytest.raises(CknixError) as raised:
        require_only(call(mode=mode), [THERE])
    assert raised.value.code is Code.FAILED_PRECONDITION
    assert raised.value.message == (
        f"volume v1 is published at {THERE} already, and access mode {mode.name} allows one target on a node; "
        "use accessModes ReadWriteOnce or ReadOnlyMany to share it"
    )
