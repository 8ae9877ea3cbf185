"""What ``cknix-csi run`` says when it cannot: one clean line per problem, or Nix's own words, and nothing half done."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests import nixes
from tests.node.runs import HELLO, Runs, runs_with, script

USAGE = 2


@pytest.fixture
def runs() -> Iterator[Runs]:
    yield from runs_with(nixes.selected()[0].name)


@pytest.fixture(params=nixes.selected(), ids=nixes.name_of)
def with_each_nix(request: pytest.FixtureRequest) -> Iterator[Runs]:
    yield from runs_with(request.param.name)


def _expression(spec: str) -> str:
    return f"apiVersion: cknix.cool/v1\nkind: Expression\nmetadata: {{name: x}}\nspec: {spec}\n"


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        (b"a: [\n  b", ["{file}: is not YAML: line 2, column 4: expected ',' or ']', but got '<stream end>'"]),
        (b"a: \x00", ["{file}: is not YAML: unacceptable character #x0000: special characters are not allowed in *"]),
        (b"\xff\xfe", ["{file}: cannot be read: byte 1 is not UTF-8"]),
        (b"", ["{file}: must hold an object of kind Expression; found none"]),
        (b"kind: Pod\n---\n- 1\n", ["{file}: must hold an object of kind Expression; found none, but Pod"]),
        (
            b"kind: Expresion\n---\nkind: List\nitems: [{kind: Pod}]\n",
            ["{file}: must hold an object of kind Expression; found none, but Expresion, Pod"],
        ),
        (
            b"kind: Expression\n---\nkind: Expression\nmetadata: {name: b}\n",
            ["{file}: holds 2 Expressions: unnamed, b; choose one with --name"],
        ),
        (
            b"kind: Expression\napiVersion: cknix.cool/v1\nspce: {}\n",
            ['spce: is not a known field; did you mean "spec"?', "spec: is missing"],
        ),
        (
            b"kind: Expression\napiVersion: cknix.cool/v2\nMetadata: {}\nspec: {dat: {}, refresh: 1s}\n",
            [
                'Metadata: is not a known field; did you mean "metadata"?',
                "apiVersion: is 'cknix.cool/v2', expected 'cknix.cool/v1'",
                'spec.dat: is not a known field; did you mean "data"?',
                "spec.data: is required: an object with exactly one of expr, flakeRef, storePath",
                "spec.refresh: is 1s; the shortest is 60s",
            ],
        ),
        (b"kind: Expression\napiVersion: cknix.cool/v1\nspec: text\n", ["spec: must be an object"]),
        (b"kind: Expression\napiVersion: v1\n", ["apiVersion: is 'v1', expected 'cknix.cool/v1'", "spec: is missing"]),
        (
            _expression("{data: {exprs: x}, refresh: 1s}").encode(),
            [
                'spec.data.exprs: is not a known field; did you mean "expr"?',
                "spec.data: needs exactly one of expr, flakeRef, storePath; found none",
                "spec.refresh: is 1s; the shortest is 60s",
            ],
        ),
        (
            _expression("{data: {expr: '1'}, systems: [riscv64-linux]}").encode(),
            ["spec.systems: does not name this machine's system x86_64-linux"],
        ),
    ],
)
def test_a_bad_file_is_told_with_every_problem(runs: Runs, content: bytes, problems: list[str]) -> None:
    file = runs.env.directory / "x.yaml"
    file.write_bytes(content)
    ran = runs("true", options=("-f", str(file)), environ={"CKNIX_SYSTEM": "x86_64-linux"})
    assert ran.code == USAGE
    expected = [problem.format(file=file) for problem in problems]
    assert len(ran.problems) == len(expected)
    for problem, wanted in zip(ran.problems, expected, strict=True):
        assert problem == wanted or (wanted.endswith("*") and problem.startswith(wanted[:-1]))
    assert runs.traces() == {}


_TWO = "\n---\n".join(
    f"apiVersion: cknix.cool/v1\nkind: Expression\nmetadata: {{name: tools, namespace: {namespace}}}\nspec: {{}}"
    for namespace in ("a", "b")
)


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        (
            _TWO,
            "tols",
            "--name: 'tols' is none of the Expressions in standard input: tools, tools; did you mean 'tools'?",
        ),
        (_TWO, "tools", "--name: 'tools' is the name of a/tools, b/tools in standard input; name one of these"),
        (_TWO, "b/tools", "spec.data: is required: an object with exactly one of expr, flakeRef, storePath"),
        ("\xff", "x", "standard input: must hold an object of kind Expression; found none"),
        (
            "a: [",
            None,
            "standard input: is not YAML: line 1, column 5: expected the node content, but found '<stream end>'",
        ),
    ],
)
def test_a_choice_that_cannot_be_made_is_told(runs: Runs, content: str, name: str | None, problem: str) -> None:
    options = ("-f", "-", *(("--name", name) if name else ()))
    ran = runs("true", options=options, stdin=content)
    assert ran.code == USAGE
    [told] = ran.problems
    assert told.startswith(problem[:-1]) if problem.endswith("*") else told == problem


@pytest.mark.parametrize(
    ("options", "environ", "problems"),
    [
        (("--expr", "1", "--name", "x"), {}, ["--name: chooses among the Expressions of a file; give --file"]),
        (("-f", "/nowhere.yaml"), {}, ["/nowhere.yaml: cannot be read: No such file or directory"]),
        (("-f", "/usr"), {}, ["/usr: cannot be read: Is a directory"]),
        (("--expr", " "), {}, ["--expr: must be text that is not blank and holds no NUL"]),
        (
            ("--flake", "a b"),
            {},
            [
                "--flake: 'a b' is not a flake reference: it may not hold spaces or control characters, "
                "nor begin with '-'"
            ],
        ),
        (
            ("--store-path", "/nix/store/x"),
            {},
            [
                "--store-path: '/nix/store/x' is not a store path: the hash must be 32 characters of Nix base32 "
                "(0-9 a-z without e o t u)"
            ],
        ),
        (
            ("--expr", "1", "--data-root", "/"),
            {},
            ["--data-root: / cannot be it: choose a directory below /, and not in /nix"],
        ),
        (
            ("--expr", "1", "--data-root", "/nix/var/cknix"),
            {},
            ["--data-root: /nix/var/cknix cannot be it: choose a directory below /, and not in /nix"],
        ),
        (
            ("--expr", "1"),
            {"CKNIX_DATA_ROOT": "relative", "CKNIX_BUILD_TIMEOUT": "soon"},
            [
                "environment variable CKNIX_DATA_ROOT: 'relative' is not an absolute path",
                "environment variable CKNIX_BUILD_TIMEOUT: 'soon' is not a time; write seconds, or for example 15m "
                "or 1h30m",
            ],
        ),
    ],
)
def test_bad_arguments_and_settings_are_told_by_their_names(
    runs: Runs, options: tuple[str, ...], environ: dict[str, str], problems: list[str]
) -> None:
    ran = runs("true", options=options, environ=environ)
    assert (ran.code, ran.problems) == (USAGE, problems)
    assert runs.traces() == {}


def test_a_data_root_that_cannot_stand_in_mount_options_is_refused_before_anything_is_built(runs: Runs) -> None:
    root = runs.env.directory / "a b"
    ran = runs("true", options=(*runs.package("hello"), "--data-root", str(root)))
    assert ran.code == USAGE
    assert ran.problems[0].startswith(f"data root: '{root}/runs/")
    assert not (root / "nix").exists()


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("1 +", ["syntax error", "expr:1:"]),
        ("builtins.nonsense", ["attribute 'nonsense' missing", "expr:1:"]),
        ("(import <cknix-demo> {}).throws", ["cknix-demo: this evaluation fails on purpose"]),
        ("(import <cknix-demo> {}).notAPackage", ["type int; it must evaluate to a derivation or a store path"]),
        ("import <nowhere>", ["file 'nowhere' was not found in the Nix search path"]),
    ],
)
def test_a_failed_evaluation_is_told_in_nixs_words(with_each_nix: Runs, expression: str, words: list[str]) -> None:
    ran = with_each_nix("true", options=("--expr", expression))
    assert ran.code == 1
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err
    assert with_each_nix.traces() == {}


def test_a_failed_build_shows_the_builders_last_lines(with_each_nix: Runs) -> None:
    ran = with_each_nix("true", options=with_each_nix.package("needsBroken"))
    assert ran.code == 1
    assert "compiling 2 of 2\ncknix-demo: this package is broken on purpose\n" in ran.err
    assert "failed with exit code 3" in ran.err
    assert with_each_nix.traces() == {}


def test_a_build_without_end_is_stopped_after_its_time(runs: Runs) -> None:
    options = runs.package("slow { seconds = 60; }")
    ran = runs("true", options=options, environ={"CKNIX_BUILD_TIMEOUT": "2s"})
    assert ran.code == 1
    assert "did not end within 2s and was stopped; raise CKNIX_BUILD_TIMEOUT" in ran.err
    assert runs.traces() == {}


def test_a_store_path_that_nobody_has_is_named(runs: Runs) -> None:
    path = f"/nix/store/{'0' * 32}-nothing"
    ran = runs("true", options=("--store-path", path))
    assert ran.code == 1
    assert f"{path} is not in the store and no substituter has it" in ran.err


def test_who_is_not_root_is_told_so(runs: Runs) -> None:
    # By a copy of this user's rights alone: the real file may not be readable to others.
    ran = runs("true", before=("setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", "--no-new-privs"))
    if "Permission denied" in ran.err:
        pytest.skip("the interpreter of this virtual environment is closed to others")
    assert ran.code == 1
    assert ran.problems == ["mounting needs root: run it with sudo, or as root in a container with CAP_SYS_ADMIN"]


def test_root_without_the_right_to_mount_is_told_so(runs: Runs) -> None:
    ran = runs("true", before=("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"))
    assert ran.code == 1
    assert ran.problems == [
        "cannot enter a mount namespace: Operation not permitted (unshare); the driver needs CAP_SYS_ADMIN: "
        "its container must be privileged"
    ]
    assert runs.traces() == {}


def test_a_missing_nix_is_told_with_its_debian_package(runs: Runs) -> None:
    ran = runs("true", environ={"PATH": str(runs.env.directory)})
    assert ran.code == 1
    assert ran.problems == [
        "the Nix commands are not on PATH; on Debian: apt-get install --no-install-recommends nix-bin"
    ]


@pytest.mark.parametrize(
    ("name", "why"),
    [("file", "File exists"), ("file/below", "Not a directory"), ("read-only/root", "Read-only file system")],
)
def test_a_data_root_that_cannot_be_made_is_told(runs: Runs, name: str, why: str) -> None:
    directory = runs.env.directory
    (directory / "file").touch()
    (directory / "read-only").mkdir()
    mount = f"mount -t tmpfs -o ro none {directory / 'read-only'}"
    options = ("-f", str(HELLO), "--data-root", str(directory / name))
    ran = runs("true", options=options, before=("unshare", "--mount", *script(mount, 'exec "$@"'), "sh"))
    assert ran.code == 1
    [problem] = ran.problems
    assert problem.startswith(f"cannot work in the data root {directory / name}: {why}")


@pytest.mark.parametrize("size", ["64k", "1m", "3m", "5m", "6m"])
def test_a_full_disk_is_told_and_what_could_be_written_is_taken_away(runs: Runs, size: str) -> None:
    root = runs.env.directory / "small"
    root.mkdir()
    lines = (
        f"mount -t tmpfs -o size={size} none {root}",
        'code=0; "$@" || code=$?',
        f'test -z "$(ls {root}/runs 2>&1 | grep -v "No such file")"',
        f"test -z \"$(find {root}/nix/var/nix/gcroots/cknix -type l 2>&1 | grep -v 'No such file')\"",
        "exit $((100 + code))",
    )
    options = ("-f", str(HELLO), "--data-root", str(root), "--writable")
    ran = runs(
        "sh", "-c", "cat /dev/zero > /nix/all", options=options, before=("unshare", "--mount", *script(*lines), "sh")
    )
    assert ran.code == 101
    assert "No space left on device" in ran.err or "disk is full" in ran.err, ran.err
    assert "Traceback" not in ran.err


def test_a_data_root_on_an_overlay_serves_readers_and_is_told_to_writers(runs: Runs) -> None:
    layers = runs.env.directory / "layers"
    for name in ("lower", "upper", "work", "merged"):
        (layers / name).mkdir(parents=True)
    overlay = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
    before = ("unshare", "--mount", *script(f"mount -t overlay -o {overlay} none {layers}/merged", 'exec "$@"'), "sh")
    options = ("-f", str(HELLO), "--data-root", f"{layers}/merged/root")
    readers = runs("hello", options=options, before=before)
    assert readers.code == 0, readers.err
    writers = runs("hello", options=(*options, "--writable"), before=before)
    assert writers.code == 1
    [problem] = writers.problems
    assert "not supported as upperdir" in problem


def test_output_that_nobody_reads_is_the_commands_matter(runs: Runs) -> None:
    command = Runs.command("yes", options=("-q", "-f", str(HELLO)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=runs.environ) as run:
        assert run.stdout is not None
        assert run.stdout.read(2) == b"y\n"
        run.stdout.close()
        assert run.stderr is not None
        run.stderr.read()
    assert run.returncode == 128 + 13
    assert runs.traces() == {}


def test_a_store_that_lost_a_path_gets_it_back(runs: Runs) -> None:
    result = runs("readlink", "/nix/var/result").out.strip()
    lost = runs.env.physical(result)
    lost.rename(lost.with_name("lost"))
    ran = runs("hello")
    assert ran.code == 0, ran.err
    assert lost.is_dir()
    assert runs.traces() == {}
