"""Running commands so that a failure says which command failed and what it printed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

Argument = str | os.PathLike[str]


class CommandFailed(Exception):
    """A command ended with an error, or did not end in time."""

    def __init__(self, argv: Sequence[Argument], reason: str, output: str) -> None:
        self.argv = [str(argument) for argument in argv]
        self.reason = reason
        self.output = output
        super().__init__(f"{shlex.join(self.argv)}: {reason}\n{output.strip()}")


def run(
    argv: Sequence[Argument],
    *,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> str:
    """Run *argv* to its end and return what it printed to standard output; *env* is added to the environment."""
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as expired:
        seen = b"".join(part for part in (expired.stdout, expired.stderr) if isinstance(part, bytes))
        raise CommandFailed(argv, f"not done after {timeout:.0f} s", seen.decode(errors="replace")) from None
    if done.returncode:
        raise CommandFailed(argv, f"exit status {done.returncode}", f"{done.stdout}\n{done.stderr}")
    return done.stdout


def pip(*arguments: Argument) -> str:
    """Run this Python's pip, configured as the machine has it."""
    return run([sys.executable, "-m", "pip", *arguments], env={"PIP_ROOT_USER_ACTION": "ignore"}, timeout=900)


def spawn(argv: Sequence[Argument], log: BinaryIO, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start *argv* in the background with exactly the environment *env*, everything it prints going to *log*.

    It gets a session of its own: Ctrl-C at the terminal is for the harness, which then ends its processes in order.
    """
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
    )
