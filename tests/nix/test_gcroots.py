"""Garbage-collector roots, as every supported Nix respects them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.store import Store
from tests.nix.room import Room
from tests.nixes import NixEnv

HELLO = StorePath.parse("/nix/store/6c1vlf6kyyl0x5cjdhvr3bymgxa74fjb-hello")
OTHER = StorePath.parse("/nix/store/p4f6sq02wj7dpvjf0fnmbp7xbck7brsn-multi")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def room(nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(nix_env, monkeypatch)


@pytest.fixture
def roots(tmp_path: Path) -> GcRoots:
    return GcRoots(Store.chroot(tmp_path), "closures")


@pytest.mark.parametrize("durable", [True, False])
def test_a_root_is_synced_where_it_is_needed_after_a_power_cut_and_nowhere_else(
    tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    roots = GcRoots(Store.chroot(tmp_path), "owner", durable=durable)
    roots.add("a", HELLO)
    assert roots.list() == {"a": HELLO}
    directory = tmp_path / "nix/var/nix/gcroots/cknix/owner"
    assert (str(directory) in synced, str(directory.parent) in synced) == (durable, durable)


def links(tmp_path: Path) -> dict[str, str]:
    directory = tmp_path / "nix/var/nix/gcroots/cknix/closures"
    found = sorted(path for path in directory.rglob("*") if path.is_symlink())
    return {str(path.relative_to(directory)): os.readlink(path) for path in found}


async def test_a_collection_keeps_the_rooted_closure_and_takes_the_rest(room: Room) -> None:
    kept, gone = await room.demo("hello"), await room.demo("webroot")
    closure = room.closure(kept)
    roots = GcRoots(room.store, "expressions")
    roots.add("shop/hello/1", kept)
    room.env.run("nix-store", "--gc")
    assert [path for path in closure if not room.is_valid(path)] == []
    assert [path for path in closure if not os.path.lexists(room.env.physical(path))] == []
    assert not room.is_valid(gone)
    assert roots.list() == {"shop/hello/1": kept}, "the collector takes no root away"

    roots.remove("shop/hello/1")
    room.env.run("nix-store", "--gc")
    assert not room.is_valid(kept)


async def test_a_root_made_before_its_path_protects_it_from_the_start(room: Room) -> None:
    path = (await room.evaluate("(import <cknix-demo> { }).file")).result
    roots = GcRoots(room.store, "closures")
    roots.add(path.basename, path)
    room.env.run("nix-store", "--gc")
    assert roots.list() == {path.basename: path}, "the collector leaves a link to nothing where it is"
    assert await room.demo("file") == path
    room.env.run("nix-store", "--gc")
    assert room.is_valid(path)


async def test_a_collection_while_roots_come_and_go_keeps_those_that_stay(room: Room) -> None:
    kept = await room.demo("file")
    roots = GcRoots(room.store, "closures")
    roots.add("stays", kept)
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            roots.add(f"moves/{number % 5}", kept)
            roots.remove(f"moves/{(number + 2) % 5}")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(3):
            room.env.run("nix-store", "--gc")
    finally:
        stop.set()
        thread.join()
    assert room.is_valid(kept)


def test_a_root_is_a_link_to_the_logical_path(roots: GcRoots, tmp_path: Path) -> None:
    roots.add("a", HELLO)
    assert links(tmp_path) == {"a": str(HELLO)}


def test_adding_twice_and_removing_twice_is_no_error(roots: GcRoots, tmp_path: Path) -> None:
    for _ in range(2):
        roots.add("a", HELLO)
    assert roots.list() == {"a": HELLO}
    for _ in range(2):
        roots.remove("a")
    assert roots.list() == {}
    roots.remove("never/was")
    assert GcRoots(Store.chroot(tmp_path / "new"), "closures").list() == {}


def test_a_root_moves_to_another_path(roots: GcRoots) -> None:
    roots.add("a", HELLO)
    roots.add("a", OTHER)
    assert roots.list() == {"a": OTHER}


def test_names_with_directories_leave_none_behind(roots: GcRoots, tmp_path: Path) -> None:
    roots.add("shop/hello/1", HELLO)
    roots.add("shop/hello/2", OTHER)
    roots.add("shop/bye/1", OTHER)
    assert roots.list() == {"shop/hello/1": HELLO, "shop/hello/2": OTHER, "shop/bye/1": OTHER}
    roots.remove("shop/hello/1")
    roots.remove("shop/hello/2")
    directory = tmp_path / "nix/var/nix/gcroots/cknix/closures"
    assert os.listdir(directory) == ["shop"]
    assert os.listdir(directory / "shop") == ["bye"]
    roots.remove("shop/bye/1")
    assert os.listdir(directory) == []


def test_owners_do_not_see_each_other(tmp_path: Path) -> None:
    store = Store.chroot(tmp_path)
    GcRoots(store, "closures").add("a", HELLO)
    assert GcRoots(store, "expressions").list() == {}
    GcRoots(store, "expressions").remove("a")
    assert GcRoots(store, "closures").list() == {"a": HELLO}


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", "a//b", ".", "..", "a/..", "../../x", ".hidden", "a/.new", "a\0b"]
)
def test_a_name_that_leads_elsewhere_is_refused(roots: GcRoots, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a name for a GC root"):
        roots.add(name, HELLO)
    with pytest.raises(ValueError, match="is not a name for a GC root"):
        roots.remove(name)
    assert os.listdir(tmp_path) == []


def test_the_longest_names_that_kubernetes_and_nix_have_fit(roots: GcRoots) -> None:
    longest = f"{'x' * 253}/{'0' * 32}-{'n' * 211}"
    roots.add(longest, HELLO)
    assert roots.list() == {longest: HELLO}


def test_what_is_not_ours_is_left_alone(roots: GcRoots, tmp_path: Path) -> None:
    roots.add("a", HELLO)
    directory = tmp_path / "nix/var/nix/gcroots/cknix/closures"
    (directory / "elsewhere").symlink_to("/tmp/result")
    (directory / "file").write_text("x")
    (directory / "directory").mkdir()
    assert roots.list() == {"a": HELLO}


def test_a_link_left_by_a_crash_is_no_root_and_goes_with_the_next(roots: GcRoots, tmp_path: Path) -> None:
    directory = tmp_path / "nix/var/nix/gcroots/cknix/closures/shop/hello"
    directory.mkdir(parents=True)
    (directory / ".new").symlink_to(str(OTHER))
    assert roots.list() == {}
    roots.add("shop/hello/1", HELLO)
    assert links(tmp_path) == {"shop/hello/1": str(HELLO)}


def test_a_link_left_by_a_crash_goes_with_the_last_root(roots: GcRoots, tmp_path: Path) -> None:
    """Nix takes it for a root: it would keep a closure for ever."""
    roots.add("shop/hello/1", HELLO)
    directory = tmp_path / "nix/var/nix/gcroots/cknix/closures"
    (directory / "shop/hello/.new").symlink_to(str(OTHER))
    roots.remove("shop/hello/1")
    assert links(tmp_path) == {}
    assert os.listdir(directory) == []


def test_threads_do_not_disturb_each_other(roots: GcRoots) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(60):
                roots.add(f"shared/{number}", HELLO)
                roots.add(f"own-{number}/{turn}", OTHER)
                roots.remove(f"own-{number}/{turn}")
                if turn < 59:
                    roots.remove(f"shared/{number}")
                roots.list()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert roots.list() == {f"shared/{number}": HELLO for number in range(4)}


IN_A_MACHINE_WITH_THE_SAME_PATH = """
import sys
from pathlib import Path
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.store import Store
roots = GcRoots(Store.chroot(Path("/nix/data")), "closures")
path = StorePath.parse(sys.argv[1])
Path(str(path)).mkdir(parents=True)
roots.add("a/b", path)
print(roots.list() == {"a/b": path})
"""


def test_a_root_is_listed_where_the_machine_has_that_path_itself(tmp_path: Path) -> None:
    """As on NixOS, and in an image that Nix built: the link then leads to a directory."""
    script = f"""
    set -e
    mount -t tmpfs none {tmp_path}
    cd {tmp_path}
    for entry in /*; do
      case $entry in /nix) mkdir .$entry;; *)
        if [ -d "$entry" ] && [ ! -h "$entry" ]; then mkdir ".$entry"; mount --rbind "$entry" ".$entry"
        else cp -a "$entry" ".$entry"; fi;;
      esac
    done
    exec chroot . env PYTHONPATH="$3" "$1" -c "$2" "$4"
    """
    run = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
            sys.executable,
            IN_A_MACHINE_WITH_THE_SAME_PATH,
            str(ROOT),
            str(HELLO),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "True\n", run.stderr
