"""``cknix-csi volumes``: what is published on this node, as its daemon has noted it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cknix_csi.settings import run_settings
from cknix_csi.volumes.ledger import FILE, Published, read_published

_HEADINGS = ("since", "pod", "closure", "made as", "target")


def run(environment: Mapping[str, str], data_root: Path | None, *, as_json: bool) -> int:
    """Print every volume, the oldest first; returns 0.

    Raises :class:`Invalid` for bad settings, and LedgerUnreadable.
    """
    root = run_settings(environment, data_root.resolve() if data_root else None).data_root
    published = sorted(read_published(root / FILE), key=lambda entry: (entry.published_at, entry.target))
    print(_json(published) if as_json else _text(published), end="")
    return 0


def _text(published: Sequence[Published]) -> str:
    rows = [_HEADINGS, *((_time(entry, "%Y-%m-%d %H:%M:%SZ"), *_words(entry)) for entry in published)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def _words(entry: Published) -> tuple[str, str, str, str]:
    pod = f"{entry.pod_namespace}/{entry.pod_name}" if entry.pod_name else entry.pod_uid or "unknown"
    made = " ".join(filter(None, (entry.presentation, "writable" if entry.writable else "read-only")))
    return pod, entry.closure_id, made, entry.target.encode(errors="backslashreplace").decode()


def _json(published: Sequence[Published]) -> str:
    told = [
        {
            "since": _time(entry, "%Y-%m-%dT%H:%M:%SZ"),
            "pod": {"namespace": entry.pod_namespace, "name": entry.pod_name, "uid": entry.pod_uid},
            "closure": entry.closure_id,
            "writable": entry.writable,
            "presentation": entry.presentation,
            "volumeId": entry.volume_id,
            "target": entry.target,
        }
        for entry in published
    ]
    return json.dumps(told, indent=2) + "\n"


def _time(entry: Published, form: str) -> str:
    return datetime.fromtimestamp(entry.published_at, UTC).strftime(form)
