"""Claims: what class and annotation say together, and every mistake with the words its author reads."""

from __future__ import annotations

import pytest

from cknix_csi.api.claims import Claim, volume_attributes
from cknix_csi.api.errors import Invalid

HELLO = "/nix/store/" + "1" * 32 + "-hello"
ADDED = {
    "csi.storage.k8s.io/pvc/name": "data",
    "csi.storage.k8s.io/pvc/namespace": "team",
    "csi.storage.k8s.io/pv/name": "pvc-1",
}
WORD = "cknix.cool/expression"


def problems(parameters: dict[str, str], annotations: dict[str, str] | None = None, requested: int = 0) -> list[str]:
    with pytest.raises(Invalid) as raised:
        volume_attributes(parameters, annotations or {}, requested=requested)
    return [str(problem) for problem in raised.value.problems]


@pytest.mark.parametrize(
    "parameters",
    [
        {"expression": "hello"},
        {"storePath": HELLO},
        {"x86_64-linux": HELLO, "aarch64-linux": HELLO},
        {"riscv64-linux": HELLO, "expression": "hello"},
        {"expression": "hello", "sizeLimit": "1Gi", "medium": "Memory"},
        {"expression": "hello", "presentation": "copy"},
    ],
)
def test_parameters_become_the_volumes_attributes(parameters: dict[str, str]) -> None:
    assert volume_attributes({**parameters, **ADDED}, {}, requested=5) == parameters


def test_the_annotation_comes_before_every_source_of_the_class_and_leaves_its_options() -> None:
    parameters = {"storePath": HELLO, "x86_64-linux": HELLO, "sizeLimit": "1Gi"}
    assert volume_attributes(parameters, {WORD: "mine"}, requested=5) == {"expression": "mine", "sizeLimit": "1Gi"}
    assert volume_attributes({}, {WORD: "mine", "other.example/x": ""}, requested=5) == {"expression": "mine"}


def test_the_size_limit_is_what_the_claim_asks_for_only_where_the_class_says_so() -> None:
    given = volume_attributes({"expression": "hello", "sizeLimit": "claim"}, {}, requested=3 << 30)
    assert given == {"expression": "hello", "sizeLimit": "3Gi"}


def test_every_problem_is_named_at_once() -> None:
    assert problems({"expresion": "x", "sizeLimit": "10GB", "presentation": "copi"}, {"cknix.cool/expr": "x"}) == [
        'StorageClass parameter "expresion": is not known; did you mean "expression"?',
        'annotation "cknix.cool/expr": is not known on a claim; did you mean "cknix.cool/expression"?',
        'StorageClass parameters: no source given; set "expression", or the annotation "cknix.cool/expression" on the '
        "claim",
        "StorageClass parameter \"sizeLimit\": '10GB' is not an amount of bytes; write for example 10Gi, 500Mi, 1.5G "
        "or 1e9; did you mean 10G?",
        "StorageClass parameter \"presentation\": 'copi' is not known; did you mean copy?",
    ]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"expression": "a", "storePath": HELLO}, 'parameter "expression": cannot stand beside "storePath"'),
        ({"expression": "Hello"}, "parameter \"expression\": 'Hello' is not the name of an Expression"),
        ({"expression": ""}, 'parameter "expression": is empty'),
        ({"x86_64-linux": "/nix/store/x"}, "parameter \"x86_64-linux\": '/nix/store/x' is not a store path"),
        ({"expression": "a", "namespace": "b"}, 'parameter "namespace": has no meaning in a class'),
        ({"expr": "1"}, 'parameter "expr": is Nix text, which a class cannot hold'),
        ({"flakeRef": "x"}, 'parameter "flakeRef": is a flake, which a class cannot name'),
        ({"expression": "a", "medium": "Memory"}, 'parameter "medium": needs "sizeLimit" beside it'),
        (
            {"expression": "a", "sizeLimit": "claim"},
            'parameter "sizeLimit": is "claim", and the claim asks for no size',
        ),
        ({"expression": "a", "zzz": "b"}, 'parameter "zzz": is not known; known are expression, storePath'),
    ],
)
def test_a_class_that_no_node_could_serve_is_refused(parameters: dict[str, str], words: str) -> None:
    assert problems(parameters)[0].startswith(f"StorageClass {words}")


def test_a_claim_may_be_too_large_for_a_limit() -> None:
    asked = {"expression": "a", "sizeLimit": "claim"}
    assert problems(asked, requested=5 << 40) == [
        'StorageClass parameter "sizeLimit": 5Ti is too large; the limit is from 1Mi to 1Ti'
    ]


def test_a_bad_annotation_is_told_as_one() -> None:
    assert problems({"expression": "good"}, {WORD: "a/b"}) == [
        f"annotation \"{WORD}\": 'a/b' is not the name of an Expression: lower-case letters, digits, '-' and '.' "
        "(an Expression of another namespace cannot be named)"
    ]


def test_the_claim_is_the_one_that_the_provisioner_names() -> None:
    assert Claim.parse(ADDED) == Claim("team", "data")
    assert Claim.parse({}) is None


def test_a_class_cannot_say_too_much() -> None:
    assert problems({f"expression{number}": "x" for number in range(65)}) == [
        "StorageClass parameters: are 65, and at most 64 can be given"
    ]
    assert problems({"sizeLimit": "1" * 5000}) == [
        'StorageClass parameter "sizeLimit": has 5000 characters, and at most 4096 can be given'
    ]
