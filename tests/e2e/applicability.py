"""What of upstream's specs does not apply to this driver although no capability says so, and why.

Only specs of the kinds of volumes that there are: of any other kind, the suite itself leaves them out, and says why.
"""

from __future__ import annotations

from dataclasses import dataclass

OF_ITS_VOLUMES = r"\[Testpattern: Dynamic PV \((default fs|filesystem volmode)\)\].*"


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Specs that are left out by name."""

    claim: str
    """A part of their names, as a regular expression to Go and to Python."""
    reason: str

    @property
    def pattern(self) -> str:
        """It is found in the whole names of those specs only."""
        return OF_ITS_VOLUMES + self.claim


EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion(
        "should access to two volumes with the same volume mode and retain data across pod recreation",
        "What a pod has written goes with the pod, and here the suite does not ask for `persistence`.",
    ),
    Exclusion(
        "should concurrently access the single volume from pods on the same node",
        "Pods that share a claim write each for itself; the spec wants to read in one what another has written.",
    ),
    Exclusion(
        "should support existing directories when readOnly specified in the volumeSource",
        "Wants to find in a read-only volume what an earlier pod has written.",
    ),
    Exclusion(
        "should provision storage with any volume data source",
        "Installs populators of upstream's from the internet; claims with a data source are refused.",
    ),
    Exclusion(
        r"\[Disruptive\]",
        "Needs ssh to the nodes; what becomes of volumes when kubelet or a node fails is `make chaos`.",
    ),
)
