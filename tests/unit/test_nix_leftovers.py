"""What an interrupted fetch left is deleted, and nothing else."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.database import DatabaseUnreadable, register
from cknix_csi.nix.leftovers import clear
from cknix_csi.nix.store import Store

WHOLE = StorePath("0" * 32, "whole-1.0")
PART = StorePath("1" * 32, "part-1.0")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With one path that is registered."""
    store = Store.chroot(tmp_path)
    (store.state / "db").mkdir(parents=True)
    store.physical.mkdir(parents=True)
    register(store, [PathInfo(WHOLE, f"sha256:{'0' * 64}", 1, ())])
    store.physical_path(WHOLE).write_text("whole")
    return store


def lock(store: Store, path: StorePath) -> Path:
    file = store.physical / f"{path.basename}.lock"
    file.touch()
    return file


def make(place: Path, kind: str) -> None:
    if kind == "directory":
        (place / "bin").mkdir(parents=True)
        (place / "bin/x").write_text("half a pro")
        (place / "bin").chmod(0o555)
        place.chmod(0o555)
    elif kind == "link":
        place.symlink_to("/etc")
    else:
        place.write_text("half")


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_a_part_of_a_path_is_deleted(store: Store, kind: str) -> None:
    make(store.physical_path(PART), kind)
    lock(store, PART)
    clear(store)
    assert not os.path.lexists(store.physical_path(PART))
    assert Path("/etc").is_dir()
    assert store.physical_path(WHOLE).read_text() == "whole"


def test_what_is_registered_stays(store: Store) -> None:
    """Nix was killed after it had registered the path and before it had taken its lock away."""
    lock(store, WHOLE)
    clear(store)
    assert store.physical_path(WHOLE).read_text() == "whole"


def test_what_is_being_written_stays(store: Store) -> None:
    make(store.physical_path(PART), "directory")
    with lock(store, PART).open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        clear(store)
        assert (store.physical_path(PART) / "bin/x").exists()
    clear(store)
    assert not store.physical_path(PART).exists()


def test_what_has_no_lock_stays(store: Store) -> None:
    make(store.physical_path(PART), "directory")
    clear(store)
    assert store.physical_path(PART).exists()


def test_what_is_no_store_path_stays(store: Store) -> None:
    for name in ("notes", ".links", f"{'1' * 32}"):
        (store.physical / name).mkdir()
        (store.physical / f"{name}.lock").touch()
    clear(store)
    assert {"notes", ".links", "1" * 32} <= set(os.listdir(store.physical))


def test_when_the_database_cannot_be_read_everything_stays(store: Store) -> None:
    make(store.physical_path(PART), "file")
    lock(store, PART)
    store.database.write_bytes(bytes(4096))
    with pytest.raises(DatabaseUnreadable):
        clear(store)
    assert store.physical_path(PART).exists()


def test_a_store_that_is_not_there_has_nothing_left_in_it(tmp_path: Path) -> None:
    clear(Store.chroot(tmp_path / "nowhere"))
