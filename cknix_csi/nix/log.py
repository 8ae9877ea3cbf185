"""Nix's ``--log-format internal-json``: progress while it runs, then what explains a failure.

Numbers of activities and results are those of Nix's logging.hh, the same from 2.8 to 2.34.  Builders can write lines of
this format too (Nix passes on a part of them), so nothing here may rely on a line being well formed.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import STORE_DIR

MAX_TAIL_LINES = 30
MAX_TAIL_CHARACTERS = 3 * 1024
MAX_NAMED = 4
MAX_HEADLINE_CHARACTERS = 400
# The activities whose lines and names are kept, and the length of such a line.
_MAX_ACTIVITIES = 256
_MAX_LINE_CHARACTERS = 1024

_PREFIX = b"@nix "
# Behind the unfinished line of another program, such as git's progress.
_EVENT = b'@nix {"action":'
_ACT_COPY_PATHS = 103
_ACT_BUILDS = 104
_ACT_BUILD = 105
_ACT_SUBSTITUTE = 108
_RES_BUILD_LOG_LINE = 101
_RES_PROGRESS = 105
_LEVEL_ERROR = 0
_LEVEL_WARNING = 1

# CSI, OSC (ended by BEL or ST) and two-character sequences (ECMA-48).
_ANSI = re.compile(r"\x1b(?:\[[0-9;:?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_LINE_END = re.compile(r"\r+(?=\n|\Z)")
# Control, format (such as direction overrides) and surrogate characters.
_UNPRINTABLE = {"Cc", "Cf", "Cs"}
_STORE_NAME = re.compile(rf"{STORE_DIR}/[0-9a-z]{{32}}-([0-9A-Za-z+\-._?=]+)")
# An error message whose line was cut: the keys of an event are in alphabetical order.
_CUT_ERROR = re.compile(r'\{"action":"msg",.*?"level":0,.*?"msg":"(?P<text>(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*)')

# An error of Nix 2.8's own preparations for a builder: serialised for its parent, which takes it for a line of the log.
_SERIALISED = re.compile(r"\x05\0{7}Error\0{3}.{8}\x05\0{7}Error\0{3}.{8}(?P<said>[^\0]*)", re.DOTALL)
_ERROR = re.compile(r"\s*error: *(?P<said>\S.*)")
_NO_ERROR = re.compile("warning: |disabling binary cache ")
"""What Nix says at the level of errors and is none."""
_PLACE = re.compile(r"at (?P<place>\S.*:\d+:\d+):")
_FAILED_BUILDER = re.compile(r"builder for '.*' failed with |Cannot build '.*'.*: builder failed ")
# What only follows from another failure, or from being stopped.
_CONSEQUENCE = re.compile(
    r"\d+ dependenc(?:y|ies) |Cannot build '.*': \d+ dependenc(?:y|ies) |build of '.*' failed|interrupted by the user"
    r"|some substitutes for "
)
_CUT = "[…]"


def plain(text: str) -> str:
    """*text* without terminal escapes and other unprintable characters except newlines and tabs.

    A carriage return within a line, where a terminal would write over it, begins a new one.
    """
    text = _LINE_END.sub("", _ANSI.sub("", text)).replace("\r", "\n")
    return "".join(
        character for character in text if character in "\n\t" or unicodedata.category(character) not in _UNPRINTABLE
    )


def headline(log: str) -> str:
    """The one line of *log* that a person wants to read first, in at most :data:`MAX_HEADLINE_CHARACTERS` characters.

    *log* is the message of a failed command, as :attr:`Log.failure` gives it: Nix's errors, behind the builder's lines
    if a build failed.  Of several errors it is the one that the others follow from, of a trace the innermost; with it
    come the place of an evaluation error, the hashes of a mismatch, and what a failed builder said last.  Text without
    an error of Nix's, such as a message of this program's own, gives its first line; no text gives none.
    """
    lines = plain(log).splitlines()
    # Nix writes its errors last and indents whatever continues one.
    begin = len(lines)
    errors: list[tuple[int, list[str]]] = []
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("error:"):
            errors.insert(0, (index, lines[index:begin]))
            begin = index
        elif lines[index].strip() and not _continues(lines, index):
            break
    told = [(index, error, _summary(error)) for index, error in errors]
    for index, error, summary in told:
        if _FAILED_BUILDER.match(summary):
            return _one_line(summary, _said_last(lines[:index], error))
    causes = (summary for _, _, summary in told if summary and not _CONSEQUENCE.match(summary))
    return _one_line(next(causes, next((line for line in lines if line.strip()), "")))


def _continues(lines: list[str], index: int) -> bool:
    """True when the line belongs to an error that begins above it; a cut can leave half a line behind its mark."""
    return lines[index].startswith((" ", "\t", _CUT)) or (index > 0 and lines[index - 1] == _CUT)


def _summary(error: list[str]) -> str:
    """An error's own words on one line, without what led to it: empty when they were cut."""
    # Behind a trace, the error itself follows an empty line; its further lines may look like errors.
    found = [index for index, line in enumerate(error) if _ERROR.match(line)]
    behind_trace = [index for index in found if index and not error[index - 1].strip()]
    at = next(iter(found[:1] if found[:1] == [0] else behind_trace[-1:] or found[-1:]), None)
    match = None if at is None else _ERROR.match(error[at])
    if at is None or match is None:
        return ""
    said = match["said"].strip()
    rest = [line.strip() for line in error[at + 1 :] if line.strip()]
    if said.startswith("Cannot build '"):  # 2.34: "Cannot build '…'.", "Reason: …", "Output paths:"
        reasons = [line.removeprefix("Reason: ").rstrip(".") for line in _until(rest, "Output paths:", "Last ")]
        return ": ".join(filter(None, (said.rstrip("."), ", ".join(reasons))))
    if said.endswith(":"):
        return f"{said} {', '.join(' '.join(line.split()) for line in rest)}".strip()
    place = next((match["place"] for line in rest[:1] if (match := _PLACE.match(line))), "")
    hint = next((line for line in rest if line.startswith("Did you mean ")), "")
    return f"{said.rstrip(';')}{f', at {place}' if place else ''}{f'. {hint}' if hint else ''}"


def _said_last(before: list[str], error: list[str]) -> str:
    """What the builder said last: Nix repeats it in the error, each line behind ``>``, or it stands above."""
    repeated = [line.strip().removeprefix(">") for line in error if line.strip().startswith(">")]
    lines = [line.strip().removeprefix("error: ") for line in (repeated or before)]
    return next((line for line in reversed(lines) if line), "")


def _until(lines: list[str], *ends: str) -> list[str]:
    return list(takewhile(lambda line: not line.startswith(ends), lines))


def _one_line(*parts: str) -> str:
    text = " ".join(": ".join(filter(None, parts)).split())
    return text if len(text) <= MAX_HEADLINE_CHARACTERS else f"{text[: MAX_HEADLINE_CHARACTERS - 1]}…"


class Log:
    """Takes stderr line by line, calls *on_progress* when the counts change, and keeps what a failure needs."""

    def __init__(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        self._on_progress = on_progress
        self._last: Progress | None = None
        self._counters: dict[int, tuple[int, int]] = {}
        self._running: dict[int, str] = {}
        self._builds: OrderedDict[int, _Build] = OrderedDict()
        self._errors: deque[str] = deque(maxlen=MAX_TAIL_LINES)
        self._warnings: deque[str] = deque(maxlen=MAX_TAIL_LINES)

    def feed(self, line: bytes) -> None:
        """One line of stderr; what is no JSON counts as a message."""
        if not line.startswith(_PREFIX):
            other, mark, event = line.partition(_EVENT)
            if text := plain(other.decode(errors="replace")).strip():
                self._errors.append(_bounded(text))
            if mark:
                self.feed(mark + event)
            return
        text = line[len(_PREFIX) :].decode(errors="replace")
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            if cut := _CUT_ERROR.match(text):
                self._errors.append(_bounded(plain(json.loads(f'"{cut["text"]}"', strict=False)).strip()))
            return
        if isinstance(event, dict):
            self._event(event)

    def forget_messages(self) -> None:
        """What was said explains nothing: the command is run again."""
        self._errors.clear()
        self._warnings.clear()
        self._builds.clear()

    @property
    def errors(self) -> list[str]:
        """The newest of Nix's error messages, oldest first."""
        return list(self._errors)

    @property
    def warnings(self) -> list[str]:
        """The newest of Nix's warnings, oldest first."""
        return list(self._warnings)

    @property
    def error(self) -> str:
        """Nix's own error messages, oldest first, bounded; empty when there were none."""
        return _bounded("\n".join(self._errors))

    @property
    def failure(self) -> str:
        """What a person needs to see of a failed command: the builder's last lines, then Nix's error, bounded."""
        error = self.error
        # Some versions of Nix repeat the log's end in the message, each line behind "> ".
        told = {line.strip().removeprefix(">").strip() for line in error.splitlines()}
        failed = [build for build in self._builds.values() if build.derivation and build.derivation in error]
        lines = [line for build in failed or self._builds.values() for line in build.lines if line.strip() not in told]
        log = _tail("\n".join(lines[-MAX_TAIL_LINES:]), MAX_TAIL_CHARACTERS - min(len(error), MAX_TAIL_CHARACTERS // 2))
        return f"{log}\n{error}".strip() if log else error

    def _event(self, event: dict[str, Any]) -> None:
        action, number, fields = event.get("action"), event.get("id"), event.get("fields")
        fields = fields if isinstance(fields, list) else []
        if action == "msg" and event.get("level") == _LEVEL_ERROR:
            text = _bounded(plain(str(event.get("msg", ""))).strip())
            (self._warnings if _NO_ERROR.match(text) else self._errors).append(text)
        elif action == "msg" and event.get("level") == _LEVEL_WARNING:
            self._warnings.append(_bounded(plain(str(event.get("msg", ""))).strip()))
        elif not isinstance(number, int) or not isinstance(event.get("type", 0), int):
            return
        elif action == "start":
            self._start(number, event.get("type"), fields)
        elif action == "stop":
            if self._running.pop(number, None) is not None:
                self._report()
        elif action == "result":
            self._result(number, event.get("type"), fields)

    def _start(self, number: int, kind: object, fields: list[Any]) -> None:
        if kind in {_ACT_BUILDS, _ACT_COPY_PATHS} and len(self._counters) < _MAX_ACTIVITIES:
            self._counters[number] = (0, 0)
        elif kind in {_ACT_BUILD, _ACT_SUBSTITUTE} and fields and len(self._running) < _MAX_ACTIVITIES:
            path = str(fields[0])[:_MAX_LINE_CHARACTERS]
            match = _STORE_NAME.match(path)
            self._running[number] = (match[1] if match else plain(path)).removesuffix(".drv")
            if kind == _ACT_BUILD:
                self._build(number).derivation = path
            self._report()

    def _result(self, number: int, kind: object, fields: list[Any]) -> None:
        if kind == _RES_BUILD_LOG_LINE and fields:
            line = str(fields[0])
            if serialised := _SERIALISED.search(line):
                line = f"error: {serialised['said']}"
            line = plain(line)
            # What the builder tells Nix and Nix did not understand is for no reader either.
            if line.strip() and not line.startswith("@nix {"):
                self._build(number).lines.append(_tail(line, _MAX_LINE_CHARACTERS))
        elif kind == _RES_PROGRESS and number in self._counters and _are_counts(fields[:4], 4):
            done, expected, running, failed = fields[:4]
            if not running and (done or failed):
                # Between two builds the expected ones are off: Nix 2.34 counts the last one twice, and all versions
                # forget those that failed.
                expected = max(self._counters[number][1], done)
            self._counters[number] = (done, expected)
            self._report()

    def _build(self, number: int) -> _Build:
        build = self._builds.setdefault(number, _Build())
        self._builds.move_to_end(number)
        if len(self._builds) > _MAX_ACTIVITIES:
            self._builds.popitem(last=False)
        return build

    def _report(self) -> None:
        if self._on_progress is None:
            return
        progress = Progress(
            done=sum(done for done, _ in self._counters.values()),
            expected=sum(expected for _, expected in self._counters.values()),
            building=tuple(list(self._running.values())[:MAX_NAMED]),
        )
        if progress != self._last and (progress.expected or progress.building):
            self._last = progress
            self._on_progress(progress)


class _Build:
    """What one derivation's builder said last."""

    def __init__(self) -> None:
        self.derivation = ""
        self.lines: deque[str] = deque(maxlen=MAX_TAIL_LINES)


def _are_counts(values: list[Any], length: int) -> bool:
    return len(values) == length and all(isinstance(value, int) and value >= 0 for value in values)


def _bounded(text: str) -> str:
    """The beginning and the end of *text*: Nix names the cause first and the place last."""
    if len(text) <= MAX_TAIL_CHARACTERS:
        return text
    half = MAX_TAIL_CHARACTERS // 2
    return f"{text[:half]}\n[…]\n{text[-half:]}"


def _tail(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"[…]{text[-limit:]}"
