"""Which presentation a volume gets."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.presentation import Presentation
from cknix_csi.api.situations import Code
from cknix_csi.volumes.choose import Choice, PresentationUnavailable, Wish, choose
from cknix_csi.volumes.probe import TITLES, Finding, ProbeResult, table

REDIRECT, HARDLINK, COPY = Presentation
READ_ONLY_VIEW = {"listing", "directory_content", "stub_content", "read_only", "store_layer"}
WRITABLE_VIEW = READ_ONLY_VIEW | {"write_apart", "chmod_apart"}
LIMIT = 1 << 30

read_only, writable = Wish(writable=False), Wish(writable=True)
read_only_userns, writable_userns = Wish(writable=False, host_users=False), Wish(writable=True, host_users=False)


def node_without(*names: str) -> ProbeResult:
    """A node where everything works as on Linux 6.18, but for *names*."""
    missing = {"reflink", "idmapped_overlay", *names}
    assert missing <= set(TITLES)
    findings = {name: Finding(name not in missing, f"because of {name}") for name in TITLES}
    return ProbeResult(kernel="6.18", **findings)


def asking(wish: Wish, presentation: Presentation) -> Wish:
    return dataclasses.replace(wish, asked=presentation)


probes = st.builds(lambda missing: node_without(*missing), st.sets(st.sampled_from(sorted(TITLES))))
wishes = st.builds(
    Wish,
    writable=st.booleans(),
    host_users=st.booleans(),
    asked=st.none() | st.sampled_from(Presentation),
    size_limit=st.none() | st.just(LIMIT),
)


@pytest.mark.parametrize(
    ("missing", "wish", "presentation", "overlay"),
    [
        pytest.param((), read_only, REDIRECT, True, id="a read-only volume is a redirect view"),
        pytest.param((), writable, REDIRECT, True, id="a writable volume is a redirect view"),
        pytest.param((), read_only_userns, HARDLINK, False, id="a pod with hostUsers: false gets a plain farm"),
        pytest.param(("listing",), read_only, HARDLINK, True, id="a failed probe leads to a farm, below an overlay"),
        pytest.param(("stub_content",), writable, HARDLINK, True, id="and so it does for a writable volume"),
        pytest.param(("write_apart",), read_only, REDIRECT, True, id="what only writers need does not hinder readers"),
        pytest.param(("chmod_apart",), writable, HARDLINK, True, id="but it does hinder writers"),
        pytest.param(
            ("listing", "overlay_read_only", "overlay_writable"), read_only, HARDLINK, False, id="no overlay at all"
        ),
        pytest.param(("hardlink",), read_only, REDIRECT, True, id="a redirect view needs no hard links"),
        pytest.param((), asking(read_only, HARDLINK), HARDLINK, True, id="a farm is had for the asking"),
        pytest.param((), asking(writable, HARDLINK), HARDLINK, True, id="a writable farm is written to in an overlay"),
        pytest.param((), asking(writable, COPY), COPY, False, id="a copy is had for the asking"),
        pytest.param((), asking(writable_userns, COPY), COPY, False, id="a copy is what hostUsers: false can write to"),
        pytest.param((), asking(read_only_userns, HARDLINK), HARDLINK, False, id="a farm asked for what it is for"),
        pytest.param(tuple(TITLES), asking(read_only, COPY), COPY, False, id="a copy needs nothing"),
        pytest.param(("loop",), dataclasses.replace(read_only, size_limit=LIMIT), REDIRECT, True, id="no limit"),
        pytest.param(
            ("idmap",),
            dataclasses.replace(asking(writable_userns, COPY), size_limit=LIMIT),
            COPY,
            False,
            id="a copy in a place of its own needs nothing of the data root's file system",
        ),
    ],
)
def test_the_choice(missing: tuple[str, ...], wish: Wish, presentation: Presentation, overlay: bool) -> None:
    choice = choose(node_without(*missing), wish)
    assert (choice.presentation, choice.overlay) == (presentation, overlay)


@pytest.mark.parametrize(
    ("missing", "wish", "code", "words"),
    [
        pytest.param(
            (), writable_userns, Code.INVALID_ARGUMENT, ["hostUsers: false", "presentation: copy", "read-only volume"],
            id="a writable volume for hostUsers: false names the way out",
        ),
        pytest.param(
            (), asking(writable_userns, HARDLINK), Code.INVALID_ARGUMENT, ["hostUsers: false", "presentation: copy"],
            id="a writable farm for hostUsers: false is no farm",
        ),
        pytest.param(
            (), asking(read_only_userns, REDIRECT), Code.INVALID_ARGUMENT, ["id-map overlays", "hardlink"],
            id="a redirect view for hostUsers: false is not changed into something else",
        ),
        pytest.param(
            ("stub_content",), asking(read_only, REDIRECT), Code.FAILED_PRECONDITION,
            ["because of stub_content", "presentation: hardlink", "presentation: copy"],
            id="a redirect view that the node cannot show names the property",
        ),
        pytest.param(
            ("hardlink",), read_only_userns, Code.FAILED_PRECONDITION, ["because of hardlink", "presentation: copy"],
            id="no farm without hard links",
        ),
        pytest.param(
            ("idmap",), read_only_userns, Code.FAILED_PRECONDITION, ["because of idmap"],
            id="nothing for hostUsers: false on a file system that cannot be id-mapped",
        ),
        pytest.param(
            ("idmap",), asking(writable_userns, COPY), Code.FAILED_PRECONDITION, ["because of idmap"],
            id="not even a copy",
        ),
        pytest.param(
            ("idmap_sized",), dataclasses.replace(asking(writable_userns, COPY), size_limit=LIMIT),
            Code.FAILED_PRECONDITION, ["because of idmap_sized"],
            id="nor one whose own place cannot be id-mapped",
        ),
        pytest.param(
            ("listing", "hardlink"), read_only, Code.FAILED_PRECONDITION,
            ["because of listing", "because of hardlink", "presentation: copy"],
            id="where nothing works every failing property is named",
        ),
        pytest.param(
            ("overlay_writable",), asking(writable, HARDLINK), Code.FAILED_PRECONDITION,
            ["because of overlay_writable", "presentation: redirect", "read-only volume"],
            id="a writable farm needs an overlay",
        ),
        pytest.param(
            ("loop",), dataclasses.replace(writable, size_limit=LIMIT), Code.FAILED_PRECONDITION,
            ["size limit", "because of loop"],
            id="a limit that cannot be kept is not dropped",
        ),
    ],
)  # fmt: skip
def test_the_refusal(missing: tuple[str, ...], wish: Wish, code: Code, words: list[str]) -> None:
    with pytest.raises(PresentationUnavailable) as refused:
        choose(node_without(*missing), wish)
    assert refused.value.code is code
    for word in words:
        assert word in refused.value.message


def test_a_fallback_is_explained_by_the_property_that_fails() -> None:
    assert choose(node_without(), read_only).reason == "the default"
    assert "because of stub_content" in choose(node_without("stub_content"), read_only).reason
    assert "hostUsers: false" in choose(node_without(), read_only_userns).reason


def outcome(probe: ProbeResult, wish: Wish) -> Choice | None:
    try:
        return choose(probe, wish)
    except PresentationUnavailable:
        return None


def test_the_whole_cross_product_of_wishes_and_single_failures_keeps_the_rules() -> None:
    """Every wish on every node on which at most two things do not work."""
    wishes = [
        Wish(*wish)
        for wish in itertools.product([False, True], [False, True], [None, *Presentation], [None, LIMIT])
    ]  # fmt: skip
    missing = [(), *itertools.combinations(TITLES, 1), *itertools.combinations(TITLES, 2)]
    for names, wish in itertools.product(missing, wishes):
        require_rules(set(names), wish)


@given(missing=st.sets(st.sampled_from(sorted(TITLES))), wish=wishes)
def test_any_node_keeps_the_rules(missing: set[str], wish: Wish) -> None:
    require_rules(missing, wish)


def require_rules(missing: set[str], wish: Wish) -> None:
    """The rules of VOLUMES.md, each by itself."""
    choice = outcome(node_without(*missing), wish)
    limit_kept = not (wish.writable and wish.size_limit) or "loop" not in missing
    if choice is None:
        # Refused only for a reason: something is missing, or the wish contradicts itself.
        assert missing or (not wish.host_users and (wish.writable or wish.asked is REDIRECT))
        if limit_kept and wish.host_users:
            assert wish.asked is not COPY
        return
    assert limit_kept
    assert choice.reason
    assert wish.asked in {None, choice.presentation}, "never something else than what was asked for"
    assert wish.asked is COPY or choice.presentation is not COPY, "never a cost that nobody asked for"
    assert not (choice.overlay and not wish.host_users), "an overlay cannot be id-mapped"
    own_place = wish.asked is COPY and wish.writable and wish.size_limit is not None
    assert wish.host_users or ("idmap_sized" if own_place else "idmap") not in missing
    if choice.presentation is HARDLINK:
        assert not wish.writable or wish.host_users, "never a farm that hostUsers: false could write to"
        assert not wish.writable or choice.overlay, "a farm is written to in an overlay only"
        assert "hardlink" not in missing
    if choice.presentation is REDIRECT:
        assert choice.overlay
        assert not missing & (WRITABLE_VIEW if wish.writable else READ_ONLY_VIEW)
    if choice.presentation is COPY:
        assert not choice.overlay


@given(probe=probes, wish=wishes)
def test_what_a_refusal_offers_can_be_had(probe: ProbeResult, wish: Wish) -> None:
    try:
        choose(probe, wish)
    except PresentationUnavailable as refused:
        for presentation in Presentation:
            if f"`presentation: {presentation.value}`" in refused.message:
                assert choose(probe, asking(wish, presentation)).presentation is presentation
        if "a read-only volume" in refused.message.partition("what this node can do")[2]:
            assert choose(probe, dataclasses.replace(wish, writable=False, asked=None))


def test_the_table_has_a_line_for_every_property_with_what_was_seen() -> None:
    names = {field.name for field in dataclasses.fields(ProbeResult)}
    assert set(TITLES) == names - {"kernel"}
    lines = table(node_without("loop")).splitlines()
    assert len(lines) == len(names)
    assert lines[0].split() == ["kernel", "6.18"]
    for (name, title), line in zip(TITLES.items(), lines[1:], strict=True):
        answer = "no" if name in {"loop", "reflink", "idmapped_overlay"} else "yes"
        assert line.startswith(title)
        assert line.removeprefix(title).split() == [answer, "because", "of", name]
