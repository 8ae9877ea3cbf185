"""A machine made of namespaces: own mounts, network, processes, host name; its life is that of its first process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from .command import Argument, run, spawn

NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")


class Machine:
    """A set of namespaces held by an init that ends when this process does, and takes everything inside with it."""

    def __init__(self, init: Path, log: Path) -> None:
        with log.open("ab") as output:
            self._holder = subprocess.Popen(
                ["unshare", *NAMESPACES, "--fork", "--kill-child", init, "--until-eof"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = only_child(self._holder)

    def command(self, argv: Sequence[Argument]) -> list[Argument]:
        """*argv* as a command that runs inside."""
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--", *argv]

    def network_command(self, argv: Sequence[Argument]) -> list[Argument]:
        """*argv* as a command that sees this machine's network and the caller's files."""
        return ["nsenter", "--target", str(self.pid), "--net", "--", *argv]

    def run(
        self,
        argv: Sequence[Argument],
        *,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> str:
        """Run a command inside to its end; *env* is added to the environment."""
        return run(self.command(argv), stdin=stdin, env=env, timeout=timeout)

    def start(self, argv: Sequence[Argument], log: Path, env: Mapping[str, str]) -> Process:
        """Start a program inside that runs until it is ended, or the machine is."""
        with log.open("ab") as output:
            return Process(self, argv, output, env)

    def mountinfo(self) -> str:
        """The mount table inside."""
        return Path(f"/proc/{self.pid}/mountinfo").read_text()

    def kill(self) -> None:
        """End the machine and everything in it; returns when all of it is gone."""
        with contextlib.suppress(ProcessLookupError):
            if self._holder.poll() is None:
                os.kill(self.pid, signal.SIGKILL)
        self._holder.wait(60)  # the kernel ends an init only after every process of its namespace
        assert self._holder.stdin is not None
        self._holder.stdin.close()


class Process:
    """A program that runs on a machine.  What the caller holds is `nsenter`; the program itself is its child."""

    def __init__(self, machine: Machine, argv: Sequence[Argument], log: BinaryIO, env: Mapping[str, str]) -> None:
        self._entered = spawn(machine.command(argv), log, env)
        self.pid = only_child(self._entered)

    @property
    def status(self) -> int | None:
        """Exit status; none while it runs."""
        return self._entered.poll()

    def kill(self, signal_number: int = signal.SIGKILL, *, timeout: float = 30) -> None:
        """Send a signal that ends the program, and wait until it has."""
        if self._entered.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal_number)
        self.wait(timeout)

    def wait(self, timeout: float) -> int:
        """Wait for the program's end."""
        return self._entered.wait(timeout)


def only_child(parent: subprocess.Popen[bytes], *, timeout: float = 10) -> int:
    """Process id of the one child that *parent* (an `unshare` or `nsenter` that forks) has, or is about to have."""
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + timeout
    while parent.poll() is None and time.monotonic() < deadline:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.002)
    parent.kill()
    raise ChildProcessError(f"{parent.args!r} started nothing; exit status {parent.wait()}")
