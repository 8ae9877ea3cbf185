"""Nix's error messages in the terms of the person who wrote the Expression."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Hints at options that the reader of a condition cannot give.
_HINT = re.compile(r"[ (]*(?:stack trace truncated; )?use '--show-trace'[^\n]*\)\n?")
_FIRST_FRAME = re.compile(r"(?<=error:)\n(?=\s*…)")
# describe.nix is «string» to Nix; nothing else is given to it that way.
_OWN_FRAME = re.compile(r"\s*… (?:while evaluating the file 'expr':$|.*at «string»:\d+:\d+:)", re.DOTALL)
# Nix 2.8 leaves out the line's end where it cannot show the place's own lines.
_GLUED_HINT = re.compile(r"(?<=\d:)(?=Did you mean )")
_TRACE_IS_EMPTY = re.compile(r"error:\s*(?=error:)")
_TRACE_BEGINS = re.compile(r"error:\s*\n(?=\s*…)")


def readable(message: str, renames: Mapping[str, str]) -> str:
    """*message* with paths as the reader knows them, and without the frames of a trace that are this program's own.

    *renames* gives the new text for each old one, in the order of replacement.
    """
    for old, new in renames.items():
        message = message.replace(old, new)
    message = _GLUED_HINT.sub("\n       ", _HINT.sub("", message))
    frames = _FIRST_FRAME.sub("\n\n", message).split("\n\n")
    kept = "\n\n".join(frame for frame in frames if not _OWN_FRAME.match(frame))
    return _TRACE_BEGINS.sub("error:\n", _TRACE_IS_EMPTY.sub("", kept)).strip()
