"""However ``cknix-csi run`` is ended, and in whatever moment: nothing is left, or the next run clears it up."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import nixes
from tests.node.runs import GREETING, HELLO, REPOSITORY, Runs, quoted, runs_with, script, wait_until

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def runs() -> Iterator[Runs]:
    yield from runs_with(nixes.selected()[0].name)


@pytest.fixture(params=nixes.selected(), ids=nixes.name_of)
def with_each_nix(request: pytest.FixtureRequest) -> Iterator[Runs]:
    yield from runs_with(request.param.name)


def _builders(tag: str) -> list[str]:
    """Processes anywhere with *tag* in their arguments, runs themselves apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if f"{tag}: second" in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(entry.name)
    return found


def _has_reader(fifo: Path) -> bool:
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # ENXIO: nobody reads
        return False
    return True


def _ended(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=30)
    return process.returncode


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_evaluation_ends_it(runs: Runs, number: signal.Signals) -> None:
    fifo = runs.env.directory / "fifo"
    os.mkfifo(fifo)
    run = runs.start("true", options=("--expr", f"builtins.readFile {fifo}"))
    wait_until(lambda: _has_reader(fifo), "Nix evaluates")
    run.send_signal(number)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 128 + number
    how = "interrupted" if number is signal.SIGINT else f"ended by {number.name}"
    assert errors.splitlines() == ["cknix: evaluating the expression", f"cknix: {how} while evaluating the expression"]
    assert runs.traces() == {}


def test_a_signal_during_the_build_ends_it(with_each_nix: Runs) -> None:
    require_build_ends(with_each_nix, signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS[1:])
def test_any_other_signal_during_the_build_ends_it_too(runs: Runs, number: signal.Signals) -> None:
    require_build_ends(runs, number)


def require_build_ends(runs: Runs, number: signal.Signals) -> None:
    tag = uuid.uuid4().hex
    run = runs.start("true", options=runs.package(f'slow {{ seconds = 60; tag = "{tag}"; }}'))
    wait_until(lambda: _builders(tag), "the builder runs")
    # An impatient person's: the clearing up goes on, and the end is no other.
    deadline = time.monotonic() + 30
    while run.poll() is None and time.monotonic() < deadline:
        run.send_signal(number)
        time.sleep(0.001)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 128 + number
    assert re.search(
        rf"^cknix: (interrupted|ended by SIG[A-Z]+) while building /nix/store/\S+-slow-{tag}$", errors, re.M
    )
    assert errors.count(" while ") == 1
    assert runs.traces() == {}
    assert _builders(tag) == []
    assert runs("hello").code == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_command_is_the_commands(runs: Runs, number: signal.Signals) -> None:
    ready = runs.env.directory / "ready"
    run = runs.start(*script(f"touch {quoted(ready)}", "exec sleep 1000"))
    wait_until(ready.exists, "the command runs")
    run.send_signal(number)
    assert _ended(run) == 128 + number
    assert runs.traces() == {}


def test_a_command_that_handles_a_signal_ends_as_it_likes(runs: Runs) -> None:
    ready = runs.env.directory / "ready"
    lines = ("trap 'echo told; exit 3' TERM", f"touch {quoted(ready)}", "while :; do sleep 0.05; done")
    run = runs.start(*script(*lines))
    wait_until(ready.exists, "the command runs")
    run.terminate()
    output, _ = run.communicate(timeout=30)
    assert (run.returncode, output) == (3, "told\n")
    assert runs.traces() == {}


_COUNT_INTERRUPTS = """
import signal, sys, time
count = 0
def interrupted(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, interrupted)
print("ready", flush=True)
end = time.monotonic() + 1
while time.monotonic() < end:
    time.sleep(0.01)
print("interrupts:", count)
sys.exit(5)
"""


def test_in_a_terminal_the_command_gets_an_interrupt_once(runs: Runs) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        command = Runs.command(sys.executable, "-c", _COUNT_INTERRUPTS, options=("-q", "-f", str(HELLO)))
        os.execve(command[0], command, runs.environ)
    shown = b""
    with suppress(OSError):  # the other end has been closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
            if b"ready" in chunk:
                os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    os.close(terminal)
    assert b"interrupts: 1" in shown
    assert runs.traces() == {}


_WHO_HAS_IT = """
import os, signal
from cknix_csi.run.signals import command_has_it
def told():
    return [command_has_it(number) for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)]
print(told(), flush=True)
if os.fork() == 0:
    os.setpgid(0, 0)  # as a shell starts what it runs in the background
    print(told(), flush=True)
    os._exit(0)
os.wait()
"""


def test_only_what_the_terminal_sends_to_all_counts_as_told() -> None:
    command = [sys.executable, "-c", _WHO_HAS_IT]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        os.execv(command[0], command)
    shown = b""
    with suppress(OSError):
        while chunk := os.read(terminal, 4096):
            shown += chunk
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    assert sorted(shown.decode().splitlines()) == ["[False, False, False, False]", "[True, True, False, False]"]
    nowhere = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, start_new_session=True, check=True
    )
    assert set(nowhere.stdout.splitlines()) == {"[False, False, False, False]"}


def test_what_the_caller_has_it_ignore_is_ignored(runs: Runs) -> None:
    ready, go = runs.env.directory / "ready", runs.env.directory / "go"
    lines = (f"touch {quoted(ready)}", f"while [ ! -e {quoted(go)} ]; do sleep 0.05; done", "hello")
    run = runs.start(*script(*lines), hangup="ignore")
    wait_until(ready.exists, "the command runs")
    run.send_signal(signal.SIGHUP)
    go.touch()
    output, _ = run.communicate(timeout=30)
    assert run.returncode == 0
    assert GREETING in output


def test_a_signal_in_any_other_moment_leaves_nothing_either(runs: Runs) -> None:
    assert runs("true").code == 0
    began = time.monotonic()
    assert runs("true").code == 0
    whole = time.monotonic() - began
    codes = set()
    for step in range(16):
        run = runs.start("true", options=("-f", str(HELLO), "--writable"))
        time.sleep(whole * step / 15)
        run.terminate()
        codes.add(_ended(run))
        assert runs.traces() == {}, f"ended after {whole * step / 15:.2f} s"
    assert codes <= {-signal.SIGTERM, 128 + signal.SIGTERM, 0}
    assert len(codes) > 1


def test_a_signal_as_soon_as_there_is_something_to_clear_up_is_obeyed(runs: Runs) -> None:
    assert runs("true").code == 0
    for _ in range(5):
        run = runs.start("true")
        while not runs.scratches():
            assert run.poll() is None
        run.terminate()
        assert _ended(run) == 128 + signal.SIGTERM
        assert runs.traces() == {}


def test_what_the_command_leaves_running_is_ended_with_it(runs: Runs) -> None:
    ran = runs("sh", "-c", "sleep 1000 & setsid sleep 1000 & (setsid sh -c 'sleep 1000; :' &) ; exit 5")
    assert ran.code == 5
    assert runs.traces() == {}


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _keeper(run: subprocess.Popen[str]) -> int:
    """The process between a run and its command; *run* itself is ``env``, which has become the program."""
    [keeper] = _children(run.pid)
    return keeper


_WITH_JOBS = ("sleep 1000 &", "setsid sleep 1000 &", "(setsid sh -c 'sleep 1000; :' &)")
"""Processes of the command in its own session, in another one, and with no parent."""


@pytest.mark.parametrize("options", [(), ("--writable",)], ids=["read-only", "writable"])
def test_a_killed_run_takes_its_command_with_it_and_the_next_run_clears_up(
    runs: Runs, options: tuple[str, ...]
) -> None:
    ready = runs.env.directory / "ready"
    lines = ("trap '' HUP INT TERM", "touch /nix/written || :", *_WITH_JOBS, f"touch {quoted(ready)}", "sleep 1000")
    run = runs.start(*script(*lines), options=(*runs.package("hello"), *options))
    wait_until(ready.exists, "the command runs")
    [scratch] = runs.scratches()
    run.kill()
    run.wait()
    wait_until(lambda: runs.processes() == [], "the command and its jobs have ended")
    assert runs.scratches() == [scratch]
    assert runs.mounts() == []
    assert runs("hello").code == 0
    assert runs.traces() == {}


def test_a_killed_keeper_takes_the_command_with_it_and_the_run_clears_up(runs: Runs) -> None:
    ready = runs.env.directory / "ready"
    run = runs.start(*script(*_WITH_JOBS, f"touch {quoted(ready)}", "sleep 1000"))
    wait_until(ready.exists, "the command runs")
    os.kill(_keeper(run), signal.SIGKILL)
    assert _ended(run) == 128 + signal.SIGKILL
    assert runs.traces() == {}


def test_a_run_and_keeper_killed_at_once_take_the_command_with_them(runs: Runs) -> None:
    ready = runs.env.directory / "ready"
    run = runs.start(*script(f"touch {quoted(ready)}", "exec sleep 1000"))
    wait_until(ready.exists, "the command runs")
    keeper = _keeper(run)
    os.kill(keeper, signal.SIGSTOP)  # it cannot do anything any more
    run.kill()
    os.kill(keeper, signal.SIGKILL)
    run.wait()
    wait_until(lambda: runs.processes() == [], "the command has ended")
    assert runs("true").code == 0
    assert runs.traces() == {}


def test_a_run_killed_before_its_command_starts_leaves_no_keeper(runs: Runs) -> None:
    fifo = runs.env.directory / "fifo"
    os.mkfifo(fifo)
    run = runs.start("true", options=("--expr", f"builtins.readFile {fifo}"))
    wait_until(lambda: _has_reader(fifo), "Nix evaluates")
    keepers = [pid for pid in _children(run.pid) if b"cknix_csi.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(keepers) == 1
    run.kill()
    run.wait()
    wait_until(lambda: not Path(f"/proc/{keepers[0]}").exists(), "the keeper has ended")


def test_what_has_lost_its_parent_and_ended_does_not_stay_as_a_zombie(runs: Runs) -> None:
    ready, go = runs.env.directory / "ready", runs.env.directory / "go"
    lines = (f"(sh -c 'while [ ! -e {quoted(go)} ]; do sleep 0.02; done' &)", f"touch {quoted(ready)}", "sleep 1000")
    run = runs.start(*script(*lines))
    wait_until(ready.exists, "the command runs")
    keeper = _keeper(run)
    wait_until(lambda: len(_children(keeper)) == 2, "the keeper has adopted the orphan")
    go.touch()
    wait_until(lambda: len(_children(keeper)) == 1, "the orphan is gone")


_COUNT_ALL = """
import os, signal, time
def told(number, _):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, told)
print("ready", flush=True)
while True:
    time.sleep(1)
"""


def test_a_command_that_ignores_sigterm_is_killed_by_the_third(runs: Runs) -> None:
    run = runs.start(sys.executable, "-c", _COUNT_ALL)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    for _ in range(2):
        run.terminate()
        assert run.stdout.readline() == "SIGTERM\n"
    run.terminate()
    output, errors = run.communicate(timeout=30)
    assert (run.returncode, output) == (128 + signal.SIGKILL, "")
    assert errors.splitlines()[-1] == "cknix: killed the command, which got SIGTERM 3 times"
    assert runs.traces() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_what_a_program_may_be_told_often_never_kills_it(runs: Runs, number: signal.Signals) -> None:
    run = runs.start(sys.executable, "-c", _COUNT_ALL)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    for _ in range(6):
        run.send_signal(number)
        assert run.stdout.readline() == f"{number.name}\n"
    assert run.poll() is None


class _Terminal:
    """A run in a terminal, and a person who reads and types."""

    def __init__(self, runs: Runs, *argv: str) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(REPOSITORY)
            command = Runs.command(*argv, options=("-q", "-f", str(HELLO)))
            os.execve(command[0], command, {**runs.environ, "TERM": "dumb", "PS1": "$ "})
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def until(self, text: str) -> None:
        """Read until *text* is shown, after what was shown before."""
        start, deadline = len(self.shown), time.monotonic() + 30
        while text not in self.shown[start:]:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.shown!r}"
            ready, _, _ = select.select([self._terminal], [], [], 0.1)
            if ready:
                self.shown += os.read(self._terminal, 4096).decode(errors="replace")

    def foreground(self) -> int:
        """The process group that has the terminal."""
        return os.tcgetpgrp(self._terminal)

    def ended(self) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._terminal)
        return code


def test_a_shell_has_job_control(runs: Runs) -> None:
    terminal = _Terminal(runs, "bash", "--norc", "--noprofile", "--noediting", "-i")
    terminal.until("$ ")
    assert "no job control" not in terminal.shown
    terminal.type("sleep 1000\n")
    wait_until(lambda: "sleep\0001000" in _command_lines(runs), "the shell runs it")
    terminal.type("\x1a")
    terminal.until("Stopped")
    terminal.type("bg; jobs\n")
    terminal.until("Running")
    shell = terminal.foreground()
    terminal.type("fg\n")
    wait_until(lambda: terminal.foreground() != shell, "the job has the terminal")
    for _ in range(4):  # a person's interrupts reach the job, then the shell, and end no shell
        terminal.type("\x03")
        terminal.until("$ ")
    terminal.type("echo still $((40 + 2))\n")
    terminal.until("still 42")
    terminal.type("exit 6\n")
    terminal.until("exit")
    assert terminal.ended() == 6
    assert runs.traces() == {}


def test_a_killed_run_takes_a_shell_and_its_jobs_out_of_the_terminal(runs: Runs) -> None:
    terminal = _Terminal(runs, "bash", "--norc", "--noprofile", "--noediting", "-i")
    terminal.until("$ ")
    terminal.type("sleep 1000 & sleep 1000\n")
    wait_until(lambda: _command_lines(runs).count("sleep\0001000") == 2, "the shell runs them")
    os.kill(terminal.pid, signal.SIGKILL)
    assert terminal.ended() == -signal.SIGKILL
    wait_until(lambda: runs.processes() == [], "all have ended")
    assert runs("true").code == 0
    assert runs.traces() == {}


def _command_lines(runs: Runs) -> str:
    found = []
    for pid in runs.processes():
        with suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_text())
    return "\n".join(found)


@pytest.mark.parametrize("when", ["build", "command"])
def test_the_next_run_clears_up_after_a_killed_one(runs: Runs, when: str) -> None:
    ready, tag = runs.env.directory / "ready", uuid.uuid4().hex
    if when == "build":
        options: tuple[str, ...] = runs.package(f'slow {{ seconds = 2; tag = "{tag}"; }}')
        run = runs.start("slow", options=options)
        wait_until(lambda: _builders(tag), "the builder runs")
    else:
        options = (*runs.package("busybox"), "--writable")
        run = runs.start(*script(f"touch {quoted(ready)}", "exec sleep 1000"), options=options)
        wait_until(ready.exists, "the command runs")
    assert len(runs.scratches()) == 1
    assert runs.roots() != []
    if when == "command":
        os.killpg(run.pid, signal.SIGKILL)
    else:
        run.kill()
    _ended(run)
    again = runs("true", options=options)
    assert again.code == 0, again.err
    wait_until(lambda: runs.traces() == {}, "nothing is left")
