"""NAR, the serialisation whose hash Nix knows a path by, made from plain files (``dump`` in Nix's archive.cc).

Everything here blocks: it runs in a worker thread.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation

CHUNK = 256 * 1024
"""Bytes: the longest piece of a dump, and the most that is held of any file."""


class NarUnreadable(CknixError):
    """A tree that cannot be written as a NAR, or that changed while it was."""

    situation = Situation.NAR_UNREADABLE


def dump(path: Path) -> Generator[bytes, None, None]:
    """The NAR of *path*, in pieces of 1 to ``CHUNK`` bytes.

    Raises :class:`NarUnreadable` where ``nix-store --dump`` fails, and when a file shrank or vanished on the way: the
    pieces given out before are then no NAR.  A change that keeps every size shows only in the hash.
    """
    buffer = bytearray()
    for piece in _pieces(path):
        if buffer and len(buffer) + len(piece) > CHUNK:
            yield bytes(buffer)
            buffer.clear()
        if len(piece) == CHUNK:  # the middle of a big file: nothing to join it with, so no copy
            yield piece
        else:
            buffer += piece
    yield bytes(buffer)


def dump_of_size(path: Path, size: int) -> Generator[bytes, None, None]:
    """As :func:`dump`, but never gives out a NAR of another size than *size* bytes.

    Raises :class:`NarUnreadable` before the first piece that goes beyond *size*, and at the end when bytes are missing.
    """
    left = size
    for piece in dump(path):
        left -= len(piece)
        if left < 0:
            raise NarUnreadable(f"{str(path)!r}: its NAR is longer than the {size} bytes it was registered with")
        yield piece
    if left:
        raise NarUnreadable(f"{str(path)!r}: its NAR is {left} bytes shorter than the {size} it was registered with")


def _strings(*words: bytes) -> bytes:
    """Each word with its length before it and zeros after it, up to a multiple of 8 bytes."""
    return b"".join(struct.pack("<Q", len(word)) + word + bytes(-len(word) % 8) for word in words)


_MAGIC = _strings(b"nix-archive-1")
_REGULAR = _strings(b"(", b"type", b"regular")
_EXECUTABLE = _strings(b"executable", b"")
_CONTENTS = _strings(b"contents")
_SYMLINK = _strings(b"(", b"type", b"symlink", b"target")
_DIRECTORY = _strings(b"(", b"type", b"directory")
_ENTRY = _strings(b"entry", b"(", b"name")
_NODE = _strings(b"node")
_CLOSE = _strings(b")")

_READ = os.O_RDONLY | os.O_CLOEXEC


@dataclass(slots=True)
class _Directory:
    """An open directory on the way from the top to what is read now."""

    descriptor: int
    remaining: list[bytes]
    """Names still to come, the next one last."""
    current: bytes = b""

    @classmethod
    def open(cls, name: bytes, parent: int) -> _Directory:
        descriptor = os.open(name, _READ | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            return cls(descriptor, sorted(map(os.fsencode, os.listdir(descriptor)), reverse=True))
        except BaseException:
            os.close(descriptor)
            raise


def _pieces(path: Path) -> Iterator[bytes]:
    """The NAR in natural pieces, none longer than ``CHUNK`` (names and link targets are at most 4 KiB).

    Names are opened relative to their directory, and the directories are a list: neither the depth of a tree nor the
    length of its paths meets a limit of Python's or of PATH_MAX.
    """
    levels: list[_Directory] = []
    try:
        top = os.open(path.parent, _READ | os.O_DIRECTORY)
        levels.append(_Directory(top, [os.fsencode(path.name)]))
        yield _MAGIC
        while True:
            level = levels[-1]
            if level.remaining:
                level.current = level.remaining.pop()
                if len(levels) > 1:
                    yield _ENTRY + _strings(level.current) + _NODE
                mode = os.stat(level.current, dir_fd=level.descriptor, follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    levels.append(_Directory.open(level.current, level.descriptor))
                    yield _DIRECTORY
                    continue
                yield from _leaf(mode, level)
            else:
                os.close(levels.pop().descriptor)
                if not levels:
                    return
                yield _CLOSE
            if len(levels) > 1:
                yield _CLOSE  # of the entry that this node was
    except OSError as error:
        raise NarUnreadable(f"{_where(path, levels)}: {error.strerror}") from error
    except _Unsuitable as error:
        raise NarUnreadable(f"{_where(path, levels)}: {error}") from error
    finally:
        for level in levels:
            os.close(level.descriptor)


def _where(path: Path, levels: list[_Directory]) -> str:
    inside = [os.fsdecode(level.current) for level in levels[1:] if level.current]
    return repr(os.path.join(path, *inside))


class _Unsuitable(Exception):
    """What is wrong with the node that is read now."""


def _leaf(mode: int, level: _Directory) -> Iterator[bytes]:
    if stat.S_ISLNK(mode):
        yield _SYMLINK + _strings(os.readlink(level.current, dir_fd=level.descriptor)) + _CLOSE
    elif stat.S_ISREG(mode):
        descriptor = os.open(level.current, _READ | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=level.descriptor)
        try:
            yield from _regular(descriptor)
        finally:
            os.close(descriptor)
    else:
        raise _Unsuitable("a NAR holds only files, directories and symbolic links")


def _regular(descriptor: int) -> Iterator[bytes]:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise _Unsuitable("it was replaced while it was read")
    executable = _EXECUTABLE if status.st_mode & stat.S_IXUSR else b""
    yield _REGULAR + executable + _CONTENTS + struct.pack("<Q", status.st_size)
    left = status.st_size
    while left:
        data = os.read(descriptor, min(left, CHUNK))
        if not data:
            raise _Unsuitable(f"it shrank while it was read: {left} of its {status.st_size} bytes are missing")
        left -= len(data)
        yield data
    yield bytes(-status.st_size % 8) + _CLOSE
