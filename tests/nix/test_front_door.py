"""The ways in: `nix build --file .`, `nix-build -A`, `nix build .#`; without nixpkgs, without network, with every Nix.

What needs nixpkgs cannot be built here.  It is evaluated against a stand-in that records what it is asked for, which
proves that the expressions are sound, that they name what pyproject.toml and requirements.lock name, and nothing more.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.nixes import NixEnv

PROJECT = Path(__file__).parents[2]
FRONT_DOOR = ("default.nix", "flake.nix", "nix", "yaml", "pyproject.toml", "cknix_csi", "README.md", "LICENSE")

UPSTREAM = "registry.k8s.io/"
"""How images of others, which stay what they are, begin."""
WAYS: dict[str, Sequence[str]] = {
    "nix build --file": ("nix", "build", "--file", ".", "manifestYAML", "--out-link", "result"),
    "nix-build -A": ("nix-build", "-A", "manifestYAML"),
    "nix build .#": ("nix", "build", ".#manifestYAML", "--out-link", "result"),
    "nix build path:": ("nix", "build", "path:.#manifestYAML", "--out-link", "result"),
}

# Just enough of nixpkgs to evaluate nix/package.nix and nix/image.nix: every package is a string, every builder
# returns what it was given.
STAND_IN = """
let
  recorded = kind: args:
    args // { inherit kind; type = "derivation"; outPath = "/${args.pname or args.name or kind}"; };
  package = name: { inherit name; type = "derivation"; outPath = "/${name}"; version = "0"; };
  everything = names: builtins.listToAttrs (map (name: { inherit name; value = package name; }) names);
  pkgs = everything [ "cacert" "e2fsprogs" "gitMinimal" "makeWrapper" "nix" "openssh" "util-linux" ] // {
    buildEnv = recorded "buildEnv";
    callPackage = file: args:
      let function = import file; in
      function (builtins.intersectAttrs (builtins.functionArgs function) pkgs // args);
    dockerTools = everything [ "binSh" "caCertificates" ] // {
      fakeNss.override = users: builtins.deepSeq users "fakeNss";
    };
    fetchPypi = recorded "fetchPypi";
    lib = {
      fileset = {
        toSource = { root, fileset }: fileset;
        unions = map (path: assert builtins.pathExists path; baseNameOf path);
      };
      getExe = drv: "${drv.outPath}/bin/${drv.meta.mainProgram}";
      importTOML = file: builtins.fromTOML (builtins.readFile file);
      licenses.mit = "mit";
      makeBinPath = paths: builtins.concatStringsSep ":" (map (path: "${path.outPath}/bin") paths);
      platforms.linux = [ ];
      replaceStrings = builtins.replaceStrings;
      versionAtLeast = a: b: builtins.compareVersions a b >= 0;
    };
    python3Packages = everything pythonPackages // {
      buildPythonApplication = recorded "application";
      buildPythonPackage = recorded "wheel";
    };
  };
  pythonPackages = PYTHON_PACKAGES;
in
pkgs
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A clone of what the front door reads, committed nowhere but known to git, as flakes want it."""
    directory = tmp_path.resolve() / "project"
    directory.mkdir()
    for name in FRONT_DOOR:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, directory / name)
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", "-C", str(directory), *command], check=True)
    return directory


@pytest.fixture(params=["chroot store", "plain store"])
def built_in(request: pytest.FixtureRequest, nix_env: NixEnv) -> Iterator[tuple[NixEnv, bool]]:
    """A Nix and whether it works on a chroot store or on a store that is just where it is."""
    yield nix_env, request.param == "chroot store"


@pytest.mark.parametrize("way", WAYS)
def test_the_manifests_are_the_files_of_yaml(built_in: tuple[NixEnv, bool], way: str, project: Path) -> None:
    env, chroot = built_in
    text = _manifest(env, project, WAYS[way], chroot=chroot)
    assert _by_identity(_documents(text)) == _by_identity(_installed())


def test_the_manifests_can_be_applied_in_their_order(nix_env: NixEnv, project: Path) -> None:
    documents = _documents(_manifest(nix_env, project, WAYS["nix-build -A"]))
    kinds = [document["kind"] for document in documents]
    ranks = [{"Namespace": 0, "CustomResourceDefinition": 1}.get(kind, 2) for kind in kinds]
    assert ranks == sorted(ranks)
    # Apart from that the order is that of the files, and of the documents in a file.
    rest = [_identity(document) for document, rank in zip(documents, ranks, strict=True) if rank == 2]
    assert rest == [_identity(document) for document in _installed() if _identity(document) in rest]


@pytest.mark.parametrize("way", ["nix build --file", "nix-build -A"])
def test_the_manifests_name_the_image_they_are_given(nix_env: NixEnv, project: Path, way: str) -> None:
    image = "registry.example.org:5000/team/cknix-csi@sha256:" + "0" * 64
    text = _manifest(nix_env, project, [*WAYS[way], "--argstr", "imageRef", image])
    assert {each for each in _images(_documents(text)) if not each.startswith(UPSTREAM)} == {image}
    assert len(_images(_documents(text))) == len(_images(_installed())) > 0
    without = _manifest(nix_env, project, WAYS[way])
    ours = set(_images(_installed()))
    assert _without_images(text) == _without_images(without)
    assert set(_images(_documents(without))) == ours


def test_documents_keep_their_text_and_odd_files_do_no_harm(nix_env: NixEnv, tmp_path: Path) -> None:
    """Comments, separators with and without need, no newline at the end, Windows' idea of a document start."""
    files = tmp_path.resolve() / "files"
    (files / "test").mkdir(parents=True)
    (files / "10-b.yaml").write_text(
        "---\n# why\nkind: ConfigMap\ndata:\n  text: |\n    a\n\n    b\n---\n# nothing\n---"
    )
    (files / "20-a.yaml").write_text("kind: CustomResourceDefinition\nx: 1\n--- # more\nkind: Namespace\ny: 'z # z'")
    (files / "test/no.yaml").write_text("kind: Pod\n")
    (files / "README.md").write_text("kind: Text\n")
    manifest = PROJECT / "nix/manifest.nix"
    expression = f"import {manifest} {{ directory = {files}; }}"
    path = nix_env.run("nix-build", "--no-out-link", "--expr", expression).stdout.strip()
    text = nix_env.physical(path).read_text()
    assert text == (
        "kind: Namespace\ny: 'z # z'\n---\n"
        "kind: CustomResourceDefinition\nx: 1\n---\n"
        "# why\nkind: ConfigMap\ndata:\n  text: |\n    a\n\n    b\n"
    )
    wrong = nix_env.run(
        "nix-build", "--expr", f'import {manifest} {{ directory = {files}; imageRef = "x"; }}', check=False
    )
    assert "no file of" in wrong.stderr
    assert "to replace" in wrong.stderr


def test_the_flake_has_what_works_offline_and_nothing_to_lock(nix_env: NixEnv, project: Path) -> None:
    shown = json.loads(nix_env.run("nix", "flake", "show", "--json", ".", cwd=project).stdout)
    assert set(shown["packages"]["x86_64-linux"]) == {"default", "manifestYAML"}
    assert set(shown["packages"]["aarch64-linux"]) == {"default", "manifestYAML"}
    assert shown["overlays"] == {"default": {"type": "nixpkgs-overlay"}}
    assert not (project / "flake.lock").exists()


def test_the_demo_is_a_part_of_the_front_door(
    nix_env: NixEnv, project: Path, demo_search_path: tuple[str, ...]
) -> None:
    run = nix_env.run("nix-build", *demo_search_path, "-A", "demo.hello", "--no-out-link", cwd=project)
    assert run.stdout.strip().endswith("-hello")


@pytest.mark.parametrize("attribute", ["cknix-csi", "image"])
def test_what_needs_nixpkgs_says_so_and_is_lazy(nix_env: NixEnv, project: Path, attribute: str) -> None:
    run = nix_env.run("nix-instantiate", "-A", attribute, cwd=project, check=False)
    assert run.returncode != 0
    assert re.search(r"'nixpkgs(/[^']*)?' was not found", run.stderr)
    names = nix_env.run("nix-instantiate", "--eval", "--strict", "--json", "--expr", _names(project)).stdout
    assert {"cknix-csi", "demo", "image", "manifestYAML"} == set(json.loads(names))


def test_the_package_asks_for_what_the_project_declares(nix_env: NixEnv, project: Path, tmp_path: Path) -> None:
    application = _evaluate(nix_env, project, tmp_path, "cknix-csi")
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert application["pname"] == declared["name"]
    assert application["version"] == declared["version"]
    assert {_name(dependency) for dependency in application["dependencies"]} == _requirements(declared["dependencies"])
    assert application["meta"]["mainProgram"] in declared["scripts"]


def test_what_nixpkgs_lacks_is_the_wheel_that_is_locked(nix_env: NixEnv, project: Path, tmp_path: Path) -> None:
    application = _evaluate(nix_env, project, tmp_path, "cknix-csi")
    lock = (PROJECT / "requirements.lock").read_text()
    wheels = [dependency for dependency in application["dependencies"] if dependency.get("kind") == "wheel"]
    assert {wheel["pname"] for wheel in wheels} == {"aiopath", "kopf", "kubernetes-asyncio"}
    for wheel in wheels:
        entry = re.search(rf"^{wheel['pname']}=={re.escape(wheel['version'])}\b.*(?:\n    .*)*", lock, re.MULTILINE)
        assert entry, f"{wheel['pname']} {wheel['version']} is not what requirements.lock has"
        digest = base64.b64decode(wheel["src"]["hash"].removeprefix("sha256-")).hex()
        assert f"--hash=sha256:{digest}" in entry[0]


def test_the_image_starts_the_program(nix_env: NixEnv, project: Path, tmp_path: Path) -> None:
    image = _evaluate(nix_env, project, tmp_path, "image")
    assert image["config"]["Entrypoint"] == ["/cknix-csi/bin/cknix-csi"]
    assert image["tag"] == tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]


def _manifest(env: NixEnv, project: Path, command: Sequence[str], *, chroot: bool = True) -> str:
    """Run one of WAYS in *project* and return the text it makes."""
    program, *arguments = command
    if chroot:
        env.run(program, *arguments, cwd=project)
        return env.physical(str((project / "result").readlink())).read_text()
    # A store without --store: the default one, but for its place.
    place = env.directory / "plain"
    environ = {
        "NIX_LOG_DIR": str(place / "log"),
        "NIX_STATE_DIR": str(place / "state"),
        "NIX_STORE_DIR": str(place / "store"),
    }
    env.run(program, *arguments, cwd=project, store=None, environ=environ)
    return (project / "result").read_text()


def _installed() -> list[dict[str, Any]]:
    """What `kubectl apply -f yaml/` would read."""
    return [document for file in sorted((PROJECT / "yaml").glob("*.yaml")) for document in _documents(file.read_text())]


def _documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document is not None]


def _identity(document: dict[str, Any]) -> tuple[str, str, str]:
    metadata = document["metadata"]
    return document["kind"], metadata.get("namespace", ""), metadata["name"]


def _by_identity(documents: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    found = {_identity(document): document for document in documents}
    assert len(found) == len(documents), "two documents for one object"
    return found


def _images(value: object) -> list[str]:
    """Every container's image, wherever it is."""
    if isinstance(value, dict):
        own = [value["image"]] if isinstance(value.get("image"), str) else []
        return own + [image for item in value.values() for image in _images(item)]
    if isinstance(value, list):
        return [image for item in value for image in _images(item)]
    return []


def _without_images(text: str) -> str:
    return re.sub(r"(?m)^(\s*(?:- )?image:).*$", r"\1", text)


def _names(project: Path) -> str:
    return f"builtins.attrNames (import {project} {{ }})"


def _evaluate(env: NixEnv, project: Path, scratch: Path, attribute: str) -> dict[str, Any]:
    """What nix/ asks of nixpkgs for *attribute*."""
    known = [*tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]]
    names = _requirements(known) - {"aiopath"}
    names |= {"aiofile", "anyio", "certifi", "click", "hatchling", "iso8601", "jsonpatch", "python-dateutil"}
    names |= {"python-json-logger", "six", "urllib3"}
    listed = "[ " + " ".join(f'"{name}"' for name in sorted(names)) + " ]"
    stand_in = scratch / "stand-in.nix"
    stand_in.write_text(STAND_IN.replace("PYTHON_PACKAGES", listed))
    # `outPath` and `type` would make JSON of every record its path alone.
    expression = f"""
      let
        pkgs = import {stand_in};
        nix2container.buildImage = args: args;
        plain = value:
          if builtins.isAttrs value then builtins.mapAttrs (_: plain) (removeAttrs value [ "outPath" "type" ])
          else if builtins.isList value then map plain value
          else value;
      in plain (import {project} {{ inherit pkgs nix2container; }}).{attribute}
    """
    output = env.run("nix-instantiate", "--eval", "--strict", "--json", "--expr", expression).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def _requirements(specifiers: Sequence[str]) -> set[str]:
    return {re.split(r"[^\w-]", specifier, maxsplit=1)[0].lower() for specifier in specifiers}


def _name(dependency: dict[str, Any]) -> str:
    name: str = dependency.get("pname") or dependency["name"]
    return name
