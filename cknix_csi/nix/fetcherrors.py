"""Why a fetch failed, read from Nix's words: its exit code does not tell, and the reason is often only a warning.

What Nix 2.8, 2.26 and 2.34 say alike:

* a path whose signature or content is wrong: ``…signed by any of the keys in 'trusted-public-keys'`` as a warning that
  drops the cache for this path, or ``hash mismatch importing path``;
* a cache that cannot be reached: ``unable to download '<url>'``, as a warning that drops the cache for this command
  (after which the path looks as if nobody had it), or as the error itself;
* a narinfo that was remembered while the NAR is gone: ``does not exist in binary cache``;
* a path that nobody has: ``don't know how to build these paths``;
* a garbage collection that ended just then: ``cannot connect to socket at '…/gc-socket/socket'``;
* a database that SQLite calls busy without having waited: ``SQLite database '<file>' is busy``;
* a reference that was there, and was collected before the path itself came: ``path '<reference>' is not valid``,
  ``reference '<reference>' of path '<path>' is not a valid path``, or a broken assertion of that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cknix_csi.api.errors import CacheUnavailable, CknixError, NotFound, OtherCacheUnavailable, PathUntrusted
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath

_UNTRUSTED = (
    "signed by any of the keys in 'trusted-public-keys'",
    "hash mismatch importing path",
    "lacks a valid signature",
    "lacks a signature by a trusted key",
)
_DOWNLOAD = "unable to download"
_UNREACHABLE = (_DOWNLOAD, "does not exist in binary cache")
_LEFT_OUT = " cannot be downloaded, ignoring"
_GONE_COLLECTOR = re.compile("cannot connect to socket at '.*/gc-socket/socket'")
_COLLECTED = ("' is not valid", "' is not a valid path", "Assertion `worker.store.isValidPath(")
_KILLED = "failed due to signal 9 "
_BUSY = re.compile("SQLite database '.*' is busy")
_RETRYING = "; retrying in"
_ANSWERED = re.compile("HTTP error [1-9]|unable to download 'file:")


class PathCollected(CknixError):
    """A garbage collection took a part of what was being fetched: the same fetch may succeed now."""

    situation = Situation.PATH_COLLECTED

    def __init__(self, path: StorePath) -> None:
        super().__init__(f"a garbage collection came in between while {path} was fetched or built; it is tried again")


def unreachable(errors: Sequence[str], warnings: Sequence[str]) -> str:
    """Which server could not be asked, and why, by what a command said; empty when all have answered."""
    said = [message for message in (*warnings, *errors) if _RETRYING not in message and not _ANSWERED.search(message)]
    if why := _with(said, _DOWNLOAD):
        return f"{_DOWNLOAD}{why.partition(_DOWNLOAD)[2]}"
    left_out = _with(said, _LEFT_OUT).removesuffix(", ignoring")
    return f"{left_out}{_cause((*warnings, *errors), left_out)}"


def _cause(messages: Sequence[str], left_out: str) -> str:
    """Why the entry of the search path that *left_out* names was left out: Nix says so of its first attempts only."""
    url = left_out.partition("'")[2].partition("'")[0]
    tried = [message for message in messages if _RETRYING in message and url]
    return _with(tried, f"{_DOWNLOAD} '{url}': ").partition(_RETRYING)[0].partition(f"'{url}'")[2]


def killed_builder(errors: Sequence[str]) -> bool:
    """True when a build failed because its builder was ended by SIGKILL, as the kernel does when memory is short."""
    return any(_KILLED in message for message in errors)


def busy_database(errors: Sequence[str]) -> str:
    """What SQLite said when a command failed because others used the store's database; empty when it did not."""
    return next((found[0] for message in errors if (found := _BUSY.search(message))), "")


def met_collector(errors: Sequence[str]) -> bool:
    """True when a command failed because a garbage collection ended just as it announced what it uses (Nix 2.8)."""
    return any(_GONE_COLLECTOR.search(message) for message in errors)


def fetch_error(path: StorePath, urls: Sequence[str], errors: Sequence[str], warnings: Sequence[str]) -> CknixError:
    """The error for a failed fetch of *path* from *urls*, whose command said *errors* and *warnings*."""
    said = [message for message in (*warnings, *errors) if _RETRYING not in message]
    asked = ", ".join(urls) or "no cache of this cluster is known yet, and the substituters of nix.conf"
    for words in _UNTRUSTED:
        if found := _with(said, words):
            return PathUntrusted(
                f"{path} was refused: {found}. The cache's key and content must be those of this cluster: compare the "
                "ConfigMap and the Secret of the cache, or repair the store it serves"
            )
    for words in _UNREACHABLE:
        if found := _with([message for message in said if any(url in message for url in urls)], words):
            return CacheUnavailable(f"{path} is not on this node and {asked} could not deliver it: {found}")
    for words in _UNREACHABLE:
        if urls and (found := _with(said, words)):
            return OtherCacheUnavailable(
                f"{path} is not on this node, {asked} does not have it, and another cache could not be asked: {found}"
            )
    if met_collector(said) or any(words in message for message in said for words in _COLLECTED):
        return PathCollected(path)
    if not urls:
        return CacheUnavailable(f"{path} is not on this node; {asked} do not have it")
    return NotFound(
        f"{path} is not on this node, and {asked} does not have it; build it there, or correct the store path",
        Situation.PATH_NOT_FOUND,
    )


def _with(messages: Sequence[str], words: str) -> str:
    """The first of *messages* that holds *words*, without its prefix, on one line."""
    for message in messages:
        if words in message:
            text = " ".join(message.split())
            for prefix in ("warning: ", "error: "):
                text = text.removeprefix(prefix)
            return text.rstrip(".")
    return ""
