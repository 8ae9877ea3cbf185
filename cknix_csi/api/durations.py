"""Durations as people write them in Kubernetes objects: ``90s``, ``1h``, ``1h30m``."""

from __future__ import annotations

import re

PATTERN = r"([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?"
"""The same grammar as in the CRD's schema (there anchored, and not empty)."""

_DURATION = re.compile(r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
_SECONDS = (86400, 3600, 60, 1)


def parse_duration(text: str) -> int:
    """Seconds in *text*.  Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        raise ValueError(f"{text!r} is not a duration; write for example 90s, 15m, 1h or 1h30m")
    return sum(int(count) * unit for count, unit in zip(match.groups(), _SECONDS, strict=True) if count)
