"""Kubernetes conditions: the ``metav1.Condition`` algebra as pure functions on lists of dictionaries.

``lastTransitionTime`` moves only when ``status`` flips (Kubernetes API conventions, "Typical status properties").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

Condition = dict[str, Any]
Status = Literal["True", "False", "Unknown"]

MAX_MESSAGE = 32_768


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with whole seconds, as ``metav1.Time`` is written."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def find(conditions: Iterable[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """The condition of type *kind*, or None."""
    return next((condition for condition in conditions if condition.get("type") == kind), None)


def is_true(conditions: Iterable[Mapping[str, Any]], kind: str) -> bool:
    condition = find(conditions, kind)
    return condition is not None and condition.get("status") == "True"


def with_condition(
    conditions: Sequence[Mapping[str, Any]],
    kind: str,
    status: Status,
    *,
    reason: str,
    message: str,
    generation: int,
    now: datetime,
) -> list[Condition]:
    """*conditions* with the one of type *kind* set; its transition time stays unless *status* changes."""
    before = find(conditions, kind) or {}
    since = before.get("lastTransitionTime") if before.get("status") == status else None
    new: Condition = {
        "type": kind,
        "status": status,
        "observedGeneration": generation,
        "lastTransitionTime": since or timestamp(now),
        "reason": reason,
        "message": message[:MAX_MESSAGE],
    }
    if not before:
        return [*(dict(condition) for condition in conditions), new]
    return [new if condition.get("type") == kind else dict(condition) for condition in conditions]
