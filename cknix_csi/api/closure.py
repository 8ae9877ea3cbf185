"""A closure as a value, a store path with everything it refers to; and what Nix's database knows of a path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from cknix_csi.api.storepath import StorePath


class ClosurePath(Protocol):
    """What every path of a closure tells: :class:`Member`, or :class:`PathInfo` with all there is."""

    @property
    def path(self) -> StorePath: ...

    @property
    def nar_size(self) -> int:
        """Bytes of the uncompressed NAR."""


class Member(NamedTuple):
    """One path of a closure, as much of it as a volume needs to know."""

    path: StorePath
    nar_size: int


@dataclass(frozen=True, slots=True)
class PathInfo:
    """One valid path, field by field as in Nix's ``ValidPaths`` and ``Refs`` tables."""

    path: StorePath
    nar_hash: str
    """``sha256:<64 hex digits>``, as Nix's database holds it."""
    nar_size: int
    """Bytes of the uncompressed NAR."""
    references: tuple[StorePath, ...]
    """Sorted; a path may refer to itself."""
    deriver: str | None = None
    registration_time: int = 0
    """Seconds since the epoch."""
    ultimate: bool = False
    """True when it was built here rather than fetched."""
    signatures: tuple[str, ...] = ()
    content_address: str | None = None


@dataclass(frozen=True, slots=True)
class Closure:
    """*root* and all paths reachable from it, itself included, sorted by path."""

    root: StorePath
    paths: tuple[ClosurePath, ...]

    @property
    def id(self) -> str:
        """Names the closure on a node: in ``views/``, in GC roots and as the mount's source."""
        return self.root.basename

    @property
    def nar_size(self) -> int:
        """Bytes of all NARs together."""
        return sum(info.nar_size for info in self.paths)
