"""Topology: on which nodes a volume can be used, as far as that depends on their Nix system.

Rules: CSI specification, "TopologyRequirement" and "Volume.accessible_topology".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cknix_csi.api.attributes import EXPRESSION, STORE_PATH
from cknix_csi.api.errors import CknixError
from cknix_csi.api.expression import GROUP, SUCCEEDED, Observed
from cknix_csi.api.situations import Situation
from cknix_csi.api.systems import KNOWN_SYSTEMS

SYSTEM_KEY = f"{GROUP}/system"
"""Topology key, and so label of nodes; its value is the node's Nix system."""

Segments = Mapping[str, str]
"""Values by topology key, of one node or more."""


def segments_of(system: str) -> dict[str, str]:
    """Where a node of *system* is."""
    return {SYSTEM_KEY: system}


def systems_of_expression(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The systems an Expression object has results for, or will have; none as long as nobody knows.

    Once its newest generation has succeeded, its results tell, since what cannot be built for is left out; before, what
    it names.
    """
    observed = Observed.parse(body)
    if observed.results and observed.phase == SUCCEEDED and observed.observed_generation >= observed.generation:
        return _in_order(observed.results)
    spec = body.get("spec")
    named = spec.get("systems") if isinstance(spec, Mapping) else None
    return _in_order(named if isinstance(named, list) and named else observed.results)


def systems_of(attributes: Mapping[str, str], of_expression: Sequence[str]) -> tuple[str, ...]:
    """The systems whose nodes can run a volume of *attributes*; none: any node may be able to.

    *of_expression* are those of the Expression that *attributes* name.
    """
    if STORE_PATH in attributes or (EXPRESSION in attributes and not of_expression):
        return ()
    return _in_order([*(key for key in attributes if key in KNOWN_SYSTEMS), *of_expression])


def fitting(systems: Sequence[str], requisite: Sequence[Segments], preferred: Sequence[Segments]) -> tuple[str, ...]:
    """Those of *systems* that *requisite* allows, in the order of *preferred*.

    *systems* may be none, which means any node; no *requisite* allows all.  Raises :class:`CknixError` with
    RESOURCE_EXHAUSTED when none is left.
    """
    allowed = {segments.get(SYSTEM_KEY) for segments in requisite}
    fits = [system for system in systems if not allowed or system in allowed or None in allowed]
    if systems and not fits:
        raise CknixError(
            f"the volume can run on {', '.join(systems)} only, and the nodes that are allowed for it are "
            f"{', '.join(sorted(map(str, allowed)))}; add their system to the Expression's spec.systems, "
            "or allow other nodes",
            Situation.NO_FITTING_NODE,
        )
    wanted = [segments.get(SYSTEM_KEY) for segments in preferred]
    return tuple(sorted(fits, key=lambda system: wanted.index(system) if system in wanted else len(wanted)))


def _in_order(systems: Iterable[Any]) -> tuple[str, ...]:
    found = set(systems)
    return tuple(system for system in KNOWN_SYSTEMS if system in found)
