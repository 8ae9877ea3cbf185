"""The demo's package set: with every supported Nix, sandboxed, in restricted evaluation, in a chroot store.

Nothing may be found outside: the sandbox has no /bin/sh, there is no substituter and no nixpkgs.  What is expected here
comes from the packages' comments and README; what is there is asked of Nix's own database and of the file system.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import nixes
from tests.nixes import NixEnv, NixVersion

DEMO = Path(__file__).parents[2] / "nix/demo"

DIRECTORIES = ("busybox", "emptyDirectory", "hello", "longName", "multi", "shapes", "toolbox", "web", "webroot")
FILES = ("executableFile", "file")
LINKS = ("danglingLink", "link")


class Demo:
    """The package set in one store."""

    def __init__(self, env: NixEnv, search_path: tuple[str, ...]) -> None:
        self.env = env
        self.search_path = search_path

    def instantiate(self, attribute: str) -> str:
        expression = f"(import <cknix-demo> {{ }}).{attribute}"
        return self.env.lines("nix-instantiate", *self.search_path, "--expr", expression)[0].split("!")[0]

    def try_build(self, attribute: str) -> subprocess.CompletedProcess[str]:
        expression = f"(import <cknix-demo> {{ }}).{attribute}"
        return self.env.run(
            "nix", "build", *self.search_path, "--impure", "--no-link", "--expr", expression, check=False
        )

    def build(self, attribute: str, output: str = "out") -> str:
        """Build one output as the controller does: `nix-store --realise drv!out`; return its store path."""
        return self.env.lines("nix-store", "--realise", f"{self.instantiate(attribute)}!{output}")[0]

    def closure(self, path: str) -> set[str]:
        return set(self.env.lines("nix-store", "-qR", path))

    def execute(self, path: str, *arguments: str) -> str:
        """Run a program of the store with nothing but the store to see."""
        chroot = shutil.which("chroot", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") or "chroot"
        command = [chroot, str(self.env.root), path, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env={}).stdout


@pytest.fixture(scope="module")
def demo(
    nix: NixVersion, tmp_path_factory: pytest.TempPathFactory, demo_search_path: tuple[str, ...]
) -> Iterator[Demo]:
    """One store for all tests of one version: what one test has built the next one finds."""
    env = NixEnv(nix, tmp_path_factory.mktemp("demo"))
    env.configure(restrict_eval="true")
    yield Demo(env, demo_search_path)
    env.destroy()


@pytest.mark.parametrize("attribute", [*DIRECTORIES, *FILES, *LINKS])
def test_every_package_is_built_and_built_again_is_the_same(demo: Demo, attribute: str) -> None:
    path = demo.build(attribute)
    kind = demo.env.physical(path).lstat().st_mode
    assert stat.S_ISDIR(kind) == (attribute in DIRECTORIES)
    assert stat.S_ISREG(kind) == (attribute in FILES)
    assert stat.S_ISLNK(kind) == (attribute in LINKS)
    # Nix itself compares a second build with the first, bit by bit.
    drv = demo.instantiate(attribute)
    demo.env.run("nix-store", "--realise", drv)
    demo.env.run("nix-store", "--realise", "--check", drv)


def test_the_store_is_valid_to_the_last_bit(demo: Demo) -> None:
    for attribute in (*DIRECTORIES, *FILES, *LINKS):
        demo.build(attribute)
    demo.env.run("nix-store", "--verify", "--check-contents")


def test_hello_speaks_and_names_itself(demo: Demo) -> None:
    path = demo.build("hello")
    said = demo.execute(f"{path}/bin/hello")
    assert said.startswith(f"Hello from {path}: ")
    assert said.endswith("\n")


def test_hello_depends_on_a_directory_a_file_and_a_link(demo: Demo) -> None:
    path = demo.build("hello")
    kinds = {name.split("-", 1)[1]: demo.env.physical(name).lstat().st_mode for name in demo.closure(path)}
    assert set(kinds) == {"hello", "hello-words", "hello-word", "hello-message", "busybox"}
    assert stat.S_ISDIR(kinds["busybox"])
    assert stat.S_ISREG(kinds["hello-message"])
    assert stat.S_ISLNK(kinds["hello-word"])


def test_another_text_is_another_hello(demo: Demo) -> None:
    path = demo.build('greet "good morning"')
    assert path != demo.build("hello")
    assert demo.execute(f"{path}/bin/hello") == f"Hello from {path}: good morning\n"


def test_the_toolbox_is_a_path_of_its_own(demo: Demo) -> None:
    path = demo.build("toolbox")
    assert demo.execute(f"{path}/bin/sh", "-c", f"PATH={path}/bin; hello | wc -l").strip() == "1"
    assert demo.execute(f"{path}/bin/[", "a", "=", "a", "]") == ""


def test_outputs_are_paths_of_their_own(demo: Demo) -> None:
    out, lib, doc = (demo.build("multi", output) for output in ("out", "lib", "doc"))
    assert len({out, lib, doc}) == 3
    assert lib in demo.closure(out)
    assert doc not in demo.closure(out)
    assert demo.execute(f"{out}/bin/multi") == "the library\n"


@pytest.mark.one_nix
def test_shapes_has_every_kind_of_content(demo: Demo) -> None:
    path = demo.build("shapes")
    here = demo.env.physical(path)
    names = set(os.listdir(os.fsencode(here / "names")))
    assert names == {
        b"long-" * 51,
        b"with space",
        b'it\'s "quoted"',
        b"two\nlines",
        b"back\\slash",
        "Grüße-日本語-🙂".encode(),
        b"caf\xe9",
        b"-rf",
        b"*",
        b".hidden",
    }
    links = {link.name: os.readlink(link) for link in (here / "links").iterdir()}
    assert links.pop("elsewhere").startswith("/nix/store/")
    assert links == {
        "relative": "../share/small/1/1",
        "absolute": f"{path}/share/small/1/2",
        "directory": "../share/small",
        "dangling": "nowhere",
        "loop": "loop",
        "outside": "/etc/passwd",
    }
    assert (here / "share/big").stat().st_size == 8 * 1024 * 1024
    assert list((here / "empty/directory").iterdir()) == []
    assert sum(1 for file in (here / "share/small").rglob("*") if file.is_file()) == 500
    # Nix keeps one bit of a mode.
    modes = {stat.S_IMODE(file.stat().st_mode) for file in here.rglob("*") if file.is_file() and not file.is_symlink()}
    assert modes == {0o444, 0o555}
    assert demo.execute(f"{path}/bin/run") == "ran\n"


def test_equal_files_of_shapes_become_one_file(demo: Demo) -> None:
    same = demo.env.physical(demo.build("shapes")) / "same"
    demo.env.run("nix-store", "--optimise")
    assert len({file.stat().st_ino for file in same.iterdir()}) == 1


@pytest.mark.one_nix
@pytest.mark.parametrize("shape", ["chain", "chainFast", "wide", "wideFast"])
@pytest.mark.parametrize("count", [2, 7])
def test_a_closure_has_as_many_paths_as_asked_for(demo: Demo, shape: str, count: int) -> None:
    assert len(demo.closure(demo.build(f"{shape} {count}"))) == count


@pytest.mark.one_nix
@pytest.mark.parametrize("shape", ["chainFast", "wideFast"])
def test_a_closure_of_hundreds_of_paths_is_one_build(demo: Demo, shape: str) -> None:
    drv = demo.instantiate(f"{shape} 300")
    derivations = [path for path in demo.env.lines("nix-store", "-qR", drv) if path.endswith(".drv")]
    assert len(demo.closure(demo.build(f"{shape} 300"))) == 300
    assert len(derivations) == 3  # itself, busybox, and the link that busybox is started by


def test_a_broken_build_says_why(demo: Demo) -> None:
    run = demo.try_build("broken")
    assert run.returncode != 0
    assert "failed with exit code 3" in run.stderr
    assert "compiling 2 of 2" in run.stderr
    assert "cknix-demo: this package is broken on purpose" in run.stderr


def test_what_needs_a_broken_build_names_it(demo: Demo) -> None:
    run = demo.try_build("needsBroken")
    assert run.returncode != 0
    assert "-broken.drv" in run.stderr
    assert "needs-broken" in run.stderr


def test_an_evaluation_that_fails_says_why(demo: Demo) -> None:
    run = demo.try_build("throws")
    assert run.returncode != 0
    assert "cknix-demo: this evaluation fails on purpose" in run.stderr


def test_a_slow_build_logs_every_second(demo: Demo) -> None:
    expression = '(import <cknix-demo> { }).slow { seconds = 2; tag = "patience"; }'
    run = demo.env.run("nix-build", *demo.search_path, "--no-out-link", "--expr", expression)
    assert "patience: second 1 of 2" in run.stderr
    assert "patience: second 2 of 2" in run.stderr
    assert demo.execute(f"{run.stdout.strip()}/bin/slow") == "patience took 2 seconds to build\n"


def test_restricted_evaluation_is_in_force(demo: Demo) -> None:
    """Else that all of the above evaluates would prove nothing."""
    run = demo.env.run(
        "nix-instantiate", *demo.search_path, "--eval", "--expr", "builtins.readFile /etc/hostname", check=False
    )
    assert run.returncode != 0
    assert "restricted mode" in run.stderr


def test_the_flake_is_the_same_package_in_pure_evaluation(demo: Demo, tmp_path: Path) -> None:
    flake = tmp_path / "demo"
    shutil.copytree(DEMO, flake)
    shutil.copy(nixes.host_busybox(), flake / "busybox")
    assert demo.env.run("nix", "eval", "--raw", f"path:{flake}#hello.drvPath").stdout == demo.instantiate("hello")
    demo.env.run("nix", "build", "--no-link", f"path:{flake}#hello")
    demo.env.run("nix", "build", "--no-link", f"path:{flake}")
    shown = json.loads(demo.env.run("nix", "flake", "show", "--json", f"path:{flake}").stdout)
    assert {"hello", "shapes", "default"} <= set(_packages(shown))


def test_the_flake_says_what_it_lacks(demo: Demo, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    run = demo.env.run("nix", "eval", "--raw", f"path:{tmp_path}/demo#hello.drvPath", check=False)
    assert run.returncode != 0
    assert "put a static busybox beside" in run.stderr


def _packages(shown: dict[str, dict[str, dict[str, object]]]) -> dict[str, object]:
    return shown["packages"]["x86_64-linux" if os.uname().machine == "x86_64" else "aarch64-linux"]
