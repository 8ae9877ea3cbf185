"""The command itself: a child in a mount namespace of its own, with the volume at ``/nix``."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cknix_csi.run import orphans, signals
from cknix_csi.volumes.syscalls import owned

EXIT_SIGNALLED = 128
RESULT_BIN = "/nix/var/result/bin"

# Below our own mount namespace, so that our own programs may come from /nix; the FIFO tells the moment before the
# command takes over.
_ENTER = 'mount --bind "$1" /nix && printf . > "$2" && shift 2 && exec "$@"'


class Child:
    """One command, started by :meth:`run`."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Without *argv* it is the user's shell."""
        self._argv = tuple(argv) or (environment.get("SHELL") or "/bin/sh",)
        path = environment.get("PATH") or os.defpath
        self._environment = {**environment, "PATH": f"{RESULT_BIN}:{path}"}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def started(self) -> bool:
        return self._process is not None

    def signal(self, number: signal.Signals) -> None:
        """Pass *number* on, unless the command has it already or has ended."""
        if self._process is not None and not signals.command_has_it(number):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def run(self, volume: Path, fifo: Path, lock: int, on_started: Callable[[], None]) -> int:
        """Run it with *volume* at ``/nix`` and return its exit code, as a shell would tell it.

        *fifo* is a free path; *lock* a descriptor that the command inherits.  What the command leaves running is ended.
        """
        os.mkfifo(fifo, 0o600)
        with owned(os.open(fifo, os.O_RDWR | os.O_NONBLOCK)) as reading:
            loop = asyncio.get_running_loop()

            def started() -> None:
                loop.remove_reader(reading)
                on_started()

            loop.add_reader(reading, started)
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *("unshare", "--mount", "--propagation", "private"),
                    *("sh", "-c", _ENTER, "cknix", str(volume), str(fifo), *self._argv),
                    env=self._environment,
                    pass_fds=(lock,),
                )
                code = await self._process.wait()
            finally:
                loop.remove_reader(reading)
        await asyncio.to_thread(orphans.end)
        return code if code >= 0 else EXIT_SIGNALLED - code
