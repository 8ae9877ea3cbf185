"""What a volume has of its own: ``volumes/<volume>/<digest of its target>/{upper,work,m}``.

One directory per target, since one PersistentVolume may be mounted by several pods of a node.  ``m`` is where the
overlay is mounted for the moment in which its ``nix`` directory is copied to the target.  Where the volume's size is
limited, ``upper`` and ``work`` are in a place of that size: see :mod:`.sized`.  A private copy is beside them: see
:mod:`.copies`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from cknix_csi.api.errors import Conflict
from cknix_csi.api.limits import Limit
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.mountinfo import Mount, MountTable
from cknix_csi.volumes.mounts import Mounts, Upper
from cknix_csi.volumes.sized import SPACE, SizedStorage
from cknix_csi.volumes.trash import Trash

_PLAIN = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,79}")
"""Short enough for ``upperdir=`` to fit into a mount option, where :meth:`PrivateLayers.owner` reads it again."""


class PrivateLayers:
    """The directories below *directory*, which exists."""

    def __init__(self, directory: str, trash: Trash, mounts: Mounts, sized: SizedStorage) -> None:
        self._directory = directory
        self._trash = trash
        self._mounts = mounts
        self._sized = sized

    def path(self, volume_id: str, target: Path) -> str:
        """The directory of one volume at one target."""
        digest = hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
        return f"{self._directory}/{safe_name(volume_id)}/{digest}"

    def mountpoint(self, path: str) -> str:
        return f"{path}/m"

    def owner(self, mount: Mount) -> str | None:
        """The directory whose upper layer *mount* writes to, None for a mount that has none of ours."""
        upper = mount.super_option("upperdir")
        if upper is None or not upper.startswith(f"{self._directory}/") or not upper.endswith("/upper"):
            return None
        return upper.removesuffix("/upper").removesuffix(f"/{SPACE}")

    def make(self, path: str, limit: Limit | None) -> Upper:
        """Fresh layers in *path*, which must not exist: a volatile upper layer can be mounted only once.

        Raises OutOfSpace, MountFailed, VolumeFailed.
        """
        with explained(f"make the directories of the writable volume {path}"):
            os.makedirs(path, 0o700)
            os.mkdir(self.mountpoint(path), 0o755)
            if limit is None:
                layers = Upper(f"{path}/upper", f"{path}/work")
                for directory in (layers.upper, layers.work):
                    os.mkdir(directory, 0o755)
                return layers
        return self._sized.make(path, limit)

    def discard(self, path: str, table: MountTable | None = None) -> bool:
        """Throw *path* away; False when it was not there.  Raises Conflict when a mount still uses it.

        *table*: the mount table, when it was read after the last unmount of what is in *path*.
        """
        if not os.path.lexists(path):
            self.prune(os.path.dirname(path))  # a disk that was full left no more than that
            return False
        if self._sized.release(path) or table is None:
            table = self._mounts.table()
        if users := table.using(path, path.removeprefix(os.path.dirname(self._directory))):
            raise Conflict(f"the written data in {path} is still used by the mount at {users[0].target}; unmount that")
        self._trash.take(path)
        self.prune(os.path.dirname(path))
        return True

    def prune(self, volume: str) -> None:
        """Remove the directory of a whole volume once no target is left in it."""
        with contextlib.suppress(OSError):
            os.rmdir(volume)

    def volumes(self) -> list[str]:
        """The directory of every volume."""
        with os.scandir(self._directory) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))

    def targets(self, volume: str) -> list[str]:
        """The directories of the volume whose own directory is *volume*, one per target."""
        return sorted(f"{volume}/{name}" for name in os.listdir(volume))


def safe_name(volume_id: str) -> str:
    """*volume_id* as one short file name: itself where it is one, as kubelet's ids are, otherwise its digest."""
    if _PLAIN.fullmatch(volume_id):
        return volume_id
    return "~" + hashlib.sha256(os.fsencode(volume_id)).hexdigest()


def volume_key(volume_id: str) -> str:
    """The name of a volume's lock; :meth:`PrivateLayers.volumes` ends in the same name."""
    return f"volume {safe_name(volume_id)}"
