"""What root's powers a role keeps: the capabilities it has use for, and no others, for itself and all it starts.

Kubernetes lets only privileged containers mount for others, so that the node's container has every capability there is
(capabilities(7)); a process can give up for good what its container could not refuse.  Why each one stays is in
``docs/security.md``.

One reason is not seen in this code: what a pod does in a writable volume, overlayfs does in the upper layer with the
powers of the process that mounted it (Documentation/filesystems/overlayfs.rst, "Permission model").  What the node
gives up no pod has there.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from enum import IntEnum

_log = logging.getLogger(__name__)


class Capability(IntEnum):
    """Numbers of ``linux/capability.h``."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    FOWNER = 3
    FSETID = 4
    KILL = 5
    SETGID = 6
    SETUID = 7
    NET_ADMIN = 12
    SYS_CHROOT = 18
    SYS_ADMIN = 21
    MKNOD = 27
    SETFCAP = 31


NODE_KEEPS = frozenset(
    {
        Capability.CHOWN,
        Capability.DAC_OVERRIDE,
        Capability.FOWNER,
        Capability.FSETID,
        Capability.MKNOD,
        Capability.SETFCAP,
        Capability.SETGID,
        Capability.SETUID,
        Capability.SYS_ADMIN,
    }
)
CONTROLLER_KEEPS = frozenset(
    {
        Capability.CHOWN,
        Capability.DAC_OVERRIDE,
        Capability.FOWNER,
        Capability.KILL,
        Capability.NET_ADMIN,
        Capability.SETFCAP,
        Capability.SETGID,
        Capability.SETUID,
        Capability.SYS_ADMIN,
        Capability.SYS_CHROOT,
    }
)

_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_VERSION_3 = 0x20080522
_WORD_BITS = 32

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Word(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def give_up_all_but(keep: frozenset[Capability]) -> None:
    """Leave this process and its children no more than the capabilities *keep*, and no way to get more.

    To be called while there is one thread: the kernel keeps them for each.  What cannot be given up, as by a process
    that is not root, is logged; so is what is to be kept and was never there.
    """
    bounding = _bounding()
    try:
        for number in bounding - keep:
            _prctl(_PR_CAPBSET_DROP, number)
    except PermissionError:
        _log.warning("capabilities that are not needed stay within reach: CAP_SETPCAP is missing to give them up")
    words = _read()
    for index, word in enumerate(words):
        mask = sum(1 << (each - index * _WORD_BITS) for each in keep if each // _WORD_BITS == index)
        word.permitted &= mask
        word.effective = word.permitted
        word.inheritable = 0
    _write(words)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    held = [number for number in keep if words[number // _WORD_BITS].permitted >> number % _WORD_BITS & 1]
    if missing := sorted(number.name for number in keep.difference(held)):
        _log.warning("this process lacks capabilities that it may need: %s", ", ".join(missing))


def _bounding() -> set[int]:
    found: set[int] = set()
    number = 0
    while True:
        try:
            if _prctl(_PR_CAPBSET_READ, number):
                found.add(number)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return found  # the kernel knows no more
        number += 1


def _read() -> ctypes.Array[_Word]:
    words = (_Word * 2)()
    if _libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(words)) != 0:
        raise _error("capget")
    return words


def _write(words: ctypes.Array[_Word]) -> None:
    if _libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(words)) != 0:
        raise _error("capset")


def _prctl(option: int, value: int) -> int:
    zero = ctypes.c_ulong(0)
    result = int(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero))
    if result < 0:
        raise _error("prctl")
    return result


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), call)
