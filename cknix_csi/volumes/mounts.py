"""The three mounts this driver makes, and how they go away again."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cknix_csi.api.errors import MountFailed
from cknix_csi.volumes import syscalls
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.mountinfo import Mount, MountTable, read_mount_table

_SAFE = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
BY_DESCRIPTOR = "/proc/self/fd/"
"""How a layer begins in the mount table whose path did not fit into an option."""
_OPTION_SYNTAX = frozenset("\\:,")
"""Characters that overlayfs itself interprets in the value of a layer option."""
_PATIENCE_SECONDS = 1.0
_FIRST_PAUSE_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Upper:
    """Where a writable overlay keeps what is written: two empty directories on one file system, never used before."""

    upper: str
    work: str


class Mounts(Protocol):
    """The kernel's mount table, as far as this driver reads and changes it.

    All paths are absolute and free of symbolic links.  Everything may wait for a disk: call it in a worker thread.
    """

    def table(self) -> MountTable:
        """What is mounted now.  Raises MountTableUnreadable: callers must then assume *mounted* and touch nothing."""

    def mounted(self, path: str) -> bool:
        """True when something is mounted exactly at *path*; in doubt True.  Costs 2 µs, whatever else is mounted."""

    def overlay(self, target: str, *, source: str, lower: Sequence[str], upper: Upper | None) -> None:
        """Mount an overlay of the directories *lower* (topmost first) at *target*, following redirects and metacopies.

        Read-only without *upper*.  *source* (at most 255 bytes) is what the mount table shows.  Atomic: failure leaves
        no mount.  Raises MountFailed, OutOfSpace.
        """

    def clone(self, source: str, target: str, *, writable: bool) -> None:
        """Show the directory *source* at *target* too, nosuid and nodev, read-only unless *writable*.

        Never for an instant with wider rights, and in no propagation group with its origin.  Atomic: failure leaves no
        mount.  Raises MountFailed.
        """

    def unmount(self, target: str) -> None:
        """Unmount everything stacked on *target*; nothing to do is fine.  Raises MountFailed.

        Of this and :meth:`unmount_one`: what is in use is waited for, a second.
        """

    def unmount_one(self, mount: Mount) -> None:
        """Unmount *mount*, as it was in the table, and nothing else; fine when it is gone, or covered by another.

        What is in the mount is not looked at, and no symbolic link is followed.  Raises MountFailed: never lazily, for
        a process that is still inside would go on using a file system that no mount table shows any more: what is
        below could be thrown away under it, and kubelet, which looks there, would detach its device.
        """


class KernelMounts:
    """:class:`Mounts` by system calls; no process is spawned (mount(8) alone costs 1.3 ms)."""

    def table(self) -> MountTable:
        return read_mount_table()

    def mounted(self, path: str) -> bool:
        try:
            return bool(syscalls.statx_attributes(path) & syscalls.STATX_ATTR_MOUNT_ROOT)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:  # such as ENOTCONN: what is mounted there has lost its server
            return error.errno != errno.ENAMETOOLONG

    def overlay(self, target: str, *, source: str, lower: Sequence[str], upper: Upper | None) -> None:
        with explained(f"mount an overlay at {target}", MountFailed):
            try:
                _overlay(target, source, lower, upper, one_by_one=True)
            except OSError as error:
                # Before Linux 6.7 there is no `lowerdir+`; what else is wrong stays wrong in the second attempt.
                if error.errno != errno.EINVAL:
                    raise
                _overlay(target, source, lower, upper, one_by_one=False)

    def clone(self, source: str, target: str, *, writable: bool) -> None:
        attributes = _SAFE if writable else _SAFE | syscalls.MOUNT_ATTR_RDONLY
        flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
        with (
            explained(f"mount {source} at {target}", MountFailed),
            syscalls.owned(syscalls.open_tree(source, flags)) as tree,
        ):
            # A copy of a shared mount starts in its peer group: what one pod mounts inside its volume would appear in
            # every other pod's.  Private first; attaching under a shared parent then makes a group of its own.
            # A copy is read-only also where its origin is, such as a disk with errors: it is to be what was asked for.
            cleared = syscalls.MOUNT_ATTR_RDONLY if writable else 0
            syscalls.mount_setattr(tree, attributes=attributes, cleared=cleared, propagation=syscalls.MS_PRIVATE)
            syscalls.move_mount(tree, target)

    def unmount(self, target: str) -> None:
        with explained(f"unmount {target}", MountFailed):
            while self.mounted(target):
                _patiently(lambda: syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW))

    def unmount_one(self, mount: Mount) -> None:
        parent, name = os.path.split(mount.target)
        flags = os.O_PATH | os.O_DIRECTORY
        with explained(f"unmount the {mount.fstype} mount of {mount.source!r} at {mount.target}", MountFailed):
            try:
                # Its parent by descriptor, since the path may lead elsewhere a moment later; one of itself is a use.
                directory = syscalls.openat2(syscalls.AT_FDCWD, parent, flags, syscalls.RESOLVE_NO_SYMLINKS)
                with syscalls.owned(directory):
                    _patiently(lambda: _unmount_if(mount.id, directory, name))
            except (FileNotFoundError, NotADirectoryError):
                return
            except OSError as error:
                raise OSError(error.errno, error.strerror, mount.target) from None


def _unmount_if(mount_id: int, directory: int, name: str) -> None:
    """Unmount what *name* in descriptor *directory* shows, if it is that mount."""
    if syscalls.statx_mount_id(directory, name) == mount_id:
        syscalls.umount2(f"{BY_DESCRIPTOR}{directory}/{name}", syscalls.UMOUNT_NOFOLLOW)


def _patiently(unmount: Callable[[], None]) -> None:
    """*unmount*, again while it fails with EBUSY.

    A child process that another thread starts has a copy of all our descriptors until it runs its program, and with
    those of mounts that we have just made or looked into it keeps these busy.
    """
    deadline, pause = time.monotonic() + _PATIENCE_SECONDS, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return unmount()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause *= 1.5


def _overlay(target: str, source: str, lower: Sequence[str], upper: Upper | None, *, one_by_one: bool) -> None:
    with contextlib.ExitStack() as held:
        context = held.enter_context(syscalls.owned(syscalls.fsopen("overlay")))
        syscalls.fsconfig_string(context, "source", source)
        if one_by_one:
            for layer in lower:
                syscalls.fsconfig_string(context, "lowerdir+", _layer(layer, held))
        else:
            syscalls.fsconfig_string(context, "lowerdir", ":".join(_by_descriptor(layer, held) for layer in lower))
        if upper is None:
            syscalls.fsconfig_flag(context, "ro")
        else:
            syscalls.fsconfig_string(context, "upperdir", _layer(upper.upper, held))
            syscalls.fsconfig_string(context, "workdir", _layer(upper.work, held))
            syscalls.fsconfig_flag(context, "volatile")  # else each unmount writes back all of the upper file system
        syscalls.fsconfig_string(context, "redirect_dir", "on")
        syscalls.fsconfig_string(context, "metacopy", "on")
        syscalls.fsconfig_create(context)
        attributes = _SAFE if upper is not None else _SAFE | syscalls.MOUNT_ATTR_RDONLY
        mount = held.enter_context(syscalls.owned(syscalls.fsmount(context, attributes)))
        syscalls.move_mount(mount, target)


def _layer(path: str, held: contextlib.ExitStack) -> str:
    """*path* as an option's value: itself, so that the mount table can be read, where length and characters allow."""
    if len(os.fsencode(path)) <= syscalls.FSCONFIG_STRING_LIMIT and not _OPTION_SYNTAX.intersection(path):
        return path
    return _by_descriptor(path, held)


def _by_descriptor(path: str, held: contextlib.ExitStack) -> str:
    """A short name for the directory *path*, good until *held* is closed."""
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    held.enter_context(syscalls.owned(descriptor))
    return f"{BY_DESCRIPTOR}{descriptor}"
