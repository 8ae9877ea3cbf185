"""However ``cknix-csi run`` is ended, and in whatever moment: nothing is left, or the next run clears it up."""

from __future__ import annotations

import os
import pty
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
    assert _ended(run) == 128 + number
    assert runs.traces() == {}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_build_ends_it(with_each_nix: Runs, number: signal.Signals) -> None:
    runs, tag = with_each_nix, uuid.uuid4().hex
    run = runs.start("true", options=runs.package(f'slow {{ seconds = 60; tag = "{tag}"; }}'))
    wait_until(lambda: _builders(tag), "the builder runs")
    run.send_signal(number)
    # An impatient person's second one: the clearing up goes on.
    run.send_signal(number)
    assert _ended(run) == 128 + number
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


@pytest.mark.parametrize("options", [(), ("--writable",)], ids=["read-only", "writable"])
def test_a_command_outlives_the_killed_run_with_its_volume(runs: Runs, options: tuple[str, ...]) -> None:
    ready, go, result = (runs.env.directory / name for name in ("ready", "go", "result"))
    lines = (
        "touch /nix/written || :",
        f"touch {quoted(ready)}",
        f"while [ ! -e {quoted(go)} ]; do sleep 0.05; done",
        f"{{ hello; ls /nix; }} > {quoted(result)}.new; mv {quoted(result)}.new {quoted(result)}",
    )
    run = runs.start(*script(*lines), options=(*runs.package("hello"), *options))
    wait_until(ready.exists, "the command runs")
    [scratch] = runs.scratches()
    run.kill()
    run.wait()
    # Other runs and a garbage collection pass; then the command looks again.
    assert runs("hello", options=runs.package('greet "the next one"')).code == 0
    runs.env.run("nix-store", "--gc")
    assert runs.scratches() == [scratch]
    go.touch()
    wait_until(result.exists, "the command has looked")
    assert GREETING in result.read_text()
    assert ("written" in result.read_text().split()) == bool(options)
    wait_until(lambda: runs.processes() == [], "the command has ended")
    assert runs("true").code == 0
    assert runs.traces() == {}


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
