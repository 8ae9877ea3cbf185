"""The command itself: a child in a mount namespace of its own, with the volume at ``/nix``."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cknix_csi.run import keeper, signals
from cknix_csi.run.scratch import Scratch
from cknix_csi.volumes.syscalls import owned

RESULT_BIN = "/nix/var/result/bin"
PATIENCE = 3
"""So many SIGTERMs kill the command, as those of ``docker run`` do."""


class Child:
    """One command, started by :meth:`run`; made by :func:`child`."""

    def __init__(self, kept: keeper.Keeper, command: keeper.Command) -> None:
        self._keeper = kept
        self._command = command
        self._started = False
        self._terminations = 0

    @property
    def volume(self) -> Path:
        """What will be at ``/nix``."""
        return self._command.volume

    @property
    def started(self) -> bool:
        return self._started

    def signal(self, number: signal.Signals) -> bool:
        """Pass *number* on, unless the command has it already; True when it was one SIGTERM too many, and kills.

        Only SIGTERM asks a process to end and means nothing else: a shell, a Python prompt or a server is interrupted
        or hung up on any number of times.
        """
        if number is signal.SIGTERM:
            self._terminations += 1
            if self._terminations >= PATIENCE:
                self._keeper.signal(signal.SIGKILL)
                return True
        if not signals.command_has_it(number):
            self._keeper.signal(number)
        return False

    async def run(self, on_started: Callable[[], None]) -> int:
        """Run it and return its exit code, as a shell would tell it.  What the command leaves running is ended."""
        os.mkfifo(self._command.fifo, 0o600)
        with owned(os.open(self._command.fifo, os.O_RDWR | os.O_NONBLOCK)) as reading:
            loop = asyncio.get_running_loop()

            def started() -> None:
                loop.remove_reader(reading)
                on_started()

            loop.add_reader(reading, started)
            try:
                self._started = True
                self._keeper.start()
                return await self._keeper.ended()
            finally:
                loop.remove_reader(reading)


@contextmanager
def child(argv: Sequence[str], environment: Mapping[str, str], own: Scratch) -> Iterator[Child]:
    """A command that can be run inside the block; without *argv* it is the user's shell.

    To be entered while there is one thread and :func:`signals.held`.  Raises OSError.
    """
    path = environment.get("PATH") or os.defpath
    command = keeper.Command(
        argv=tuple(argv) or (environment.get("SHELL") or "/bin/sh",),
        environment={**environment, "PATH": f"{RESULT_BIN}:{path}"},
        volume=own.directory / "target",
        fifo=own.directory / "started",
        lock=own.lock,
    )
    with keeper.kept(command) as kept:
        yield Child(kept, command)
