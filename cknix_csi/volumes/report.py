"""What a reconciliation found and did, for the log and for `describe`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class ReconcileReport:
    """Closure ids, and paths of volumes' directories."""

    adopted: list[str] = field(default_factory=list)
    """Closures that volumes show."""
    views_removed: list[str] = field(default_factory=list)
    """Closures whose view nobody used."""
    roots_released: list[str] = field(default_factory=list)
    """Closures that had a GC root but neither view nor user."""
    roots_taken: list[str] = field(default_factory=list)
    """Closures in use whose GC root was missing."""
    volumes_removed: list[str] = field(default_factory=list)
    """Written data without a mount."""
    warm: list[str] = field(default_factory=list)
    """Closures that nobody uses, and whose view is kept for a while."""
    half_built: int = 0
    """Views whose building was cut short."""
    problems: list[str] = field(default_factory=list)
    """What could not be put right, and why; left as it was."""

    def words(self) -> list[str]:
        """One sentence for each kind of thing that was found; one in all when there was nothing."""
        lines = [
            _line("adopted", self.adopted, "closure in use", "closures in use"),
            _line("removed", self.views_removed, "view nobody uses", "views nobody uses"),
            _line("released", self.roots_released, "GC root without a view", "GC roots without a view"),
            _line("took", self.roots_taken, "GC root that was missing", "GC roots that were missing"),
            _line("removed the data of", self.volumes_removed, "unmounted volume", "unmounted volumes"),
            _line("kept", self.warm, "view for a while that nobody uses", "views for a while that nobody uses"),
            f"removed {self.half_built} half-built view(s)" if self.half_built else "",
        ]
        return [line for line in lines if line] or ["nothing published, nothing to clean up"]


def _line(verb: str, items: list[str], one: str, many: str) -> str:
    if not items:
        return ""
    return f"{verb} {len(items)} {one if len(items) == 1 else many}: {', '.join(items)}"
