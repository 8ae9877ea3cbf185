"""Evaluation with every supported Nix: what an Expression may be, how a mistake is told, what it may not read."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cknix_csi.api.errors import CknixError, DeadlineExceeded, EvaluationFailed
from cknix_csi.api.expression import Data
from cknix_csi.api.situations import Code
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.nix import process
from cknix_csi.nix.nix import Evaluation
from tests.nix.room import DEMO, SYSTEM, Room, processes_of, write_flake
from tests.nixes import NixEnv, NixVersion, host_busybox

HELLO = "/nix/store/6c1vlf6kyyl0x5cjdhvr3bymgxa74fjb-hello"
# Hours of work, in little memory.
ENDLESS = "builtins.foldl' (a: b: b) 0 (builtins.genList (n: builtins.length (builtins.genList (i: i) 200000)) 9000000)"
PACKAGES = "(import <cknix-demo> { })"


@pytest.fixture(scope="module")
def env(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NixEnv]:
    env = NixEnv(nix, tmp_path_factory.mktemp("evaluate"))
    yield env
    env.destroy()


@pytest.fixture
def room(env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(env, monkeypatch)


@pytest.fixture
def demo_flake(tmp_path: Path) -> str:
    """The demo's flake as its README says: a copy with a static busybox beside it."""
    directory = tmp_path / "flake"
    shutil.copytree(DEMO, directory)
    shutil.copy(host_busybox(), directory / "busybox")
    return f"path:{directory}"


def output_of(room: Room, attribute: str, output: str = "out", arguments: str = "{ }") -> tuple[str, str]:
    """Derivation and output path as nix-instantiate and nix-store tell them."""
    search = ["-I", f"cknix-demo={DEMO}", "-I", f"cknix-demo-busybox={host_busybox()}"]
    expression = f"(import <cknix-demo> {arguments}).{attribute}"
    drv = room.env.lines("nix-instantiate", *search, "--expr", expression)[0].split("!")[0]
    [path] = room.env.lines("nix-store", "-q", "--binding", output, drv)
    return drv, path


async def failure(room: Room, expr: str) -> str:
    with pytest.raises(EvaluationFailed) as caught:
        await room.evaluate(expr)
    assert "cknix-eval-" not in caught.value.message, "no temporary path reaches the reader"
    assert str(room.env.root) not in caught.value.message, "paths are told as Nix knows them"
    assert "show-trace" not in caught.value.message
    return caught.value.message


# --- what an expression may be ---


@pytest.mark.parametrize(
    ("expr", "attribute", "output"),
    [
        (f"{PACKAGES}.hello", "hello", "out"),
        ("{ system ? builtins.currentSystem }: (import <cknix-demo> { inherit system; }).hello", "hello", "out"),
        ("{ ... }: (import <cknix-demo> { }).hello", "hello", "out"),
        (f"{PACKAGES}.multi", "multi", "out"),
        (f"{PACKAGES}.multi.lib", "multi", "lib"),
        (f'"${{{PACKAGES}.hello}}"', "hello", "out"),
        (f'"${{{PACKAGES}.multi.doc}}"', "multi", "doc"),
        (f"{PACKAGES}.hello.outPath", "hello", "out"),
        (f"let packages = {PACKAGES}; in packages.chain 3", "chain 3", "out"),
    ],
)
async def test_a_derivation_gives_its_output_and_what_to_build(
    room: Room, expr: str, attribute: str, output: str
) -> None:
    drv, path = output_of(room, attribute, output)
    assert await room.evaluate(expr) == Evaluation(StorePath.parse(path), (f"{drv}!{output}",))
    assert not room.is_valid(path), "evaluation builds nothing"
    assert room.is_valid(drv), "and leaves what a build needs"


@pytest.mark.parametrize(
    ("text", "derivations"),
    [
        ("toString p.hello", ["hello.drv!out"]),
        ('"${p.multi.lib}${nothing p.multi.doc}${nothing p.hello}"', ["hello.drv!out", "multi.drv!doc,lib"]),
        # All outputs, as what was made from a derivation's path can read them.
        ('"${p.multi}${nothing p.hello.drvPath}"', ["hello.drv", "multi.drv!out"]),
        ('"${p.multi.lib}${nothing p.multi.drvPath}"', ["multi.drv"]),
        # The derivation's own file and nothing of what it would build.
        ('"${p.hello}${nothing (builtins.unsafeDiscardOutputDependency p.broken.drvPath)}"', ["hello.drv!out"]),
        ("builtins.unsafeDiscardStringContext p.hello", []),
    ],
)
async def test_what_a_text_was_made_from_is_built_for_it(room: Room, text: str, derivations: list[str]) -> None:
    expr = f"let p = {PACKAGES}; nothing = text: builtins.substring 0 0 text; in {text}"
    evaluation = await room.evaluate(expr)
    assert sorted(derivation.split("-", 1)[1] for derivation in evaluation.derivations) == derivations
    if evaluation.derivations:
        room.env.run("nix-store", "--realise", "--dry-run", *evaluation.derivations)


async def test_a_file_of_the_evaluation_is_there_already(room: Room) -> None:
    evaluation = await room.evaluate('builtins.toFile "greeting" "hello"')
    assert evaluation.derivations == ()
    assert room.store.physical_path(evaluation.result).read_text() == "hello"
    assert room.is_valid(evaluation.result)


async def test_a_path_of_the_search_path_is_copied_to_the_store(room: Room) -> None:
    evaluation = await room.evaluate("<cknix-demo>")
    assert evaluation.derivations == ()
    copied = room.store.physical_path(evaluation.result)
    assert (copied / "default.nix").read_bytes() == (DEMO / "default.nix").read_bytes()


async def test_the_text_of_a_store_path_is_that_path(room: Room) -> None:
    assert await room.evaluate(f'"{HELLO}"') == Evaluation(StorePath.parse(HELLO))


async def test_a_relative_path_gives_the_same_result_every_time(room: Room) -> None:
    """Were the temporary directory's name in it, every refresh would build everything anew."""
    first = await room.evaluate("./.")
    assert await room.evaluate("./.") == first
    assert os.listdir(room.store.physical_path(first.result)) == ["expr.nix"]


async def test_a_store_path_needs_no_evaluation(room: Room) -> None:
    assert await room.nix().evaluate(Data("storePath", HELLO), SYSTEM) == Evaluation(StorePath.parse(HELLO))
    with pytest.raises(InvalidStorePath):
        await room.nix().evaluate(Data("storePath", "hello"), SYSTEM)


async def test_another_system_is_evaluated_and_not_built(room: Room) -> None:
    expr = "{ system ? builtins.currentSystem }: (import <cknix-demo> { inherit system; }).hello"
    here, there = await room.evaluate(expr), await room.evaluate(expr, "aarch64-linux")
    assert here.result != there.result
    drv, path = output_of(room, "hello", arguments='{ system = "aarch64-linux"; }')
    assert there == Evaluation(StorePath.parse(path), (f"{drv}!out",))
    assert (await room.evaluate(f"{PACKAGES}.hello", "aarch64-linux")) == there, "builtins.currentSystem is the system"


async def test_what_is_imported_from_a_derivation_is_built_for_it(room: Room) -> None:
    generated = (
        'derivation { name = "generated"; system = builtins.currentSystem; builder = "${packages.busybox}/bin/sh"; '
        'args = [ "-c" "echo generated-name > $out" ]; }'
    )
    evaluation = await room.evaluate(
        f"let packages = {PACKAGES}; in builtins.toFile "
        f'(builtins.head (builtins.match "([a-z-]+)\\n" (builtins.readFile ({generated})))) "x"'
    )
    assert evaluation.result.name == "generated-name"


async def test_an_imported_file_can_come_from_the_store(room: Room) -> None:
    expr = f'import (builtins.toFile "x.nix" "packages: packages.hello") {PACKAGES}'
    if room.env.nix.release < (2, 26):
        # Known: this Nix checks the physical path of a chroot store and refuses its own files.
        assert "forbidden in restricted mode" in await failure(room, expr)
        assert (await room.evaluate(expr, restrict_eval=False)).result.name == "hello"
    else:
        assert (await room.evaluate(expr)).result.name == "hello"


# --- how a mistake is told ---


@pytest.mark.parametrize(
    ("expr", "words"),
    [
        ("{ a = ; }", ["syntax error, unexpected ';'", "at expr:1:7"]),
        ("", ["syntax error, unexpected end of file", "expr:1"]),
        ("# nothing else", ["syntax error, unexpected end of file", "expr:1"]),
        (f"\n  {PACKAGES}.helo", ["attribute 'helo' missing", "at expr:2:3", "Did you mean hello?"]),
        ("undefinedVariable", ["undefined variable 'undefinedVariable'", "at expr:1:1"]),
        ('throw "on purpose"', ["on purpose"]),
        (f"{PACKAGES}.throws", ["cknix-demo: this evaluation fails on purpose"]),
        ('abort "on purpose"', ["evaluation aborted", "on purpose"]),
        ("assert 1 == 2; 1", ["1 == 2", "expr:1:1"]),
        ("let x = x; in x", ["infinite recursion encountered", "expr:1:9"]),
        ("let f = n: 1 + f (n + 1); in f 0", ["stack overflow"]),
        ("<nope>", ["file 'nope' was not found in the Nix search path"]),
        ("import ./other.nix", ["expr/other.nix"]),
        ("1", ["expr evaluates to a value of type int; it must evaluate to a derivation or a store path"]),
        ("null", ["a value of type null"]),
        ("[ 1 ]", ["a value of type list"]),
        ("1.5", ["a value of type float"]),
        ("true", ["a value of type bool"]),
        ("{ a, b ? 1, c }: a", ["a function that needs the arguments a, c", "give the arguments defaults"]),
        ("x: x", ["evaluates to a function", "give the arguments defaults"]),
        ("{ }: { }: 1", ["evaluates to a function"]),
        ("builtins.head", ["evaluates to a"]),
        (PACKAGES, ["a set with the attributes broken, busybox,", "select one of them"]),
        ("{ }", ["a set with the attributes (none)"]),
        (f"{{ a = {PACKAGES}.hello; }}", ["a set with the attributes a;", "select one of them"]),
        (f"[ {PACKAGES}.hello ]", ["a value of type list"]),
        (f"toString [ {PACKAGES}.hello {PACKAGES}.file ]", ["text that is no store path", "-hello /nix/store/"]),
        (f"builtins.unsafeDiscardOutputDependency {PACKAGES}.hello.drvPath", ["leave out .drvPath"]),
        ('"hello"', ["text that is no store path: 'hello' is not a store path"]),
        (f'"${{{PACKAGES}.hello}}/bin"', ["it names something inside a store path; use /nix/store/"]),
        (f"{PACKAGES}.hello.drvPath", ["-hello.drv; it must evaluate to a derivation", "leave out .drvPath"]),
        ('builtins.storePath "/nix/store/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx-x"', ["xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx-x"]),
    ],
)
async def test_a_mistake_is_told_in_the_readers_terms(room: Room, expr: str, words: list[str]) -> None:
    message = await failure(room, expr)
    for word in words:
        assert word in message
    assert "«string»" not in message, "our own part of the trace is left out"


@pytest.mark.parametrize(
    "expr",
    [
        'throw (builtins.concatStringsSep "" (builtins.genList (n: "line ${toString n}\\n") 20000))',
        'builtins.concatStringsSep "" (builtins.genList (n: "1234567890") 100000)',
        'builtins.listToAttrs (builtins.genList (n: { name = builtins.concatStringsSep "" '
        '(builtins.genList (i: "1234567890") (1000 + n)); value = 1; }) 20)',
        "throw (builtins.fromJSON ''\"\\u001b[31mred\\u001b[0m\"'')",
    ],
)
async def test_the_longest_message_fits_a_condition_and_is_plain(room: Room, expr: str) -> None:
    message = await failure(room, expr)
    assert 3 < len(message) < 10_000
    assert "\x1b" not in message
    assert re.search(r"line 0|12345678|red", message), "the beginning is there"


async def test_output_without_end_is_refused(room: Room) -> None:
    doubled = 'builtins.foldl\' (text: _: text + text) "0123456789abcdef" (builtins.genList (n: n) 21)'
    with pytest.raises(EvaluationFailed, match="wrote more than 16777216 bytes of output"):
        await room.evaluate(doubled)


async def test_an_evaluation_that_never_ends_is_stopped(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.3)
    with pytest.raises(DeadlineExceeded) as caught:
        await room.evaluate(ENDLESS, eval_timeout=1.0)
    assert "did not end within 1s" in caught.value.message
    assert "CKNIX_EVAL_TIMEOUT" in caught.value.message
    async with asyncio.timeout(10):
        while processes_of(room.store.uri):
            await asyncio.sleep(0.02)


async def test_a_cancelled_evaluation_leaves_nothing_running(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.3)
    marker = room.store.uri
    before = set(Path(tempfile.gettempdir()).glob("cknix-eval-*"))
    task = asyncio.create_task(room.evaluate(ENDLESS))
    async with asyncio.timeout(10):
        while not processes_of(marker):
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):
        while processes_of(marker):
            await asyncio.sleep(0.02)
    assert set(Path(tempfile.gettempdir()).glob("cknix-eval-*")) <= before


async def test_without_nix_the_remedy_is_told(room: Room, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CknixError, match="is Nix on PATH") as caught:
        await room.evaluate("1", search_path={})
    assert caught.value.reason == "NixNotFound"


# --- the search path ---


@pytest.mark.parametrize("name", ["with space", "a=b", "a:b", "Grüße", "q'\"u$ote", "-x", "100%"])
async def test_a_search_path_may_have_an_odd_name(room: Room, tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "default.nix").write_text('"/nix/store/6c1vlf6kyyl0x5cjdhvr3bymgxa74fjb-hello"')
    assert (await room.evaluate("import <odd>", search_path={"odd": directory})).result == StorePath.parse(HELLO)


@pytest.mark.parametrize("name", ["with space", "a&b=c", "a?b", "100%41", "a#b", "a+b"])
async def test_a_data_root_may_have_an_odd_name(
    nix: NixVersion, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = NixEnv(nix, tmp_path / name)
    try:
        room = Room(env, monkeypatch)
        path = (await room.evaluate('builtins.toFile "x" "y"')).result
        assert (env.root / "nix/store" / path.basename).read_text() == "y"
        assert os.listdir(env.directory.parent) == [name]
    finally:
        env.destroy()


# --- flakes ---


@pytest.mark.parametrize(
    ("suffix", "attribute", "output"),
    [
        ("", "hello", "out"),
        ("#", "hello", "out"),
        ("#hello", "hello", "out"),
        ("#multi", "multi", "out"),
        ("#multi.lib", "multi", "lib"),
        (f"#packages.{SYSTEM}.toolbox", "toolbox", "out"),
    ],
)
async def test_a_flake_gives_what_the_same_packages_give(
    room: Room, demo_flake: str, suffix: str, attribute: str, output: str
) -> None:
    drv, path = output_of(room, attribute, output)
    assert await room.flake(f"{demo_flake}{suffix}") == Evaluation(StorePath.parse(path), (f"{drv}!{output}",))


async def test_a_flake_is_evaluated_for_another_system(room: Room, demo_flake: str) -> None:
    _, path = output_of(room, "hello", arguments='{ system = "aarch64-linux"; }')
    assert (await room.flake(f"{demo_flake}#hello", "aarch64-linux")).result == StorePath.parse(path)


async def test_a_flake_is_not_written_to(room: Room, demo_flake: str) -> None:
    directory = Path(demo_flake.removeprefix("path:"))
    before = sorted(os.listdir(directory))
    await room.flake(demo_flake)
    assert sorted(os.listdir(directory)) == before


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        ("#helo", ["does not provide attribute", f"packages.{SYSTEM}.helo"]),
        ("#notAPackage", ["flakeRef evaluates to a value of type int"]),
        ("#slow.nope", ["slow"]),
        ("#multi^lib", ["selects outputs with '^'", "#multi.lib"]),
        ("#multi^*", ["selects outputs with '^'"]),
        ("#throws", ["cknix-demo: this evaluation fails on purpose"]),
    ],
)
async def test_a_mistake_in_a_flake_reference_is_told(
    room: Room, demo_flake: str, suffix: str, words: list[str]
) -> None:
    with pytest.raises(EvaluationFailed) as caught:
        await room.flake(f"{demo_flake}{suffix}")
    for word in words:
        assert word in caught.value.message


async def test_where_no_flake_is_it_is_told(room: Room, tmp_path: Path) -> None:
    with pytest.raises(EvaluationFailed, match=r"flake\.nix"):
        await room.flake(f"path:{tmp_path}")
    with pytest.raises(EvaluationFailed, match="does-not-exist"):
        await room.flake(f"path:{tmp_path}/does-not-exist")


@pytest.mark.parametrize(
    "text",
    [
        "--version",
        "--help",
        "--expr",
        "-",
        "--option",
        "-f",
        "--impure",
        "a b",
        "path:x\t--impure",
        "path:x\n",
        "path:\0",
        "",
    ],
)
async def test_what_nix_would_take_for_an_option_is_no_flake_reference(room: Room, text: str) -> None:
    with pytest.raises(EvaluationFailed, match="is not a flake reference"):
        await room.flake(text)


@pytest.mark.parametrize(
    "text", ["^", "#", "##", "/nix/store", HELLO, f"{HELLO}.drv", "/etc/passwd", "path:", "path:.", ".", "./flake", "~"]
)
async def test_other_text_that_is_no_flake_fails_as_an_evaluation(room: Room, text: str) -> None:
    with pytest.raises(EvaluationFailed):
        await room.flake(text)


# --- what may not be read ---

TOKEN = "s3cr3t-t0k3n"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """Stands in for /var/run/secrets."""
    directory = tmp_path / "secrets"
    (directory / "serviceaccount").mkdir(parents=True)
    (directory / "serviceaccount/token").write_text(TOKEN)
    return directory


def leaked(room: Room) -> list[str]:
    """Store objects with the secret in them."""
    run = subprocess.run(["grep", "-rlF", TOKEN, str(room.env.root)], capture_output=True, text=True, check=False)
    return [path for path in run.stdout.splitlines() if not path.endswith((".sqlite-wal", ".sqlite"))]


@pytest.mark.parametrize(
    "expr",
    [
        'throw "got ${builtins.readFile "FILE"}"',
        'throw "got ${builtins.readFile FILE}"',
        '"${FILE}"',
        "FILE",
        'builtins.path { path = "FILE"; name = "x"; }',
        'builtins.path { path = DIRECTORY; name = "x"; filter = _: _: true; }',
        "builtins.filterSource (_: _: true) DIRECTORY",
        'throw (builtins.toJSON (builtins.readDir "DIRECTORY"))',
        "import FILE",
        'builtins.scopedImport { } "FILE"',
        'throw (builtins.hashFile "sha256" "FILE")',
        'builtins.fetchurl "file://FILE"',
        'builtins.fetchTarball "file://FILE"',
        'builtins.fetchGit "file://DIRECTORY"',
        'builtins.fetchTree { type = "path"; path = "DIRECTORY"; }',
        'builtins.exec [ "cat" "FILE" ]',
        'builtins.importNative "FILE" "x"',
        'throw "got ${builtins.readFile (builtins.toFile "link" "x" + "/../../../../../../../../../../..FILE")}"',
        'derivation { name = "x"; system = builtins.currentSystem; builder = "FILE"; src = FILE; }',
        'derivation { name = "x"; system = "x86_64-linux"; builder = "b"; __structuredAttrs = true; src = FILE; }',
        'builtins.getFlake "path:DIRECTORY"',
        'builtins.findFile [ { prefix = ""; path = "DIRECTORY"; } ] "token"',
    ],
)
async def test_an_expression_cannot_read_this_machines_secrets(room: Room, secrets: Path, expr: str) -> None:
    directory = secrets / "serviceaccount"
    expr = expr.replace("FILE", f"{directory}/token").replace("DIRECTORY", str(directory))
    try:
        evaluation = await room.evaluate(expr, hidden=(secrets,))
    except EvaluationFailed as error:
        assert TOKEN not in error.message
    else:
        assert room.env.nix.release < (2, 26), (
            "only the oldest Nix allows fetchTree on any path, and finds nothing there"
        )
        assert evaluation.result.name == "source"
    assert not leaked(room)


@pytest.mark.parametrize("how", ["flakeRef", "expr"])
@pytest.mark.parametrize(
    "url", ["path:DIRECTORY", "path:PROC/root/DIRECTORY", "file://DIRECTORY/token", "git+file://DIRECTORY"]
)
async def test_a_flakes_inputs_cannot_be_this_machines_secrets(
    room: Room, secrets: Path, tmp_path: Path, url: str, how: str
) -> None:
    """Inputs are fetched before anything is evaluated, so neither pure nor restricted evaluation keeps them from it."""
    directory = str(secrets / "serviceaccount")
    url = url.replace("DIRECTORY", directory).replace("PROC", f"/proc/{os.getpid()}")
    reference = write_flake(
        tmp_path / "evil",
        f'{{ inputs.s = {{ url = "{url}"; flake = false; }}; outputs = {{ self, s }}: '
        '{ a = throw "got ${builtins.readFile "${s}/token"}"; b = throw "got ${builtins.readFile s}"; }; }',
    )
    for attribute in "ab":
        with pytest.raises(CknixError) as caught:
            if how == "flakeRef":
                await room.flake(f"{reference}#{attribute}", hidden=(secrets,))
            else:
                await room.evaluate(f'(builtins.getFlake "{reference}").{attribute}', hidden=(secrets,))
        assert TOKEN not in caught.value.message
    assert not leaked(room)


async def test_the_secrets_would_be_copied_if_they_were_not_hidden(room: Room, secrets: Path, tmp_path: Path) -> None:
    """So that the tests above can fail."""
    reference = write_flake(
        tmp_path / "evil",
        f'{{ inputs.s = {{ url = "path:{secrets}/serviceaccount"; flake = false; }}; outputs = {{ self, s }}: '
        '{ a = throw "got ${builtins.readFile "${s}/token"}"; }; }',
    )
    with pytest.raises(EvaluationFailed, match="lock file") as caught:
        await room.flake(f"{reference}#a", hidden=())
    assert TOKEN not in caught.value.message
    assert leaked(room)
    shutil.rmtree(room.env.root)  # the secret is in this module's store now


@pytest.mark.parametrize(
    "reference", ["path:DIRECTORY", "path:DIRECTORY#token", "git+file://DIRECTORY", "file://DIRECTORY/token"]
)
async def test_a_flake_reference_cannot_copy_the_secrets_to_the_store(
    room: Room, secrets: Path, reference: str
) -> None:
    with pytest.raises(EvaluationFailed) as caught:
        await room.flake(reference.replace("DIRECTORY", f"{secrets}/serviceaccount"), hidden=(secrets,))
    assert TOKEN not in caught.value.message
    assert not leaked(room)


async def test_what_is_hidden_may_be_missing(room: Room, tmp_path: Path) -> None:
    assert (
        await room.evaluate(f'"{HELLO}"', hidden=(tmp_path / "nowhere", Path("/var/run/secrets")))
    ).derivations == ()


async def test_a_block_device_cannot_be_read_through_a_flake(room: Room, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(TOKEN.encode().ljust(4096, b"."))
    run = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip(f"no loop device: {run.stderr.strip()}")
    device = run.stdout.strip()
    try:
        assert Path(device).read_bytes().startswith(TOKEN.encode())
        reference = write_flake(
            tmp_path / "evil",
            f'{{ inputs.s = {{ url = "file://{device}"; flake = false; }}; outputs = {{ self, s }}: '
            '{ a = throw "got ${builtins.readFile s}"; }; }',
        )
        with pytest.raises(EvaluationFailed) as caught:
            await room.flake(f"{reference}#a")
        assert TOKEN not in caught.value.message
        assert not leaked(room)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.parametrize("name", ["PATH", "HOME", "NIX_CONF_DIR", "KUBERNETES_SERVICE_HOST", "AWS_SECRET_ACCESS_KEY"])
async def test_no_environment_variable_can_be_read(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name not in os.environ:
        monkeypatch.setenv(name, TOKEN)
    assert "got <>" in await failure(room, f'throw "got <${{builtins.getEnv "{name}"}}>"')
    reference = write_flake(
        tmp_path / "f", f'{{ outputs = {{ self }}: {{ a = throw "got <${{builtins.getEnv "{name}"}}>"; }}; }}'
    )
    with pytest.raises(EvaluationFailed, match="got <>"):
        await room.flake(f"{reference}#a")


async def test_the_evaluator_itself_has_no_secret_in_its_environment(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", TOKEN)
    environment = room.nix(restrict_eval=False)._environment()
    assert TOKEN not in environment.values()
    message = ""
    with pytest.raises(EvaluationFailed) as caught:
        await room.evaluate('throw "<${builtins.getEnv "AWS_SECRET_ACCESS_KEY"}>"', restrict_eval=False)
    message = caught.value.message
    assert "<>" in message


async def test_a_flake_cannot_configure_nix(room: Room, tmp_path: Path) -> None:
    reference = write_flake(
        tmp_path / "f",
        "{ nixConfig = { allow-unsafe-native-code-during-evaluation = true; pure-eval = false; sandbox = false; "
        f'extra-sandbox-paths = [ "{tmp_path}" ]; post-build-hook = "{tmp_path}/hook"; '
        f'plugin-files = "{tmp_path}/x.so"; }};'
        ' outputs = { self }: { exec = builtins.exec [ "id" ]; read = throw (builtins.readFile /etc/passwd); }; }',
    )
    for attribute, words in (("exec", "attribute 'exec' missing"), ("read", "is forbidden in pure eval")):
        with pytest.raises(EvaluationFailed, match=words):
            await room.flake(f"{reference}#{attribute}")


async def test_unrestricted_evaluation_is_for_the_one_who_asked_for_it(room: Room, tmp_path: Path) -> None:
    (tmp_path / "x.nix").write_text(f'"{HELLO}"')
    expr = f"import {tmp_path}/x.nix"
    assert "forbidden in restricted mode" in await failure(room, expr)
    assert (await room.evaluate(expr, restrict_eval=False)).result == StorePath.parse(HELLO)


async def test_unrestricted_evaluation_takes_relative_paths_from_the_working_directory(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `nix-build --expr` does."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/default.nix").write_text(f'{{ }}: "{HELLO}"')
    monkeypatch.chdir(tmp_path / "sub")
    for expr in ("import ./. { }", "import ../sub/default.nix { }"):
        assert (await room.evaluate(expr, restrict_eval=False)).result == StorePath.parse(HELLO)
    with pytest.raises(EvaluationFailed, match=r"undefined variable 'nothing'(?s:.)*at expr:1:1"):
        await room.evaluate("nothing", restrict_eval=False)


async def test_evaluations_at_the_same_time_do_not_disturb_each_other(room: Room) -> None:
    names = [f"file-{number}" for number in range(8)]
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(room.evaluate(f'builtins.toFile "{name}" "x"')) for name in names]
    assert [task.result().result.name for task in running] == names


def test_a_failed_evaluation_is_no_reason_to_keep_the_volume() -> None:
    assert EvaluationFailed("x").code is Code.FAILED_PRECONDITION
