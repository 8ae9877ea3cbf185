"""Store path grammar.

``/nix/store/<32 characters of Nix base32>-<name>``; the name is 1 to 211 characters of ``[0-9A-Za-z+-._?=]`` (Nix
manual, "Store Path"; ``checkName`` in Nix's path.cc).  Newer Nix also refuses the names ``.`` and ``..`` and names that
begin with ``.-`` or ``..-``; so do we, since such a name would never be created by a Nix we support.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation

STORE_DIR = "/nix/store"
HASH_LENGTH = 32
MAX_NAME_LENGTH = 211
PATTERN = r"/nix/store/[0-9a-df-np-sv-z]{32}-[0-9A-Za-z+\-._?=]{1,211}"
"""The same grammar as in the CRD's schema (there anchored with ^ and $)."""

_PATH = re.compile(rf"{STORE_DIR}/(?P<hash>[0-9a-df-np-sv-z]{{32}})-(?P<name>[0-9A-Za-z+\-._?=]{{1,211}})")
_PATHS = re.compile(rf"(?:{STORE_DIR}/[0-9a-df-np-sv-z]{{32}}-(?!\.)[0-9A-Za-z+\-._?=]{{1,211}}\n)*")
"""Any number of lines that need no second look."""
_MAX_SHOWN = 300
_DOT_NAME = re.compile(r"\.{1,2}(-.*)?")


class InvalidStorePath(CknixError, ValueError):
    """Text that is not a store path; the message says what is wrong with it."""

    situation = Situation.INVALID_STORE_PATH


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """One top-level store object."""

    hash: str
    name: str

    @classmethod
    def parse(cls, text: str) -> StorePath:
        """Parse a full store path.  Raises :class:`InvalidStorePath`."""
        match = _PATH.fullmatch(text)
        if match is None or _DOT_NAME.fullmatch(match["name"]):
            raise InvalidStorePath(f"{_shown(text)!r} is not a store path: {_why_not(text)}")
        return cls(match["hash"], match["name"])

    @classmethod
    def parse_all(cls, texts: Sequence[str]) -> list[StorePath]:
        """Parse each of *texts*, faster than one by one.  Raises :class:`InvalidStorePath`."""
        lines = "".join(f"{text}\n" for text in texts)
        if lines.count("\n") != len(texts) or not _PATHS.fullmatch(lines):
            return [cls.parse(text) for text in texts]
        digest = len(STORE_DIR) + 1
        name = digest + HASH_LENGTH + 1
        return [cls(text[digest : name - 1], text[name:]) for text in texts]

    @classmethod
    def from_basename(cls, text: str) -> StorePath:
        """Parse ``<hash>-<name>``.  Raises :class:`InvalidStorePath`."""
        return cls.parse(f"{STORE_DIR}/{text}")

    @property
    def basename(self) -> str:
        return f"{self.hash}-{self.name}"

    @property
    def is_derivation(self) -> bool:
        return self.name.endswith(".drv")

    def __str__(self) -> str:
        return f"{STORE_DIR}/{self.basename}"


def _shown(text: str) -> str:
    """*text* at a length that fits a message."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _why_not(text: str) -> str:
    if not text.startswith(f"{STORE_DIR}/"):
        return f"it must begin with {STORE_DIR}/, as in {STORE_DIR}/<hash>-<name>"
    rest = text[len(STORE_DIR) + 1 :]
    if "/" in rest:
        top = f"{STORE_DIR}/{rest.partition('/')[0]}"
        inside = f"it names something inside a store path; use {top}"
        return inside if _PATH.fullmatch(top) else f"it must be {STORE_DIR}/<hash>-<name> with no further /"
    digest, dash, name = rest.partition("-")
    if len(digest) != HASH_LENGTH or not re.fullmatch("[0-9a-df-np-sv-z]*", digest):
        return f"the hash must be {HASH_LENGTH} characters of Nix base32 (0-9 a-z without e o t u)"
    if not dash or not name:
        return "the name after the hash is missing"
    if len(name) > MAX_NAME_LENGTH:
        return f"the name is {len(name)} characters long, the limit is {MAX_NAME_LENGTH}"
    return (
        "the name may hold only letters, digits and + - . _ ? =, and may not begin with . or .. alone or before a dash"
    )
