"""Which flakes on this machine's own disk a restricted evaluation may read.

Nix copies a ``path:`` flake to its store before anything is evaluated, whatever the evaluation itself is allowed to
read.  So a reference to this machine's files is checked before Nix sees it; what a flake names as its inputs is kept
in bounds by the lock file, which must pin the content of everything local.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

_LOCAL = re.compile(r"(?:[a-z]+\+)?(?:path|file):(?://)?(?P<path>[^?#]*)", re.IGNORECASE)
_BARE = re.compile(r"(?P<path>[/.~][^?#]*)")
_SYSTEM = tuple(Path(name) for name in ("/dev", "/etc", "/proc", "/root", "/run", "/sys", "/var/run"))


def refused(reference: str, private: Sequence[Path]) -> str | None:
    """Why the flake *reference* may not be read, or None; *private* are directories with what others must not see."""
    local = _LOCAL.match(reference) or _BARE.match(reference)
    if local is None:
        return None
    text = unquote(local["path"])
    if not text.startswith("/"):
        return "a local flake needs an absolute path, and one that is in the controller's container"
    path = Path(os.path.realpath(text))
    for directory in (*_SYSTEM, *private):
        other = Path(os.path.realpath(directory))
        if path == other or path in other.parents or other in path.parents:
            return f"it would read {other} of the controller"
    return None
