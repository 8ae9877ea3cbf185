"""Child processes: each has a deadline, its own process group, and bounded output."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_STDOUT = 16 * 1024 * 1024
MAX_LINE = 64 * 1024
_CHUNK = 64 * 1024
# What Nix gets to stop its builders and release its locks before it is killed.
_GRACE_SECONDS = 5.0
# Between two looks at those who were killed and have not ended yet; after so many they are left alone.
_BURIAL_SECONDS = 0.01
_BURIALS = 200
# How long output may still come when the command has ended: whoever holds the pipe then is none of its group.
_PIPE_GRACE_SECONDS = 1.0


class OutputTooLarge(Exception):
    """A command wrote more to stdout than it may."""


@dataclass(frozen=True, slots=True)
class Completed:
    """How a command ended.  *code* is negative for a signal, as in ``subprocess``."""

    code: int
    stdout: bytes


async def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    deadline: float,
    on_line: Callable[[bytes], None],
    cwd: Path | None = None,
) -> Completed:
    """Run *argv*; *on_line* gets each line of stderr as it comes, cut at :data:`MAX_LINE` bytes.

    Raises TimeoutError after *deadline* seconds and :class:`OutputTooLarge`.  However this ends, the command has ended
    and the rest of its process group was killed.
    """
    # Pipes of our own: asyncio's Process.wait() does not return while anybody at all holds one of its pipes.
    async with _pipe() as (stdout, stdout_end), _pipe() as (stderr, stderr_end):
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout_end,
            stderr=stderr_end,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        stdout_end.close()
        stderr_end.close()
        output = bytearray()
        try:
            async with asyncio.timeout(deadline), asyncio.TaskGroup() as tasks:
                readers = (
                    tasks.create_task(_read_all(stdout, output)),
                    tasks.create_task(_read_lines(stderr, on_line)),
                )
                code = await process.wait()
                _signal_group(process.pid, signal.SIGKILL)
                await _bury(process.pid)
                _, open_still = await asyncio.wait(readers, timeout=_PIPE_GRACE_SECONDS)
                for reader in open_still:
                    reader.cancel()
        except BaseExceptionGroup as group:
            await _finish(process, (stdout, stderr))
            raise group.exceptions[0] from None
        except BaseException:
            await _finish(process, (stdout, stderr))
            raise
        return Completed(code, bytes(output))


@asynccontextmanager
async def _pipe() -> AsyncIterator[tuple[asyncio.StreamReader, BinaryIO]]:
    """A pipe: the end to read as a stream, and the end to write, which the caller closes once a child has it."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", 0) as source, os.fdopen(write_end, "wb", 0) as sink:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), source
        )
        try:
            yield reader, sink
        finally:
            transport.close()


async def _finish(process: asyncio.subprocess.Process, pipes: Sequence[asyncio.StreamReader]) -> None:
    """End the process group, and wait for it even if the caller is cancelled once more meanwhile."""
    ending = asyncio.ensure_future(_terminate(process, pipes))
    cancelled = False
    while not ending.done():
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            cancelled = True
    ending.result()
    if cancelled:
        raise asyncio.CancelledError


async def _terminate(process: asyncio.subprocess.Process, pipes: Sequence[asyncio.StreamReader]) -> None:
    # A pipe nobody reads would keep the process from ending.
    drains = [asyncio.ensure_future(_drain(pipe)) for pipe in pipes]
    try:
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_SECONDS):
                await process.wait()
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
        await _bury(process.pid)
    finally:
        for drain in drains:
            drain.cancel()
        await asyncio.gather(*drains, return_exceptions=True)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


async def _bury(group: int) -> None:
    """Wait for those of the killed *group* that outlived their parent, where they are left to this process.

    The first process of a container inherits all orphans, and they stay in the process table until it has asked how
    they ended.
    """
    with suppress(ChildProcessError):
        for _ in range(_BURIALS):
            if os.waitpid(-group, os.WNOHANG) == (0, 0):  # noqa: ASYNC222 - it does not block
                await asyncio.sleep(_BURIAL_SECONDS)


async def _drain(pipe: asyncio.StreamReader) -> None:
    while await pipe.read(_CHUNK):
        pass


async def _read_all(pipe: asyncio.StreamReader, output: bytearray) -> None:
    while chunk := await pipe.read(_CHUNK):
        if len(output) + len(chunk) > MAX_STDOUT:
            raise OutputTooLarge(f"more than {MAX_STDOUT} bytes of output")
        output += chunk


async def _read_lines(pipe: asyncio.StreamReader, on_line: Callable[[bytes], None]) -> None:
    line = bytearray()
    while chunk := await pipe.read(_CHUNK):
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            line += part[: MAX_LINE - len(line)]
            on_line(bytes(line))
            line.clear()
        line += rest[: MAX_LINE - len(line)]
    if line:
        on_line(bytes(line))
