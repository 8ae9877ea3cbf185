"""The log of this program: how its lines look, and what the work at hand is about.

Code that logs does not know for whom it works: a fetch, a view and a mount are the same for every pod.  So what is
known of the work (pod, volume, closure) is kept in a context variable, which tasks and threads inherit, and every line
carries it.  Nothing secret may be put there.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

TEXT = "text"
JSON = "json"
FORMATS = (TEXT, JSON)

_ORDER = ("pod", "pod_uid", "volume", "volume_id", "closure")
_LONGEST = 256
_PLAIN = re.compile(r"[^\s\"=\[\]\x00-\x1f\x7f]+")
# All of C0 and C1 but tab and newline, and what turns the direction of text round.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_work: ContextVar[dict[str, str] | None] = ContextVar("cknix_csi.logs.work", default=None)


@contextmanager
def about(fields: Mapping[str, str]) -> Iterator[None]:
    """Lines logged in the block, and in tasks begun there, carry *fields* and no others; empty ones are left out."""
    token = _work.set({})
    note(**fields)
    try:
        yield
    finally:
        _work.reset(token)


def note(**fields: str) -> None:
    """Add to what the work at hand is about, for all tasks that share it; without :func:`about` there is none."""
    work = _work.get()
    if work is not None:
        work.update({name: value[:_LONGEST] for name, value in fields.items() if value})


def fields() -> dict[str, str]:
    """A copy of what the work at hand is about."""
    return dict(_work.get() or {})


def set_up(level: str, form: str) -> None:
    """Log to stderr from *level* on; *form* is one of :data:`FORMATS`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == JSON else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """``2026-11-21 12:00:00,123 INFO cknix_csi.csi.publisher: unmounted … [pod=default/web volume=nix]``.

    A message is one line, whatever is in it; only a traceback behind it has more.  What a terminal would obey is
    written as Python does, since pods choose some of the words.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        known = _fields_of(record)
        if "pod" in known:
            known.pop("pod_uid", None)  # for people a name is enough
        names = sorted(known, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
        told = " ".join(f"{name}={_quoted(known[name])}" for name in names)
        line = " | ".join(filter(None, map(str.strip, super().formatMessage(record).splitlines())))
        return f"{line} [{told}]" if told else line


class JsonFormatter(logging.Formatter):
    """One object per line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, then what the work is about.

    An exception's traceback is in ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in _fields_of(record).items() if name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields_of(record: logging.LogRecord) -> dict[str, str]:
    known = fields()
    # What kopf knows of the object a line of its own is about.
    reference = getattr(record, "k8s_ref", None)
    if isinstance(reference, Mapping) and reference.get("name"):
        namespace, name = reference.get("namespace"), reference["name"]
        known["object"] = f"{namespace}/{name}" if namespace else str(name)
    return known


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value)
