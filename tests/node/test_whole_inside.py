"""Nix in a pod with a writable volume, of each supported version: all of it works, and nothing of it is the node's."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.nixes import NixEnv
from tests.node.whole import Source, WholeNode

BUILD = """
derivation {
  name = "%(name)s";
  system = builtins.currentSystem;
  builder = "${builtins.storePath %(tools)s}/bin/sh";
  args = [ "-euc" "${builtins.storePath %(tools)s}/bin/mkdir -p $out/bin; echo made > $out/bin/%(name)s" ];
}
"""


class Pod:
    """A container with a volume at /nix and a Nix of its own, as an image has it: outside of /nix."""

    def __init__(self, node: WholeNode, volume: str) -> None:
        self._node = node
        self._volume = node.target(volume)
        self._nix = NixEnv(node.nix.nix, node.directory / f"pod-{volume}", settings=dict(node.nix.settings))

    def run(self, program: str, *arguments: str | Path) -> str:
        """Output of one of Nix's programs, on the store that it finds at /nix."""
        script = 'mount --bind "$1" /nix; shift; exec "$@"'
        command = ("unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh", self._volume)
        return self._node.namespace.run(
            *command, self._nix.nix.program(program), *arguments, env=self._nix.environ
        ).strip()


def told(output: str) -> dict[str, dict[str, Any]]:
    """``nix path-info --json`` by path, whatever shape this version gives it, but for the time of registration."""
    found = json.loads(output)
    if isinstance(found, list):
        entries = {entry["path"]: entry for entry in found}
    else:
        found = found.get("info", found)
        entries = {path if path.startswith("/") else f"/nix/store/{path}": entry for path, entry in found.items()}
    return {
        path: {name: value for name, value in entry.items() if name != "registrationTime"}
        for path, entry in entries.items()
    }


def digest(node: WholeNode) -> str:
    """All of the node's store, by find and sha256sum: types, modes, owners, times, targets of links, and contents."""
    store = node.namespace.see(node.data / "nix/store")
    script = r"""cd "$1"; find . -printf '%P %y %m %U:%G %T@ %s %l\n' | sort
        find . -type f -print0 | sort -z | xargs -0 sha256sum"""
    return subprocess.run(["sh", "-euc", script, "sh", store], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def has_nix_directory() -> None:
    if not Path("/nix").is_dir():
        pytest.skip("needs a directory /nix, to mount over it in a namespace of its own")


async def use_nix_in_a_volume(node: WholeNode, source: Source, presentation: str) -> None:
    root = source.hello
    [tools] = [path for path in source.closure(root) if path.endswith("-busybox")]
    volume = await node.publish("mine", writable=True, storePath=root, presentation=presentation)
    reader = await node.publish("reader", storePath=root)
    before, valid = digest(node), node.registered_paths()
    listed = sorted(os.listdir(reader / "store"))
    pod = Pod(node, "mine")

    # What it is told is what the node knows.
    node_says = told("\n".join(node.admin("nix", "path-info", "--json", "--recursive", root)))
    pod_says = told(pod.run("nix", "path-info", "--json", "--recursive", root))
    assert set(pod_says) == source.closure(root)
    assert pod_says == node_says
    assert {name for entry in pod_says.values() for name in entry} >= {"narHash", "narSize", "references", "signatures"}
    pod.run("nix-store", "--verify", "--check-contents")

    # It builds, installs, adds.
    first = pod.run("nix-build", "--no-out-link", "-E", BUILD % {"name": "first", "tools": tools})
    assert (volume / first.removeprefix("/nix/") / "bin/first").read_text() == "made\n"
    pod.run(
        "nix", "build", "--impure", "--out-link", "/nix/var/kept", "--expr", BUILD % {"name": "second", "tools": tools}
    )
    second = os.readlink(volume / "var/kept")
    third = pod.run("nix-build", "--no-out-link", "-E", BUILD % {"name": "third", "tools": tools})
    profile = "/nix/var/nix/profiles/mine"
    pod.run("nix-env", "--profile", profile, "--install", third)
    assert "third" in pod.run("nix-env", "--profile", profile, "--query")
    pod.run("nix-store", "--verify", "--check-contents")

    # It collects what nothing in the volume needs, and that alone.
    pod.run("nix-collect-garbage")
    left = {f"/nix/store/{name}" for name in os.listdir(volume / "store") if not name.startswith(".")}
    assert left >= source.closure(root) | {second, third}
    assert first not in left
    assert os.readlink(volume / "var/nix/profiles" / os.readlink(volume / "var/nix/profiles/mine")) in left
    assert "third" in pod.run("nix-env", "--profile", profile, "--query")
    pod.run("nix-store", "--verify", "--check-contents")

    # And none of it is the node's, or another pod's.
    assert digest(node) == before
    assert node.registered_paths() == valid
    assert sorted(os.listdir(reader / "store")) == listed


@pytest.mark.usefixtures("has_nix_directory")
async def test_nix_works_in_a_writable_volume_and_changes_nothing_outside(any_nix: WholeNode, source: Source) -> None:
    await any_nix.start()
    await use_nix_in_a_volume(any_nix, source, "redirect")


@pytest.mark.usefixtures("has_nix_directory")
@pytest.mark.parametrize("presentation", ["hardlink", "copy"])
async def test_nix_works_in_the_other_kinds_of_writable_volume_too(
    whole: WholeNode, source: Source, presentation: str
) -> None:
    await whole.start()
    await use_nix_in_a_volume(whole, source, presentation)
