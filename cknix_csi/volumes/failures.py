"""What can go wrong with a volume, in the words of the person who reads ``kubectl describe pod``."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from cknix_csi.api.errors import CknixError, OutOfSpace
from cknix_csi.api.situations import Situation

_REMEDIES = {
    errno.EPERM: "the driver needs CAP_SYS_ADMIN: its container must be privileged",
    errno.ENOSYS: "the mount API of Linux 5.12 or newer is needed",
    errno.ENODEV: "the kernel lacks a file system or driver: load the modules `overlay`, `loop` and `ext4`",
    errno.EBUSY: "something still uses it, such as a process working inside or another mount below it",
    errno.EROFS: "the file system has become read-only: see the kernel log",
    errno.EIO: "the disk reports errors: see the kernel log",
}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class TargetUnusable(CknixError):
    """What is at a target path is not ours to mount on or to remove."""

    situation = Situation.TARGET_UNUSABLE


class StoreDamaged(CknixError):
    """A store object that Nix's database lists is not in the store."""

    situation = Situation.STORE_DAMAGED


class ViewDamaged(CknixError):
    """A view that pods use is not whole any more; it cannot be built anew under them."""

    situation = Situation.VIEW_DAMAGED


class VolumeFailed(CknixError):
    """A file operation in the driver's own directories failed."""

    situation = Situation.VOLUME_FAILED


class LimitReached(OutOfSpace):
    """A volume's own size limit is too small; the node's disk has room."""


class NotUndone(CknixError):
    """A publish failed and left traces: transient, so that kubelet asks again or unpublishes."""

    situation = Situation.NOT_UNDONE


class NodeUnusable(CknixError):
    """Nothing can be mounted or unmounted here, whatever it is."""

    situation = Situation.NODE_UNUSABLE


class DataRootTaken(CknixError):
    """Another process works on the same data root: it sees mounts that this one may not."""

    situation = Situation.DATA_ROOT_TAKEN


@contextlib.contextmanager
def explained(doing: str, kind: type[CknixError] = VolumeFailed) -> Iterator[None]:
    """Turn an :class:`OSError` of the block into *kind* (or OutOfSpace): what was being done, why not, what helps."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        # Not just the number's own text: after a failed mount it carries what the kernel said.
        message = f"cannot {doing}: {error.strerror or error}"
        if isinstance(error.filename, str | bytes) and os.fsdecode(error.filename) not in doing:  # not a descriptor
            message += f" ({os.fsdecode(error.filename)})"
        if number in _FULL:
            raise OutOfSpace(f"{message}; free space or inodes on that file system") from error
        if remedy := _REMEDIES.get(number):
            message += f"; {remedy}"
        raise kind(message) from error
