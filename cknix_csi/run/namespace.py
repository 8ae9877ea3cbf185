"""A mount namespace of our own: whatever is mounted in it goes with the last process in it, however that ends."""

from __future__ import annotations

import ctypes
import os

_CLONE_NEWNS = 0x00020000
_MS_REC = 0x4000
_MS_SLAVE = 1 << 19

_libc = ctypes.CDLL(None, use_errno=True)


def enter_private_mounts() -> None:
    """Move this process into a new mount namespace; mounts made outside still appear in it, but not the reverse.

    To be called while there is one thread (unshare(2), CLONE_NEWNS).  Raises OSError.
    """
    if _libc.unshare(_CLONE_NEWNS) != 0:
        _raise("unshare")
    if _libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None) != 0:
        _raise("/")


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)
