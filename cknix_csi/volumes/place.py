"""Where a directory is in its file system: how the mount table names clones of what is below it.

A clone of a plain directory shows the source and type of its file system, and as its root a path that is counted from
the root of that.  In a container, which sees the directory through a mount of its own, that is another path.
"""

from __future__ import annotations

from cknix_csi.volumes import syscalls
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.mountinfo import Mount, MountTableUnreadable
from cknix_csi.volumes.mounts import Mounts


class Place:
    """The directory *path*, which exists and stays on the mount that it is on."""

    def __init__(self, path: str, mounts: Mounts) -> None:
        self._path = path
        self._mounts = mounts
        self._found: tuple[str, str] | None = None
        """Its device and its path there, without a slash at the end."""

    def inside(self, mount: Mount) -> str | None:
        """The path, from the directory, of what *mount* shows; None when that is not below the directory.

        Raises MountTableUnreadable, VolumeFailed.
        """
        if self._found is None:
            self._found = self._find()
        device, root = self._found
        if mount.device != device or not mount.root.startswith(f"{root}/"):
            return None
        return mount.root[len(root) + 1 :]

    def holds(self, mount: Mount) -> bool:
        """True when *mount* shows something below the directory.  Raises like :meth:`inside`."""
        return self.inside(mount) is not None

    def _find(self) -> tuple[str, str]:
        with explained(f"see on which mount {self._path} is"):
            mount_id = syscalls.statx_mount_id(syscalls.AT_FDCWD, self._path)
        mount = self._mounts.table().by_id(mount_id)
        if mount is None:
            raise MountTableUnreadable(f"the mount table does not name the mount that {self._path} is on")
        below = self._path.removeprefix(mount.target.rstrip("/"))
        return mount.device, f"{mount.root.rstrip('/')}{below}"
