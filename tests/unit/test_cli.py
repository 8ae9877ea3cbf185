"""The command line as a user meets it: help at once, mistakes told clearly, errors without a traceback."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cknix_csi import __version__, cli, logs
from cknix_csi.api.errors import CknixError, Invalid, Problem
from cknix_csi.run import command

REPOSITORY = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "cknix_csi.cli", *arguments]
    return subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)


def test_help_comes_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = _run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.returncode == 0
    # Processor time, so that a busy machine changes nothing.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.3


def test_help_imports_nothing_that_takes_long() -> None:
    lines = (
        "import sys",
        "before = set(sys.modules)",
        "from cknix_csi import cli",
        "cli.parser().format_help()",
        "print(*(set(sys.modules) - before))",
    )
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    imported = {name.partition(".")[0] for name in ran.stdout.split()}
    assert imported <= sys.stdlib_module_names | {"cknix_csi"}
    assert "asyncio" not in imported


def test_the_help_names_every_role_and_option() -> None:
    top, run = _run("--help").stdout, _run("run", "--help").stdout
    assert all(role in top for role in ("controller", "node", "provisioner", "run", "probe", "volumes"))
    options = (
        "--file FILE",
        "--name NAME",
        "--restricted",
        "--expr TEXT",
        "--flake REF",
        "--store-path PATH",
        "--writable",
        "--data-root DIR",
        "-q",
    )
    assert all(option in run for option in options)
    for role in ("controller", "node", "provisioner"):
        assert "--log-format {text,json}" in _run(role, "--help").stdout


def test_the_version_is_the_packages() -> None:
    assert _run("--version").stdout == f"cknix-csi {__version__}\n"
    assert f'\nversion = "{__version__}"\n' in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("rnu",), "invalid choice: 'rnu'"),
        (("run",), "one of the arguments -f/--file --expr --flake --store-path is required"),
        (("run", "-f"), "argument -f/--file: expected one argument"),
        (("run", "-f", "a", "--expr", "b"), "argument --expr: not allowed with argument -f/--file"),
        (("run", "--expr", "1", "--data-root", ""), "argument --data-root: is empty"),
        (("run", "--expr", "1", "--writeable"), "unrecognized arguments: --writeable"),
        (("run", "--expr", "1", "--write"), "unrecognized arguments: --write"),
        (("run", "--expr", "1", "ls", "-l"), "unrecognized arguments: -l; put -- before the command"),
        (("node", "--log-format", "xml"), "argument --log-format: invalid choice: 'xml'"),
        (("node", "--data-root", "x"), "unrecognized arguments: --data-root x"),
        (("probe", "--data-root", ""), "argument --data-root: is empty"),
        (("probe", "now"), "unrecognized arguments: now"),
    ],
)
def test_wrong_arguments_are_told_with_code_2(arguments: tuple[str, ...], words: str) -> None:
    ran = _run(*arguments)
    assert ran.returncode == 2
    named = arguments[:1] if arguments and arguments[0] in {"run", "node", "probe"} else ()
    assert ran.stderr.startswith(" ".join(("usage: cknix-csi", *named, "[-h]")))
    assert words in ran.stderr.splitlines()[-1]


def test_everything_after_the_dashes_is_the_commands() -> None:
    words = ["sh", "-c", "-q", "--", "--file", "x", ""]
    options = cli.parser().parse_args(["run", "-f", "a.yaml", "-q", "--writable", "--", *words])
    assert options.argv == words
    assert (options.file, options.quiet, options.writable) == (Path("a.yaml"), True, True)


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (CknixError("no"), 1, ["cknix-csi run: no"]),
        (
            Invalid([Problem("spec.a", "is bad"), Problem("spec.b", "is worse")]),
            2,
            ["cknix-csi run: spec.a: is bad", "cknix-csi run: spec.b: is worse"],
        ),
        (
            CknixError("compiling\nboom\nerror: builder for '/nix/store/x.drv' failed with exit code 3"),
            1,
            [
                "cknix-csi run: builder for '/nix/store/x.drv' failed with exit code 3: boom",
                "",
                "compiling",
                "boom",
                "error: builder for '/nix/store/x.drv' failed with exit code 3",
            ],
        ),
        (KeyboardInterrupt(), 130, ["cknix-csi run: interrupted"]),
    ],
)
def test_an_error_is_one_line_per_problem_and_comes_before_a_log(
    error: BaseException,
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(command, "run", fail)
    assert cli.main(["run", "--expr", "1"]) == code
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("role", ["controller", "node", "provisioner"])
def test_the_log_format_of_the_command_line_comes_before_the_environments(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def serve(environment: Mapping[str, str]) -> int:
        found.append(environment.get("CKNIX_LOG_FORMAT"))
        return 0

    monkeypatch.setattr(f"cknix_csi.serve.{role}", serve)
    monkeypatch.setenv("CKNIX_LOG_FORMAT", "text")
    for arguments in ((), ("--log-format", "json")):
        assert cli.main([role, *arguments]) == 0
    assert found == ["text", "json"]


def test_the_command_line_offers_the_formats_that_there_are() -> None:
    for form in logs.FORMATS:
        assert cli.parser().parse_args(["node", "--log-format", form]).log_format == form


@pytest.mark.parametrize("role", ["controller", "node"])
def test_bad_settings_of_a_role_are_all_told(role: str) -> None:
    program = [sys.executable, "-m", "cknix_csi.cli", role]
    environ = {"CKNIX_DATA_ROOT": "x", "CKNIX_LOG_LEVEL": "loud"}
    ran = subprocess.run(program, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == [
        f"cknix-csi {role}: environment variable CKNIX_DATA_ROOT: 'x' is not an absolute path",
        f"cknix-csi {role}: environment variable CKNIX_LOG_LEVEL: 'loud' is not one of debug, info, warning, error",
    ]
