"""What Nix gets to see of this machine, and that it leaves nothing running.

``restrict-eval`` and pure evaluation do not keep files from a flake: an input such as ``path:/var/run/secrets/…`` or
``file:///dev/vda`` is fetched before anything is evaluated, and its content can then be read (with Nix 2.8 to 2.34, and
by ``builtins.getFlake`` in a restricted expression as well).  So the kernel keeps them: evaluation runs in a mount and
PID namespace of its own, where secrets are covered and block devices cannot be opened.  ``/proc`` is a new one, since
``/proc/1/root`` leads back to where they are not covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# What a sandboxed build needs of /dev, when evaluation imports from a derivation.
_DEVICES = "null zero full random urandom tty kvm"

_SCRIPT = f"""
mount --rbind /dev /dev
for device in {_DEVICES}; do
  if [ -c /dev/$device ] && [ ! -h /dev/$device ]; then mount --bind /dev/$device /dev/$device; fi
done
# A pseudoterminal comes from the /dev/pts beside it; for a bind mount of /dev/ptmx nothing is beside.
if [ -c /dev/pts/ptmx ] && [ ! -h /dev/ptmx ]; then mount --bind /dev/pts/ptmx /dev/ptmx; fi
mount -o remount,bind,nodev,nosuid /dev
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mount -t tmpfs -o ro,mode=0,size=4k cknix-hidden "$1"; fi
  shift
done
shift
exec "$@"
"""


# Unmounts by others still arrive (a mount that is kept here would keep its file system), own mounts never leave.
_NAMESPACES = ("unshare", "--mount", "--propagation=slave", "--pid", "--fork", "--kill-child", "--mount-proc", "--")


def contained(argv: Sequence[str]) -> list[str]:
    """The command that runs *argv* as the first process of a PID namespace.

    A builder survives its Nix when that is killed, since Nix gives it a session and a PID namespace of its own.  Here
    the kernel ends it as well.  It needs root, as Nix's sandbox does.
    """
    return [*_NAMESPACES, *argv]


def confined(argv: Sequence[str], hidden: Sequence[Path]) -> list[str]:
    """Like :func:`contained`, and without the directories *hidden*.  It fails where it cannot hide them."""
    return contained(["sh", "-euc", _SCRIPT, "sh", *map(str, hidden), "--", *argv])
