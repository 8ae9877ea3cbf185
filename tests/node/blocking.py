"""Notices steps of an event loop that keep all its other tasks waiting."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

LIMIT = 0.1
"""Seconds that one step may take."""
_WORTH_NOTING = 0.02


def watch(file: Path) -> None:
    """From now on write down, in *file*, the longer steps of the event loop that this thread will run.

    What a busy machine adds is not counted: the time for which the thread could have run, had there been a processor
    for it, which is the second field of its schedstat (linux/Documentation/scheduler/sched-stats.rst); and, while it
    waits for a child to execute its program (vfork(2)), all.
    """
    notes = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    loops_thread, spawning = threading.get_ident(), 0
    handles: Any = asyncio.Handle
    processes: Any = subprocess.Popen
    run, spawn = handles._run, processes._execute_child

    def uncounted() -> int:
        return int(os.pread(statistics, 100, 0).split()[1]) + spawning

    def timed_spawn(*args: Any) -> None:
        nonlocal spawning
        began, before = time.monotonic_ns(), uncounted()
        try:
            spawn(*args)
        finally:
            if threading.get_ident() == loops_thread:
                spawning += time.monotonic_ns() - began - (uncounted() - before)

    def timed_run(handle: asyncio.Handle) -> None:
        before, began = uncounted(), time.monotonic_ns()
        run(handle)
        seconds = (time.monotonic_ns() - began - (uncounted() - before)) / 1e9
        if seconds > _WORTH_NOTING:
            os.write(notes, f"{seconds:.3f} {_whose(handle)}\n".encode())

    handles._run, processes._execute_child = timed_run, timed_spawn


def too_long(file: Path) -> list[str]:
    """The steps in *file* that took longer than :data:`LIMIT`."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in lines if float(line.split()[0]) > LIMIT]


def _whose(handle: asyncio.Handle) -> str:
    """The task of a step, and where that waits now."""
    task = getattr(getattr(handle, "_callback", None), "__self__", None)
    if not isinstance(task, asyncio.Task):
        return repr(handle)
    places: list[str] = []
    waits: Any = task.get_coro()
    while (frame := getattr(waits, "cr_frame", None)) is not None:
        places.append(f"{waits.__qualname__}:{frame.f_lineno}")
        waits = waits.cr_await
    return " > ".join(places) or repr(task)
