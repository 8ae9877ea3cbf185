"""Child processes: deadlines, cancellation, bounds, and nothing left running.

The children here are shells and Pythons that misbehave; what is left of them is asked of the kernel.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cknix_csi.nix import process
from cknix_csi.nix.process import Completed, OutputTooLarge

ENV = {"PATH": os.environ["PATH"]}
LONG = "4242"


def ignore(_: bytes) -> None:
    pass


async def sh(
    script: str, *arguments: str, deadline: float = 30, on_line: Callable[[bytes], None] = ignore
) -> Completed:
    return await process.run(["sh", "-c", script, "sh", *arguments], env=ENV, deadline=deadline, on_line=on_line)


def alive(pid: int) -> bool:
    """False for a process that is gone, or dead and not reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def pids_in(file: Path, count: int) -> list[int]:
    """The process ids that a script has written to *file*, one a line."""
    async with asyncio.timeout(20):
        while not file.exists() or file.read_text().count("\n") < count:
            await asyncio.sleep(0.01)
    return [int(line) for line in file.read_text().split()]


async def all_gone(pids: list[int]) -> None:
    async with asyncio.timeout(5):
        while any(alive(pid) for pid in pids):
            await asyncio.sleep(0.01)


# Itself, a child, and a grandchild; each writes its process id to $1.
FAMILY = f"""
echo $$ >> "$1"
(sh -c 'echo $$ >> "$1"; sleep {LONG}; :' sh "$1" & echo $! > /dev/null; sleep {LONG}; :) &
echo $! >> "$1"
wait
"""
READY = 'while [ ! -s "$1" ]; do sleep 0.01; done'
STUBBORN = "trap '' TERM INT HUP\n" + FAMILY


async def test_output_lines_and_exit_code_are_delivered() -> None:
    lines: list[bytes] = []
    done = await sh("echo out; echo one >&2; printf two >&2; exit 7", on_line=lines.append)
    assert done == Completed(7, b"out\n")
    assert lines == [b"one", b"two"]


async def test_a_signal_is_a_negative_code() -> None:
    assert (await sh("kill -9 $$")).code == -signal.SIGKILL


async def test_a_child_gets_no_input_and_only_the_given_environment() -> None:
    done = await process.run(
        ["sh", "-c", "cat; env"], env={**ENV, "ONLY": "this"}, deadline=30, on_line=ignore, cwd=Path("/proc")
    )
    names = {line.partition(b"=")[0] for line in done.stdout.splitlines()}
    assert b"ONLY" in names
    assert names <= {b"ONLY", b"PATH", b"PWD", b"OLDPWD", b"SHLVL", b"_"}
    assert b"PWD=/proc\n" in done.stdout


async def test_a_command_that_does_not_exist_leaves_no_open_pipe() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            await process.run(["/does/not/exist"], env=ENV, deadline=5, on_line=ignore)
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_many_runs_leave_no_open_pipe() -> None:
    await sh("true")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await sh("echo x; echo y >&2")
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("family", [FAMILY, STUBBORN], ids=["willing", "ignoring SIGTERM"])
async def test_the_deadline_ends_the_whole_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.3)
    with pytest.raises(TimeoutError):
        await sh(family, str(tmp_path / "pids"), deadline=1)
    await all_gone(await pids_in(tmp_path / "pids", 3))


@pytest.mark.parametrize("family", [FAMILY, STUBBORN], ids=["willing", "ignoring SIGTERM"])
async def test_cancellation_ends_the_whole_family_and_propagates(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.3)
    task = asyncio.create_task(sh(family, str(tmp_path / "pids")))
    pids = await pids_in(tmp_path / "pids", 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pids[0]), "the command itself has ended when the caller goes on"
    await all_gone(pids)


async def test_a_second_cancellation_does_not_stop_the_clean_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.5)
    task = asyncio.create_task(sh(STUBBORN, str(tmp_path / "pids")))
    pids = await pids_in(tmp_path / "pids", 3)
    task.cancel()
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pids[0])
    await all_gone(pids)


async def test_a_command_is_asked_before_it_is_killed(tmp_path: Path) -> None:
    tidy = 'trap "echo tidied > $1; exit 0" TERM; echo ready > $1; while :; do sleep 0.05; done'
    task = asyncio.create_task(sh(tidy, str(tmp_path / "state")))
    async with asyncio.timeout(20):
        while not (tmp_path / "state").exists():
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tmp_path / "state").read_text() == "tidied\n"


async def test_a_daemon_that_keeps_the_pipes_does_not_keep_the_caller(tmp_path: Path) -> None:
    """In a session of its own, so that it cannot be killed with the command's group."""
    started = time.monotonic()
    done = await sh(
        f'setsid sh -c "echo \\$\\$ > $1; exec sleep {LONG}" & {READY}; echo ready; exit 3', str(tmp_path / "pid")
    )
    try:
        assert done == Completed(3, b"ready\n")
        assert time.monotonic() - started < 10
    finally:
        [daemon] = await pids_in(tmp_path / "pid", 1)
        os.kill(daemon, signal.SIGKILL)


async def test_what_a_command_leaves_in_the_background_ends_with_it(tmp_path: Path) -> None:
    started = time.monotonic()
    done = await sh(f'sh -c "echo \\$\\$ > $1; exec sleep {LONG}" & {READY}', str(tmp_path / "pid"))
    assert done.code == 0
    assert time.monotonic() - started < 10
    await all_gone(await pids_in(tmp_path / "pid", 1))


async def test_a_command_that_closes_its_output_is_still_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.2)
    assert (await sh("exec >&- 2>&-; sleep 1; exit 4")).code == 4


async def test_a_command_that_closes_its_output_still_has_a_deadline() -> None:
    with pytest.raises(TimeoutError):
        await sh(f"exec >&- 2>&-; sleep {LONG}", deadline=0.5)


async def test_stdout_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(OutputTooLarge, match="more than 16777216 bytes"):
        await sh('echo $$ > "$1"; exec cat /dev/zero', str(tmp_path / "pid"))
    await all_gone(await pids_in(tmp_path / "pid", 1))


async def test_as_much_stdout_as_allowed_is_delivered() -> None:
    done = await sh(f"head -c {process.MAX_STDOUT} /dev/zero")
    assert len(done.stdout) == process.MAX_STDOUT


@pytest.mark.parametrize("excess", [0, 1, 200_000])
async def test_a_long_line_is_cut_and_the_next_one_is_whole(excess: int) -> None:
    lines: list[bytes] = []
    size = process.MAX_LINE + excess
    await sh(f"head -c {size} /dev/zero | tr '\\0' x >&2; echo >&2; echo next >&2", on_line=lines.append)
    assert lines == [b"x" * process.MAX_LINE, b"next"]


async def test_both_pipes_at_full_speed_do_not_block_each_other() -> None:
    script = """
import os
for number in range(2000):
    os.write(1, b"o" * 4096)
    os.write(2, b"e" * 4095 + b"\\n")
"""
    seen = 0

    def count(line: bytes) -> None:
        nonlocal seen
        assert line == b"e" * 4095
        seen += 1

    done = await process.run([sys.executable, "-c", script], env=ENV, deadline=60, on_line=count)
    assert done == Completed(0, b"o" * 4096 * 2000)
    assert seen == 2000


async def test_the_loop_goes_on_while_a_command_floods_it() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    with pytest.raises(TimeoutError):
        await sh("yes >&2", deadline=1)
    ticking.cancel()
    assert ticks > 10


async def test_an_error_in_the_callback_ends_the_command(tmp_path: Path) -> None:
    def refuse(_: bytes) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        await sh(f'echo $$ > "$1"; echo x >&2; exec sleep {LONG}', str(tmp_path / "pid"), on_line=refuse)
    await all_gone(await pids_in(tmp_path / "pid", 1))


BURIED = """
import asyncio, os, subprocess, sys
from cknix_csi.nix import process
from cknix_csi.run.orphans import adopt

async def left(*argv, deadline):
    try:
        await process.run(argv, env=dict(os.environ), deadline=deadline, on_line=lambda line: None)
    except TimeoutError:
        pass
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) or "a child that lives"
    except ChildProcessError:
        return None

adopt()
process._GRACE_SECONDS = 0.2
print(asyncio.run(left("sh", "-c", "sleep 100 & sleep 100 & exit 0", deadline=10)))
stubborn = "trap : TERM; sh -c 'trap : TERM; sleep 100; sleep 100' & wait; wait"
print(asyncio.run(left("sh", "-c", stubborn, deadline=0.5)))
"""


def test_orphans_that_a_container_leaves_to_its_first_process_are_buried() -> None:
    done = subprocess.run([sys.executable, "-c", BURIED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["None", "None"], done.stderr
