"""The kernel's mount table as text and as values (proc_pid_mountinfo(5)).

A node has hundreds of mounts and a question is about one or two of them, so the table stays one piece of bytes and
only lines that can matter are taken apart.  Mounts that exist for the whole read are always in it: since Linux 5.8
reading keeps its place when others mount and unmount meanwhile.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation

MOUNTINFO = Path("/proc/self/mountinfo")

_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")
_SPECIAL = re.compile(rb"[ \t\n\\]")
"""What the kernel writes as ``\\ooo`` in mount points (fs/proc_namespace.c)."""
_FIXED_FIELDS = 6
_DELETED = "//deleted"
"""Behind the root of a mount whose directory has been removed since; no path holds two slashes."""
_TAIL_FIELDS = 3


class MountTableUnreadable(CknixError):
    """Nobody can say what is mounted: callers must assume that everything is, and touch nothing."""

    situation = Situation.MOUNT_TABLE_UNREADABLE


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table, unescaped."""

    id: int
    parent: int
    device: str
    """``major:minor`` of its file system, the same for every mount of that."""
    root: str
    """The directory of its file system that is mounted; ``/`` for the whole."""
    target: str
    """Where it is mounted, seen from this process."""
    options: tuple[str, ...]
    """Of this mount, such as ``ro``, ``nosuid``."""
    propagation: tuple[str, ...]
    """The optional fields, such as ``shared:2``."""
    fstype: str
    source: str
    super_options: tuple[str, ...]
    """Of the file system, such as ``rw``, ``upperdir=/…``."""

    def super_option(self, name: str) -> str | None:
        """The value of the first file system option *name*."""
        start = f"{name}="
        return next((option[len(start) :] for option in self.super_options if option.startswith(start)), None)


class MountTable:
    """What was mounted when it was read."""

    def __init__(self, raw: bytes) -> None:
        """*raw*: the whole text of a mountinfo file.  Raises :class:`MountTableUnreadable` when it cannot be whole."""
        if not raw.endswith(b"\n"):  # every process has at least its root, and every line its end
            raise MountTableUnreadable("the mount table is empty or cut short; nothing is touched until it can be read")
        self._raw = raw

    def all(self) -> Iterator[Mount]:
        """Every mount, in the kernel's order."""
        for line in self._raw[:-1].split(b"\n"):
            yield parse_line(line)

    def at(self, target: str) -> list[Mount]:
        """The mounts stacked exactly on *target* (absolute, without symbolic links), bottom first."""
        found = [mount for mount in self._lines_with(b" " + escape(target) + b" ") if mount.target == target]
        return found if len(found) < 2 else _bottom_first(found)

    def inside_out(self, mount: Mount) -> list[Mount]:
        """*mount* and all that stands on it, in an order in which each can be unmounted by its path.

        What stands on a mount comes before it; of two on the same one the outer path comes first, since it covers what
        is below that path, whichever was mounted first.
        """
        standing: dict[int, list[Mount]] = {}
        for found in self._lines_with(b" " + escape(mount.target)):
            if f"{found.target}/".startswith(f"{mount.target}/") and found.id != mount.id:
                standing.setdefault(found.parent, []).append(found)
        outside_in: list[Mount] = []
        pending = [mount]
        while pending:
            outside_in.append(pending.pop())
            pending += sorted(standing.pop(outside_in[-1].id, []), key=lambda inner: len(inner.target))
        return outside_in[::-1]

    def sourced(self, source: str) -> Iterator[Mount]:
        """The mounts whose source is exactly *source*, in the kernel's order; each is parsed when it is asked for."""
        return (mount for mount in self._lines_with(b" " + escape(source) + b" ") if mount.source == source)

    def sourced_like(self, prefix: str) -> Iterator[Mount]:
        """The mounts whose source begins with *prefix*, like :meth:`sourced`."""
        return (mount for mount in self._lines_with(b" " + escape(prefix)) if mount.source.startswith(prefix))

    def rooted(self, tail: str) -> Iterator[Mount]:
        """The mounts of a directory whose path in its file system ends with *tail*, like :meth:`sourced`."""
        return (mount for mount in self._lines_with(escape(tail) + b" ") if mount.root.endswith(tail))

    def on_device(self, device: str) -> Iterator[Mount]:
        """The mounts of the file system *device* (``major:minor``), like :meth:`sourced`."""
        return (mount for mount in self._lines_with(b" " + os.fsencode(device) + b" ") if mount.device == device)

    def by_id(self, mount_id: int) -> Mount | None:
        """The mount of that id."""
        return next((mount for mount in self._lines_with(b"%d " % mount_id) if mount.id == mount_id), None)

    def using(self, directory: str, tail: str) -> list[Mount]:
        """The mounts on, below or of *directory*, or with a layer in it.

        *tail* is the last part of *directory*'s path: what a bind mount shows as its root, which is counted from the
        file system's own root and may begin differently.  Neither holds a character that the kernel escapes.
        """
        return [
            mount
            for mount in self._lines_with(os.fsencode(tail))
            if f"{mount.target}/".startswith(f"{directory}/")
            or f"{tail}/" in f"{mount.root}/"
            or any(directory in option for option in mount.super_options)
        ]

    def _lines_with(self, needle: bytes) -> Iterator[Mount]:
        """Parse the lines that contain *needle*; the caller checks that it stands in the right field."""
        raw, end = self._raw, 0
        while (found := raw.find(needle, end)) >= 0:
            start = raw.rfind(b"\n", 0, found) + 1
            end = raw.index(b"\n", found)
            yield parse_line(raw[start:end])


def read_mount_table(path: Path = MOUNTINFO) -> MountTable:
    """The table of this process's mount namespace.  Raises :class:`MountTableUnreadable`."""
    try:
        with open(path, "rb", buffering=0) as file:
            return MountTable(file.read())
    except OSError as error:
        raise MountTableUnreadable(
            f"cannot read the mount table {path}: {error.strerror}; nothing is touched until it can be read"
        ) from error


def parse_line(line: bytes) -> Mount:
    """One line without its end: six fields, optional ones, a lone dash, three fields.  Raises MountTableUnreadable."""
    fields = line.split(b" ")
    try:
        dash = fields.index(b"-", _FIXED_FIELDS)
        fstype, source, super_options = fields[dash + 1 : dash + 1 + _TAIL_FIELDS]
        return Mount(
            id=int(fields[0]),
            parent=int(fields[1]),
            device=os.fsdecode(fields[2]),
            root=unescape(fields[3]).removesuffix(_DELETED),
            target=unescape(fields[4]),
            options=_options(fields[5]),
            propagation=tuple(os.fsdecode(field) for field in fields[_FIXED_FIELDS:dash]),
            fstype=unescape(fstype),
            source=unescape(source),
            super_options=_options(super_options),
        )
    except ValueError as error:
        raise MountTableUnreadable(
            f"a line of the mount table is not of the form proc_pid_mountinfo(5) describes: {line!r}"
        ) from error


def escape(text: str) -> bytes:
    """*text* as the kernel writes it in the table: space, tab, newline and backslash as three octal digits."""
    return _SPECIAL.sub(lambda match: b"\\%03o" % match[0][0], os.fsencode(text))


def unescape(field: bytes) -> str:
    """The text of a field; bytes that are not UTF-8 come back as :func:`os.fsdecode` gives them."""
    if b"\\" not in field:
        return os.fsdecode(field)
    return os.fsdecode(_OCTAL.sub(lambda match: bytes((int(match[1], 8),)), field))


def _options(field: bytes) -> tuple[str, ...]:
    # Split first: overlayfs writes a comma inside a value as \054.
    return tuple(unescape(option) for option in field.split(b","))


def _bottom_first(stack: list[Mount]) -> list[Mount]:
    """Order mounts of one target: each stands on its parent, and the lowest on something else."""
    ids = {mount.id for mount in stack}
    depth: dict[int, int] = {}
    rest = list(stack)
    while rest:
        placed = [mount for mount in rest if mount.parent not in ids or mount.parent in depth]
        if not placed:  # a loop: not a tree, so no order can be given
            raise MountTableUnreadable(f"the mounts at {stack[0].target} stand on each other in a circle")
        for mount in placed:
            depth[mount.id] = depth.get(mount.parent, -1) + 1
        rest = [mount for mount in rest if mount.id not in depth]
    return sorted(stack, key=lambda mount: depth[mount.id])
