"""How far a build or a fetch has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of derivations and downloads; *building* names what is worked on now (bounded by the producer)."""

    done: int = 0
    expected: int = 0
    building: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = ", ".join(self.building)
        if not self.expected:
            return named or "starting"
        counts = f"{self.done} of {self.expected}"
        return f"{counts} ({named})" if named else counts


def humanise(seconds: float) -> str:
    """``2m10s``, as in ``kubectl get``'s AGE column."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{whole % 60}s" if minutes else f"{whole}s"
