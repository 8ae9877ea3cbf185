"""The second-publish table of the CSI specification, cell by cell."""

from pathlib import Path

import pytest

from cknix_csi.api.attributes import FromExpression, FromStorePath, PodInfo, VolumeSource
from cknix_csi.api.errors import CknixError, Conflict
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.options import VolumeOptions
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.situations import Code
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
    limit: Limit | None = None,
    presentation: Presentation | None = None,
) -> PublishCall:
    return PublishCall(volume_id, HERE, source, writable, mode, PodInfo(), VolumeOptions(limit, presentation))


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
    # By the ledger, after a restart.
    there = Publication(HELLO.basename, writable=False)
    require_same(call(), there, None, "v1")
    with pytest.raises(Conflict, match="it is volume v0, asked for is volume v1"):
        require_same(call(), there, None, "v0")


def test_another_expression_is_a_conflict_where_it_is_known() -> None:
    other = FromExpression("default", "other")
    with pytest.raises(Conflict, match="it was published from default/hello, asked for is default/other"):
        require_same(call(other), Publication(HELLO.basename, writable=False), call(EXPRESSION))


SMALL, LARGE = Limit(1 << 20), Limit(1 << 30, Medium.MEMORY)


def test_another_limit_is_a_conflict_that_names_both() -> None:
    there = Publication(HELLO.basename, writable=True, limit=SMALL)
    with pytest.raises(Conflict, match="it may hold 1Mi on disk, asked for is 1Gi in memory"):
        require_same(call(writable=True, limit=LARGE), there, None)
    with pytest.raises(Conflict, match="it may hold any amount, asked for is 1Mi on disk"):
        require_same(call(writable=True, limit=SMALL), Publication(HELLO.basename, writable=True), None)
    with pytest.raises(Conflict, match="it was published with a limit of 1Mi on disk, asked for is none"):
        require_same(call(writable=True), there, call(writable=True, limit=SMALL))


@pytest.mark.parametrize("made", list(Presentation))
def test_another_presentation_is_a_conflict_only_for_who_asks_for_one(made: Presentation) -> None:
    there = Publication(HELLO.basename, writable=False, presentation=made)
    require_same(call(), there, call(presentation=made))
    for asked in Presentation:
        if asked is made:
            require_same(call(presentation=asked), there, None)
        else:
            with pytest.raises(Conflict, match=f"it is presented as {made.value}, asked for is {asked.value}"):
                require_same(call(presentation=asked), there, None)


def test_a_limit_is_compared_as_it_is_made() -> None:
    there = Publication(HELLO.basename, writable=True, limit=SMALL)
    require_same(call(writable=True, limit=Limit((1 << 20) + 4095)), there, None)


def test_a_running_pod_keeps_the_limit_that_the_node_gave_it() -> None:
    there = Publication(HELLO.basename, writable=True, limit=SMALL)
    require_same(call(writable=True), there, None)
    require_same(call(writable=True), there, call(writable=True))


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
