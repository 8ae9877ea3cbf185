"""``cknix-csi run``, the real thing: builds with each real Nix, mounts, runs, and leaves the store and nothing else."""

from __future__ import annotations

import os
import pty
import re
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests import nixes
from tests.nixes import host_busybox
from tests.node.runs import GREETING, HELLO, REPOSITORY, Runs, quoted, runs_with, script


@pytest.fixture(params=nixes.selected(), ids=nixes.name_of)
def with_each_nix(request: pytest.FixtureRequest) -> Iterator[Runs]:
    yield from runs_with(request.param.name)


@pytest.fixture
def runs() -> Iterator[Runs]:
    yield from runs_with(nixes.selected()[0].name)


def test_the_demo_prints_its_greeting_and_the_second_time_builds_nothing(with_each_nix: Runs) -> None:
    runs = with_each_nix
    for _ in range(2):
        ran = runs("hello", quiet=False)
        assert ran.code == 0, ran.err
        assert re.fullmatch(rf"Hello from /nix/store/\S+-hello: {re.escape(GREETING)}\n", ran.out)
        assert runs.traces() == {}
    evaluated, result, started = ran.err.splitlines()  # and no line of a build
    assert evaluated == "cknix: evaluating hello"
    assert re.fullmatch(r"cknix: /nix/store/\S+-hello \(evaluated in [\d.]+ s, built in [\d.]+ s\)", result)
    assert re.fullmatch(r"cknix: known closure to running command: \d+ ms", started)


def test_expression_flake_and_store_path_come_to_the_same(with_each_nix: Runs) -> None:
    runs = with_each_nix
    flake = runs.env.directory / "flake"
    shutil.copytree(REPOSITORY / "nix/demo", flake)
    shutil.copy(host_busybox(), flake / "busybox")
    greeting = runs("hello").out
    from_text = runs("hello", options=runs.package("hello"))
    assert (from_text.code, from_text.out) == (0, greeting), from_text.err
    from_flake = runs("hello", options=("--flake", "path:.#hello"), cwd=flake)
    assert from_flake.code == 0, from_flake.err
    assert GREETING in from_flake.out
    exact = runs("hello", options=("--store-path", greeting.split()[2].removesuffix(":")))
    assert (exact.code, exact.out) == (0, greeting), exact.err


def test_a_file_may_hold_other_objects_beside_the_expression(runs: Runs) -> None:
    file = runs.env.directory / "several.yaml"
    pod = (REPOSITORY / "yaml/test/pod.yaml").read_text()
    file.write_text(f"---\n{pod}---\n{HELLO.read_text()}---\n")
    ran = runs("hello", options=("-f", str(file)))
    assert ran.code == 0, ran.err


def test_evaluation_sees_the_machine_unless_it_is_restricted_as_the_controllers_is(with_each_nix: Runs) -> None:
    runs = with_each_nix
    secret = runs.env.directory / "secret"
    secret.write_text("greeting")
    expression = f"with import <cknix-demo> {{}}; greet (builtins.readFile {secret})"
    assert runs("hello", options=("--expr", expression)).code == 0
    refused = runs("hello", options=("--expr", expression, "--restricted"))
    assert refused.code == 1
    assert "forbidden in restricted mode" in refused.err
    assert runs("hello", options=("-f", str(HELLO), "--restricted")).code == 0
    assert runs.traces() == {}


def test_an_expression_comes_from_standard_input(runs: Runs) -> None:
    ran = runs("hello", options=("-f", "-"), stdin=HELLO.read_text())
    assert ran.code == 0, ran.err
    assert GREETING in ran.out


@pytest.mark.parametrize("name", ["second", "default/second"])
def test_one_of_several_expressions_is_chosen_by_its_name(runs: Runs, name: str) -> None:
    """Of a list, as ``kubectl get expr --output yaml`` prints it, with status."""
    items = [
        {
            "apiVersion": "cknix.cool/v1",
            "kind": "Expression",
            "metadata": {"name": each, "namespace": "default", "uid": "u", "generation": 1},
            "spec": {"data": {"expr": f'with import <cknix-demo> {{}}; greet "{each}"'}},
            "status": {"phase": "Succeeded"},
        }
        for each in ("first", "second")
    ]
    listed = yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": items, "metadata": {}})
    ran = runs("hello", options=("-f", "-", "--name", name), stdin=listed)
    assert ran.code == 0, ran.err
    assert "second" in ran.out


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -TERM $$"), 128 + 15),
        (("sh", "-c", "kill -KILL $$"), 128 + 9),
        (("no-such-command",), 127),
        (("/nix/var",), 126),
    ],
)
def test_the_exit_code_is_the_commands_own(runs: Runs, command: tuple[str, ...], code: int) -> None:
    ran = runs(*command)
    assert ran.code == code, ran.err
    assert runs.traces() == {}


def test_a_command_that_is_not_found_is_named(runs: Runs) -> None:
    assert "no-such-command: not found" in runs("no-such-command").err


def test_output_and_input_are_the_commands_own(runs: Runs) -> None:
    ran = runs("sh", "-c", "cat; echo trouble >&2", stdin="x\n" * 50_000)
    assert (ran.code, ran.out, ran.err) == (0, "x\n" * 50_000, "trouble\n")


def test_arguments_reach_the_command_as_they_are(runs: Runs) -> None:
    words = ["--help", "-q", "--", "a b", "*", "$HOME", "", "--file=x"]
    assert runs("printf", "%s\\n", *words).out.splitlines() == words


def test_environment_directory_and_umask_are_the_callers(runs: Runs) -> None:
    lines = ("echo $GREETING", "pwd", "umask", "echo $PATH")
    ran = runs(
        *script(*lines),
        cwd=Path("/usr/share"),
        environ={"GREETING": "good day"},
        before=("sh", "-c", 'umask 027; exec "$@"', "sh"),
    )
    assert ran.out.splitlines() == ["good day", "/usr/share", "0027", f"/nix/var/result/bin:{runs.environ['PATH']}"]


@pytest.mark.parametrize("mode", [(), ("--writable",)], ids=["read-only", "writable"])
def test_a_callers_strict_umask_does_not_close_the_volume_to_others(runs: Runs, mode: tuple[str, ...]) -> None:
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/nix/var/result/bin/hello")
    strict = ("sh", "-c", 'umask 077; exec "$@"', "sh")
    ran = runs(*as_nobody, options=("-f", str(HELLO), *mode), before=strict)
    assert ran.code == 0, ran.err
    assert GREETING in ran.out


def test_the_programs_of_the_closure_come_first(runs: Runs) -> None:
    ran = runs("sh", "-c", "command -v hello; readlink /proc/$$/exe", options=runs.package("toolbox"))
    hello, shell = ran.out.split()
    assert hello == "/nix/var/result/bin/hello"
    assert re.fullmatch(r"/nix/store/\S+-busybox/bin/busybox", shell)


def test_without_a_command_it_is_the_users_shell(runs: Runs) -> None:
    assert runs(stdin="hello; echo $0", environ={"SHELL": "/bin/bash"}).out.splitlines()[1] == "/bin/bash"
    assert GREETING in runs(stdin="hello", environ={"SHELL": ""}).out


def test_exactly_the_closure_is_there(runs: Runs) -> None:
    ran = runs("ls", "/nix/store")
    result = runs("readlink", "/nix/var/result").out.strip()
    closure = runs.env.lines("nix-store", "--query", "--requisites", result)
    assert sorted(f"/nix/store/{name}" for name in ran.out.split()) == sorted(closure)


def test_a_read_only_volume_refuses_and_a_remount_changes_nothing(runs: Runs) -> None:
    ran = runs(*script("touch /nix/x 2>&1 || echo refused", "mount -o remount,rw,bind /nix", "touch /nix/x"))
    assert "refused" in ran.out
    assert ran.code != 0
    assert "Read-only file system" in ran.err


def test_what_is_written_is_discarded_and_the_store_stays_as_it_was(runs: Runs) -> None:
    assert runs("true").code == 0
    before = runs.store_digest()
    lines = (
        "echo changed > /nix/var/result/bin/hello",
        "rm -r /nix/store/*-hello-word*",
        "mkdir /nix/store/new /nix/new",
        "cat /nix/var/result/bin/hello",
    )
    ran = runs(*script(*lines), options=("-f", str(HELLO), "--writable"))
    assert (ran.code, ran.out) == (0, "changed\n"), ran.err
    assert runs.traces() == {}
    assert runs.store_digest() == before
    assert GREETING in runs("hello", options=("-f", str(HELLO), "--writable")).out


def test_the_data_root_may_be_named_relative_to_the_current_directory(runs: Runs) -> None:
    options = ("-f", str(HELLO), "--data-root", "relative/root")
    ran = runs("hello", options=options, cwd=runs.env.directory)
    assert ran.code == 0, ran.err
    assert (runs.env.directory / "relative/root/nix/store").is_dir()
    assert not runs.data_root.joinpath("nix").exists()


def test_a_data_root_whose_path_is_longer_than_a_sockets_works(runs: Runs) -> None:
    # sockaddr_un has 107 bytes; an overlay's options leave 110 to the data root.
    root = runs.env.directory / "x" / "long"
    root = root.with_name("l" * (110 - len(str(root.parent)) - 1))
    ran = runs("hello", options=("-f", str(HELLO), "--data-root", str(root), "--writable"))
    assert ran.code == 0, ran.err


def test_eight_runs_at_once_share_a_data_root(runs: Runs) -> None:
    def run(number: int) -> str:
        writable = ["--writable"] if number % 2 else []
        ran = runs("sh", "-c", "hello && sleep 0.5", options=[*runs.package(f'greet "{number % 3}"'), *writable])
        assert ran.code == 0, ran.err
        return ran.out.rpartition(" ")[2].strip()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(run, range(8))) == [str(number % 3) for number in range(8)]
    assert runs.traces() == {}


def test_results_are_the_garbage_collectors_once_no_run_uses_them(runs: Runs) -> None:
    collect = f"{quoted(runs.env.nix.bin_dir / 'nix-store')} --gc --store {runs.env.store} >&2"
    during = runs(*script("hello", collect, "hello"))
    assert during.code == 0, during.err
    assert during.out.count(GREETING) == 2
    runs.env.run("nix-store", "--gc")
    assert list((runs.data_root / "nix/store").glob("*-hello")) == []


def test_a_machine_that_shares_its_mounts_sees_none_of_ours(runs: Runs) -> None:
    ready, go = runs.env.directory / "ready", runs.env.directory / "go"
    command = f"touch {quoted(ready)}; while [ ! -e {quoted(go)} ]; do sleep 0.05; done; hello"
    lines = (
        'before=$(cat /proc/self/mountinfo); "$@" &',
        f"while [ ! -e {quoted(ready)} ]; do sleep 0.05; done",
        'test "$(cat /proc/self/mountinfo)" = "$before"',
        f"touch {quoted(go)}; wait $!",
        'test "$(cat /proc/self/mountinfo)" = "$before"',
    )
    ran = runs(
        "sh",
        "-c",
        command,
        before=("timeout", "30", "unshare", "--mount", "--propagation", "shared", *script(*lines), "sh"),
    )
    assert ran.code == 0, ran.err
    assert GREETING in ran.out


def test_a_host_without_a_nix_directory_has_none_afterwards(runs: Runs) -> None:
    layers = runs.env.directory / "host"
    for name in ("upper", "work", "root"):
        (layers / name).mkdir(parents=True)
    # This machine as it is, only without /nix: a whiteout (overlayfs documentation) hides it.
    os.mknod(layers / "upper/nix", 0o020000 | 0o600, os.makedev(0, 0))
    options = f"lowerdir=/,upperdir={layers / 'upper'},workdir={layers / 'work'}"
    lines = (
        f"mount -t overlay -o {options} host {layers / 'root'}",
        f"cd {layers / 'root'}",
        "test ! -e nix",
        "for name in proc dev var/tmp; do mount --rbind /$name $name; done",
        # Not chroot, in which nobody may make the user namespaces of Nix's sandbox (user_namespaces(7)).
        "pivot_root . mnt",
        "umount --lazy /mnt",
        f"cd {REPOSITORY}",
        'exec "$@"',
    )
    ran = runs("hello", before=("unshare", "--mount", *script(*lines), "sh"))
    assert ran.code == 0, ran.err
    assert GREETING in ran.out
    assert not (layers / "upper/nix").is_dir()


def test_the_second_run_takes_at_most_two_seconds_of_our_own_time(runs: Runs) -> None:
    assert runs("true").code == 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert runs("hello").code == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, Nix's included, so that a busy machine changes nothing.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 2.0


def test_in_a_terminal_progress_is_one_line_that_is_gone_at_the_end(runs: Runs) -> None:
    ours, theirs = pty.openpty()
    command = Runs.command("true", options=runs.package("chain 3"))
    if (pid := os.fork()) == 0:
        os.dup2(theirs, 2)
        os.closerange(3, 256)
        os.chdir(REPOSITORY)
        os.execve(command[0], command, runs.environ)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65_536):
            written += chunk
    except OSError:  # the other end has been closed
        pass
    assert os.waitpid(pid, 0)[1] == 0
    os.close(ours)
    assert b"cknix: building" in written
    shown = [line.rpartition(b"\r\x1b[K")[2] for line in written.split(b"\r\n")]
    assert not any(b"building" in line for line in shown)
    assert written.count(b"\r\n") == 3
