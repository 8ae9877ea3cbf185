"""A Nix client in a pod with a read-only volume: what docs/concepts.md says of it, run as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from cknix_csi.nix import database
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.volumes.trash import Trash
from cknix_csi.volumes.view import Views
from tests.nix.room import Room
from tests.nixes import NixEnv

DOCS = Path(__file__).parents[2] / "docs"
# What a published read-only volume is: a view's layers as one overlay, of which the directory nix is what a pod sees.
MOUNT = """
mount -t overlay overlay -o ro,redirect_dir=on,metacopy=on,lowerdir="$1/meta:$2" "$1/m"
mount --bind "$1/m/nix" /nix
mount -o remount,bind,ro,nosuid,nodev /nix
shift 2
exec "$@"
"""


def documented_options() -> list[str]:
    """The options that the documentation gives to a client."""
    found = {
        " ".join(code.split())
        for page in DOCS.glob("*.md")
        for code in re.findall(r"`([^`]+)`", page.read_text())
        if "read-only=true" in code and code.startswith("-")
    }
    assert len(found) == 1, found
    return shlex.split(found.pop())


@pytest.fixture
def room(nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Room:
    if not Path("/nix").is_dir():
        pytest.skip("needs a directory /nix, to mount over it in a namespace of its own")
    return Room(nix_env, monkeypatch)


async def in_pod(room: Room, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of this Nix's programs where /nix is a read-only volume of the demo's `toolbox`."""
    root = await room.demo("toolbox")
    closure = database.query_closure(room.store, root)
    directory = room.env.directory / "views"
    directory.mkdir(exist_ok=True)
    views = Views(str(directory), room.store.physical, Trash(str(room.env.directory / "trash")))
    if not views.exists(closure.id):
        building = views.reserve()
        views.begin(building, closure)
        await StoreClosures(room.store).write_state(closure, Path(building, "meta"))
        views.complete(building, closure.id)
    # A pod's image has no nix.conf.
    pod = NixEnv(room.env.nix, room.env.directory / "pod", settings={})
    return subprocess.run(
        ["unshare", "--mount", "sh", "-euc", MOUNT, "sh", views.path(closure.id), str(room.store.physical),
         pod.nix.program(program), *arguments],
        capture_output=True, text=True, check=False, env=pod.environ, cwd="/",
    )  # fmt: skip


def require_refused(asked: subprocess.CompletedProcess[str]) -> None:
    assert (asked.returncode, asked.stdout) == (1, "")
    assert re.search('error: remounting "?/nix/store"? writable: ', asked.stderr), "it insists on writing"


async def test_a_client_reads_the_closure_with_the_documented_options(room: Room) -> None:
    options = documented_options()
    toolbox = await room.demo("toolbox")
    closure = room.closure(toolbox)
    asked = await in_pod(room, "nix-store", *options, "--query", "--requisites", str(toolbox))
    if room.env.nix.release < (2, 26):
        require_refused(asked)
        return
    assert sorted(asked.stdout.split()) == closure, asked.stderr
    listed = await in_pod(room, "nix", "--extra-experimental-features", "nix-command", "path-info", *options, "--all")
    assert sorted(listed.stdout.split()) == closure, listed.stderr
    verified = await in_pod(room, "nix-store", *options, "--verify-path", *closure)
    assert verified.returncode == 0, verified.stderr
    found = await in_pod(room, "nix-store", *options, "--query", "--requisites", "/nix/var/result")
    assert sorted(found.stdout.split()) == closure, found.stderr


async def test_without_the_options_no_client_opens_it(room: Room) -> None:
    """So that they are needed."""
    toolbox = await room.demo("toolbox")
    asked = await in_pod(room, "nix-store", "--query", "--requisites", str(toolbox))
    require_refused(asked)
