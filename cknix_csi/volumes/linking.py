"""Hard links to the store's files, made by link(2) in worker threads: five to ten times as fast as rsync."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from cknix_csi.volumes.copytree import THREADS, Copier, rebuild
from cknix_csi.volumes.farm import FarmReport

_NO_LINK = {errno.EMLINK, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP}
"""The inode has all the names it can have; another mount; no links on this file system, or to an immutable file."""


class LinkEngine:
    """Farms by link(2); a file that cannot be linked is cloned or copied."""

    def __init__(self, threads: int = THREADS) -> None:
        self._threads = threads

    async def fill(self, store_dir: Path, names: Sequence[str], destination: str) -> FarmReport:
        """See :class:`~cknix_csi.volumes.farm.FarmEngine`."""
        return await rebuild(store_dir, names, _Linker(destination), destination, self._threads)


class _Linker:
    """Places everything by link(2), symbolic links too: those are inodes like others, which a farm need not have."""

    def __init__(self, destination: str) -> None:
        self._copier = Copier(destination)
        self.stop = self._copier.stop
        self.close = self._copier.close

    def file(self, source: int, target: int, name: str, report: FarmReport) -> None:
        if _link(source, target, name):
            report.linked += 1
        else:
            self._copier.file(source, target, name, report)

    def symlink(self, source: int, target: int, name: str, report: FarmReport) -> None:
        if not _link(source, target, name):
            self._copier.symlink(source, target, name, report)


def _link(source: int, target: int, name: str) -> bool:
    try:
        # Without follow_symlinks=False Python asks linkat(2) to follow.
        os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True
