"""What the state of an Expression means for a volume that waits for it."""

import pytest

from cknix_csi.api.errors import CknixError
from cknix_csi.api.expression import FAILED, PENDING, RUNNING, SUCCEEDED, Observed
from cknix_csi.api.situations import Code
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.resolve import settle

SYSTEM = "x86_64-linux"
HELLO = StorePath.parse("/nix/store/" + "1" * 32 + "-hello")


def observed(phase: str, *systems: str, generation: int = 4, seen: int = 4, message: str = "") -> Observed:
    return Observed(
        namespace="default",
        name="hello",
        uid="u",
        generation=generation,
        observed_generation=seen,
        phase=phase,
        message=message,
        results=dict.fromkeys(systems, HELLO),
        ready=bool(systems),
    )


@pytest.mark.parametrize("phase", [PENDING, RUNNING, SUCCEEDED, FAILED])
def test_a_good_result_counts_whatever_has_become_of_a_newer_generation(phase: str) -> None:
    assert settle(observed(phase, SYSTEM, "aarch64-linux", generation=5), SYSTEM) == HELLO


@pytest.mark.parametrize(
    "state",
    [
        observed(PENDING),
        observed(RUNNING),
        observed(RUNNING, "aarch64-linux"),
        observed(FAILED, generation=5, seen=4, message="of the generation before"),
        observed(SUCCEEDED, "aarch64-linux", generation=5, seen=4),
    ],
    ids=["pending", "running", "other system ready", "failed before the fix", "system just added"],
)
def test_a_result_that_may_still_come_is_waited_for(state: Observed) -> None:
    assert settle(state, SYSTEM) is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            observed(FAILED, message="attribute 'helo' missing, at expr:1:25"),
            "Expression default/hello failed (generation 4): attribute 'helo' missing, at expr:1:25",
        ),
        (observed(FAILED), "Expression default/hello failed (generation 4): no message"),
        (
            observed(SUCCEEDED, "riscv64-linux", "aarch64-linux"),
            "Expression default/hello has no result for this node's system x86_64-linux, only for aarch64-linux, "
            "riscv64-linux; add the system to spec.systems, or run the pod on another node",
        ),
    ],
    ids=["failed", "failed without words", "other systems"],
)
def test_a_result_that_will_not_come_is_an_error_that_says_why(state: Observed, message: str) -> None:
    with pytest.raises(CknixError) as raised:
        settle(state, SYSTEM)
    assert raised.value.message == message
    assert raised.value.code is Code.FAILED_PRECONDITION
