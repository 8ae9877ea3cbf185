"""Volume attributes: how much a volume may hold, and what it is made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.attributes import parse_source
from cknix_csi.api.errors import Invalid
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.options import VolumeOptions, parse_options
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.situations import Code

GIB = 1 << 30
POD = {"csi.storage.k8s.io/pod.name": "web-0", "csi.storage.k8s.io/pod.namespace": "shop"}
INLINE = {**POD, "csi.storage.k8s.io/ephemeral": "true"}
PERSISTENT = {**POD, "csi.storage.k8s.io/ephemeral": "false"}
READ_ONLY = "is about what is written, and this volume is read-only; remove it, or readOnly: true"


def problems(attributes: dict[str, str], *, writable: bool = True) -> list[str]:
    with pytest.raises(Invalid) as caught:
        parse_options({**INLINE, **attributes}, writable=writable)
    assert caught.value.code is Code.INVALID_ARGUMENT
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("attributes", "limit"),
    [
        ({}, None),
        ({"expression": "hello"}, None),
        ({"medium": ""}, None),
        ({"sizeLimit": "1Gi"}, Limit(GIB)),
        ({"sizeLimit": "1G"}, Limit(10**9)),
        ({"sizeLimit": " 1Gi\n"}, Limit(GIB)),
        ({"sizeLimit": "1Gi", "medium": ""}, Limit(GIB)),
        ({"sizeLimit": "1Gi", "medium": "Disk"}, Limit(GIB)),
        ({"sizeLimit": "1Gi", "medium": "Memory"}, Limit(GIB, Medium.MEMORY)),
    ],
)
def test_a_limit_is_read(attributes: dict[str, str], limit: Limit | None) -> None:
    assert parse_options({**INLINE, **attributes}, writable=True) == VolumeOptions(limit)
    parse_source({**INLINE, "expression": "hello", **attributes}, system="x86_64-linux")


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        (
            {"sizeLimit": "10GB"},
            "volume attribute \"sizeLimit\": '10GB' is not an amount of bytes; write for example 10Gi, 500Mi, 1.5G or "
            "1e9; did you mean 10G?",
        ),
        ({"sizeLimit": "1Ki"}, 'volume attribute "sizeLimit": 1Ki is too small; the limit is from 1Mi to 1Ti'),
        ({"sizeLimit": "2Ti"}, 'volume attribute "sizeLimit": 2Ti is too large; the limit is from 1Mi to 1Ti'),
        ({"medium": "Memory"}, 'volume attribute "medium": needs "sizeLimit" beside it; add it, for example 1Gi'),
        ({"medium": "Disk"}, 'volume attribute "medium": needs "sizeLimit" beside it; add it, for example 1Gi'),
        (
            {"sizeLimit": "1Gi", "medium": "memory"},
            "volume attribute \"medium\": 'memory' is not known; did you mean Memory?",
        ),
        (
            {"sizeLimit": "1Gi", "medium": "HugePages-2Mi"},
            "volume attribute \"medium\": 'HugePages-2Mi' is not known; known are Disk, Memory",
        ),
        (
            {"presentation": "hard-link"},
            "volume attribute \"presentation\": 'hard-link' is not known; did you mean hardlink?",
        ),
        (
            {"presentation": "bind"},
            "volume attribute \"presentation\": 'bind' is not known; known are redirect, hardlink, copy",
        ),
    ],
)
def test_a_bad_limit_is_refused_with_its_reason(attributes: dict[str, str], problem: str) -> None:
    assert problems(attributes) == [problem]


def test_all_problems_are_told_at_once() -> None:
    assert [problem.split(":")[0] for problem in problems({"sizeLimit": "x", "medium": "y"}, writable=False)] == [
        'volume attribute "medium"',
        'volume attribute "sizeLimit"',
        'volume attribute "sizeLimit"',
        'volume attribute "medium"',
    ]


def test_a_limit_of_a_read_only_volume_is_refused() -> None:
    assert problems({"sizeLimit": "1Gi", "medium": "Memory"}, writable=False) == [
        f'volume attribute "sizeLimit": {READ_ONLY}',
        f'volume attribute "medium": {READ_ONLY}',
    ]


def test_a_limit_of_a_persistent_volume_is_for_those_of_its_pods_that_write() -> None:
    context = {**PERSISTENT, "sizeLimit": "1Gi"}
    assert parse_options(context, writable=False) == VolumeOptions(None)
    assert parse_options(context, writable=True) == VolumeOptions(Limit(GIB))


@pytest.mark.parametrize("presentation", Presentation)
@pytest.mark.parametrize("writable", [False, True])
def test_a_presentation_is_read_for_every_volume(presentation: Presentation, writable: bool) -> None:
    context = {**INLINE, "presentation": presentation.value}
    assert parse_options(context, writable=writable) == VolumeOptions(presentation=presentation)
    parse_source({**context, "expression": "hello"}, system="x86_64-linux")


@given(st.text(max_size=20), st.text(max_size=10), st.booleans())
def test_any_values_give_options_or_problems_that_name_their_attribute(size: str, medium: str, writable: bool) -> None:
    try:
        options = parse_options({**INLINE, "sizeLimit": size, "medium": medium}, writable=writable)
    except Invalid as error:
        assert all(problem.field.startswith('volume attribute "') for problem in error.problems)
    else:
        assert options.limit is None or writable


def test_a_copy_is_never_in_memory() -> None:
    (problem,) = problems({"sizeLimit": "1Gi", "medium": "Memory", "presentation": "copy"}, writable=True)
    assert problem.startswith('volume attribute "medium": cannot be Memory beside "presentation: copy": ')
