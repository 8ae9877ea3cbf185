"""Topology: which nodes a volume can be used on."""

from __future__ import annotations

from typing import Any

import pytest

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Code
from cknix_csi.api.topology import fitting, segments_of, systems_of, systems_of_expression

X86, ARM, RISCV = "x86_64-linux", "aarch64-linux", "riscv64-linux"
PATH = "/nix/store/" + "1" * 32 + "-hello"
RESULT = {"observedGeneration": 1, "results": [{"system": X86, "path": PATH}]}


@pytest.mark.parametrize(
    ("attributes", "of_expression", "systems"),
    [
        ({"storePath": PATH}, (), ()),
        ({X86: PATH}, (), (X86,)),
        ({ARM: PATH, X86: PATH}, (), (X86, ARM)),
        ({X86: PATH, "storePath": PATH}, (), ()),
        ({"expression": "a"}, (), ()),
        ({"expression": "a"}, (ARM,), (ARM,)),
        ({"expression": "a", X86: PATH}, (ARM,), (X86, ARM)),
        ({"expression": "a", X86: PATH}, (), ()),
    ],
)
def test_a_volume_runs_where_its_content_does(
    attributes: dict[str, str], of_expression: tuple[str, ...], systems: tuple[str, ...]
) -> None:
    assert systems_of(attributes, of_expression) == systems


@pytest.mark.parametrize(
    ("body", "systems"),
    [
        ({"spec": {"systems": [ARM, X86]}}, (X86, ARM)),
        ({"spec": {"systems": [ARM]}, "status": RESULT}, (ARM,)),
        ({"spec": {"systems": [ARM, X86]}, "status": {**RESULT, "phase": "Succeeded"}}, (X86,)),
        ({"spec": {"systems": [ARM]}, "status": {**RESULT, "phase": "Failed"}}, (ARM,)),
        (
            {"metadata": {"generation": 2}, "spec": {"systems": [ARM]}, "status": {**RESULT, "phase": "Succeeded"}},
            (ARM,),
        ),
        ({"spec": {}, "status": RESULT}, (X86,)),
        ({"spec": {"systems": []}}, ()),
        ({}, ()),
    ],
)
def test_an_expression_runs_where_it_has_been_built_for_or_will_be(
    body: dict[str, Any], systems: tuple[str, ...]
) -> None:
    assert systems_of_expression(body) == systems


def test_what_is_asked_for_first_comes_first() -> None:
    nodes = [segments_of(X86), segments_of(ARM)]
    assert fitting((X86, ARM), nodes, [segments_of(ARM), segments_of(X86)]) == (ARM, X86)
    assert fitting((X86, ARM, RISCV), nodes, []) == (X86, ARM)
    assert fitting((X86, ARM), [], []) == (X86, ARM)


def test_what_can_run_anywhere_fits_everything() -> None:
    assert fitting((), [segments_of(X86)], [segments_of(X86)]) == ()


def test_a_place_that_does_not_tell_its_system_may_be_any() -> None:
    assert fitting((ARM,), [{"example.com/zone": "a"}], []) == (ARM,)


def test_no_node_that_fits_is_told_with_what_there_is() -> None:
    with pytest.raises(CknixError) as raised:
        fitting((ARM, RISCV), [segments_of(X86)], [])
    assert raised.value.code is Code.RESOURCE_EXHAUSTED
    assert raised.value.message.startswith(
        "the volume can run on aarch64-linux, riscv64-linux only, and the nodes that are allowed for it are x86_64"
    )
