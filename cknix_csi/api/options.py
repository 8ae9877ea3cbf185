"""What a volume's attributes ask for besides its closure: how much it may hold, and what it is made of.

``sizeLimit`` and ``medium`` are the words of Kubernetes' emptyDir and mean the same here.  A medium without a limit is
refused: how much memory a pod may fill is for its author to say, on every node alike.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from cknix_csi.api.attributes import MEDIUM, PRESENTATION, SIZE_LIMIT, PodInfo, named
from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.quantity import parse_quantity
from cknix_csi.api.suggest import nearest

E = TypeVar("E", bound=enum.Enum)


@dataclass(frozen=True, slots=True)
class VolumeOptions:
    """What a volume asks for; None: whatever the node gives."""

    limit: Limit | None = None
    presentation: Presentation | None = None


NOTHING = VolumeOptions()
"""What a volume asks for that says no word about it."""


def parse_options(context: Mapping[str, str], *, writable: bool) -> VolumeOptions:
    """What the attributes in *context* ask for, of a volume that is *writable* or not.

    Raises :class:`Invalid` with every problem found, but for those that ``parse_source`` finds: unknown and empty ones.
    """
    problems: list[Problem] = []
    limit = _limit(context, problems)
    presentation = _one_of(Presentation, PRESENTATION, context, problems)
    # A PersistentVolume's limit is for those of its pods that write.
    if not writable and PodInfo.parse(context).ephemeral is not False:
        problems += [
            Problem(named(key), "is about what is written, and this volume is read-only; remove it, or readOnly: true")
            for key in (SIZE_LIMIT, MEDIUM)
            if context.get(key, "").strip()
        ]
    if presentation is Presentation.COPY and limit is not None and limit.medium is Medium.MEMORY:
        why = "the driver makes the copy, and its memory would be charged to the driver and not to the pod"
        problems.append(Problem(named(MEDIUM), f'cannot be Memory beside "{PRESENTATION}: copy": {why}; remove it'))
    if problems:
        raise Invalid(problems)
    return VolumeOptions(limit=limit if writable else None, presentation=presentation)


def _limit(context: Mapping[str, str], problems: list[Problem]) -> Limit | None:
    size = context.get(SIZE_LIMIT, "").strip()
    medium = _one_of(Medium, MEDIUM, context, problems) or Medium.DISK
    if not size:
        if context.get(MEDIUM, "").strip():
            problems.append(Problem(named(MEDIUM), f'needs "{SIZE_LIMIT}" beside it; add it, for example 1Gi'))
        return None
    try:
        return Limit(parse_quantity(size), medium)
    except ValueError as error:
        problems.append(Problem(named(SIZE_LIMIT), str(error)))
        return None


def _one_of(kind: type[E], key: str, context: Mapping[str, str], problems: list[Problem]) -> E | None:
    """The member of *kind* that attribute *key* names; None when it names none, or nothing."""
    text = context.get(key, "").strip()
    try:
        return kind(text) if text else None
    except ValueError:
        words = [str(member.value) for member in kind]
        guess = nearest(text, words)
        hint = f"did you mean {guess}?" if guess else f"known are {', '.join(words)}"
        problems.append(Problem(named(key), f"{text!r} is not known; {hint}"))
        return None
