"""The reference engine: ``rsync --archive --hard-links --link-dest``, which says in one line what a farm is.

``--hard-links`` by itself links nothing to the source, it only keeps links among the files of one run.  ``--link-dest``
links, but only files whose size, time, mode and owner will be equal: hence ``--archive``.  It takes five to ten times
as long as link(2) does, and a file that it cannot link is copied without a word, and without its holes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cknix_csi.api.errors import DeadlineExceeded, OutOfSpace
from cknix_csi.finishing import finish
from cknix_csi.volumes.failures import VolumeFailed
from cknix_csi.volumes.farm import FarmReport

DEADLINE = 1800.0
"""Seconds; 376,000 files take half a minute on a quiet machine."""
_OPTIONS = (
    "--archive",
    "--hard-links",
    "--numeric-ids",  # names of users mean nothing in a container
    "--recursive",  # which --files-from takes out of --archive
    "--from0",
)
_LAST_LINES = 5
_BLOCK = 512
"""Bytes in the unit of st_blocks."""
_FULL = b"(28)"
"""How rsync ends the line about ENOSPC."""


class Ended(Protocol):
    """How a command ended."""

    @property
    def code(self) -> int:
        """Its exit status, negative for a signal."""


class RunCommand(Protocol):
    """A runner of child processes, such as ``nix.process.run``: own process group, killed on cancel; bounded output."""

    async def __call__(
        self, argv: Sequence[str], *, env: Mapping[str, str], deadline: float, on_line: Callable[[bytes], None]
    ) -> Ended:
        """Run *argv*; *on_line* gets the lines of stderr.  Raises TimeoutError after *deadline* seconds."""


class RsyncEngine:
    """Farms by the ``rsync`` found on the PATH."""

    def __init__(self, run: RunCommand, *, deadline: float = DEADLINE) -> None:
        self._run = run
        self._deadline = deadline

    async def fill(self, store_dir: Path, names: Sequence[str], destination: str) -> FarmReport:
        """See :class:`~cknix_csi.volumes.farm.FarmEngine`.

        Raises VolumeFailed, also when there is no rsync; OutOfSpace, DeadlineExceeded.
        """
        if (rsync := shutil.which("rsync")) is None:
            raise VolumeFailed("rsync is not on the driver's PATH; install it, or let farms be linked without it")
        # Names by a file, not as arguments: 10,000 of the longest do not fit into one command.
        listing = f"{destination}/.names-{uuid.uuid4().hex}"
        await finish(asyncio.to_thread(_write_names, listing, names))
        try:
            await self._link(rsync, str(store_dir), listing, destination)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(listing)
        return await finish(asyncio.to_thread(_compared, str(store_dir), names, destination))

    async def _link(self, rsync: str, store: str, listing: str, destination: str) -> None:
        # An absolute --link-dest: a relative one would be looked for in the destination.  The slash after the source
        # makes names below it the paths below both other directories.
        argv = (
            rsync,
            *_OPTIONS,
            f"--files-from={listing}",
            f"--link-dest={os.path.abspath(store)}",
            f"{os.path.abspath(store)}/",
            f"{destination}/",
        )
        said: deque[bytes] = deque(maxlen=_LAST_LINES)
        env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
        try:
            ended = await self._run(argv, env=env, deadline=self._deadline, on_line=said.append)
        except TimeoutError:
            raise DeadlineExceeded(
                f"rsync took longer than {self._deadline:g} s to link the files and was stopped"
            ) from None
        except OSError as error:
            raise VolumeFailed(f"cannot run {rsync}: {error.strerror}") from error
        if ended.code != 0:
            words = os.fsdecode(b"; ".join(said))
            if _FULL in words.encode(errors="surrogateescape"):
                raise OutOfSpace(f"rsync found the disk full: {words}; free space or inodes on that file system")
            raise VolumeFailed(f"rsync ended with status {ended.code}: {words}")


def _compared(store: str, names: Sequence[str], destination: str) -> FarmReport:
    """What *destination* is made of, by looking: ``rsync --stats`` does not count what it copied for want of a link."""
    report = FarmReport()
    own: set[int] = set()
    """Inodes that are not the store's."""
    pending = list(names)
    while pending:
        path = pending.pop()
        made = os.lstat(f"{destination}/{path}")
        if stat.S_ISDIR(made.st_mode):
            report.directories += 1
            pending += (f"{path}/{name}" for name in os.listdir(f"{destination}/{path}"))
        elif stat.S_ISLNK(made.st_mode):
            report.symlinks += 1
        elif made.st_ino in own or made.st_ino == os.lstat(f"{store}/{path}").st_ino:
            report.linked += 1
        else:
            own.add(made.st_ino)
            report.copied += 1
            report.bytes_copied += min(made.st_size, made.st_blocks * _BLOCK)
    return report


def _write_names(listing: str, names: Sequence[str]) -> None:
    with open(listing, "x", encoding="ascii") as file:
        file.write("".join(f"{name}\0" for name in names))
