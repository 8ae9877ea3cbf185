"""Size limits: what can be made, and what a node gives."""

import pytest

from cknix_csi.api.errors import Invalid
from cknix_csi.api.limits import MAXIMUM_BYTES, MINIMUM_BYTES, Limit, Medium, SizePolicy
from cknix_csi.api.situations import Code

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        (MINIMUM_BYTES - 1, "1048575 is too small; the limit is from 1Mi to 1Ti"),
        (4096, "4Ki is too small"),
        (MAXIMUM_BYTES + 1, "is too large; the limit is from 1Mi to 1Ti"),
    ],
)
def test_a_limit_that_cannot_be_had_names_what_can(amount: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Limit(amount)
    assert str(Limit(MINIMUM_BYTES)) == "1Mi on disk"
    assert str(Limit(MAXIMUM_BYTES, Medium.MEMORY)) == "1Ti in memory"


def test_a_limit_is_made_in_whole_blocks_of_4096() -> None:
    assert Limit(10_000_000).whole() == Limit(2441 * 4096)
    assert Limit(MIB, Medium.MEMORY).whole() == Limit(MIB, Medium.MEMORY)


@pytest.mark.parametrize(
    ("policy", "asked", "given"),
    [
        (SizePolicy(), None, None),
        (SizePolicy(), Limit(GIB), Limit(GIB)),
        (SizePolicy(default=GIB), None, Limit(GIB)),
        (SizePolicy(default=GIB), Limit(2 * GIB), Limit(2 * GIB)),
        (SizePolicy(default=GIB), Limit(MIB, Medium.MEMORY), Limit(MIB, Medium.MEMORY)),
        (SizePolicy(maximum=GIB), None, Limit(GIB)),
        (SizePolicy(default=MIB, maximum=GIB), None, Limit(MIB)),
        (SizePolicy(maximum=GIB), Limit(GIB, Medium.MEMORY), Limit(GIB, Medium.MEMORY)),
    ],
)
def test_a_node_gives_what_is_asked_for_else_its_default_else_its_maximum(
    policy: SizePolicy, asked: Limit | None, given: Limit | None
) -> None:
    assert policy.limit(asked) == given


def test_more_than_the_nodes_maximum_is_refused_naming_both() -> None:
    with pytest.raises(Invalid) as refused:
        SizePolicy(default=MIB, maximum=GIB).limit(Limit(10 * GIB))
    assert refused.value.code is Code.INVALID_ARGUMENT
    assert str(refused.value) == (
        'volume attribute "sizeLimit": 10Gi is more than the 1Gi that this node gives a volume '
        "(CKNIX_SIZE_LIMIT_MAX); ask for no more"
    )
