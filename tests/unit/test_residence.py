"""A data root has one inhabitant; what a controller left is kept for its return, and goes only when it is vacant."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.collection import Collected, Space
from cknix_csi.nix.residence import AbandonedStore, DataRootOccupied, abandon, give_up, move_in
from cknix_csi.nix.wants import Wants

HOLD = "import sys, fcntl; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
WEEK = 604_800.0


def remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


async def inhabited_once(data_root: Path) -> None:
    os.close(await move_in(data_root, patience=0))
    (data_root / "nix/store").mkdir(parents=True)


@contextmanager
def inhabited(data_root: Path) -> Iterator[None]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(data_root / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin and holder.stdout
    try:
        holder.stdout.readline()
        yield
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def names(data_root: Path) -> list[str]:
    return sorted(path.name for path in data_root.iterdir())


def noted_ago(data_root: Path, seconds: float) -> None:
    """As if the store had been seen abandoned so many seconds ago."""
    when = time.time() - seconds
    os.utime(data_root / ".abandoned", (when, when))


async def test_what_a_controller_left_is_removed_at_once_where_nothing_is_kept(tmp_path: Path) -> None:
    await inhabited_once(tmp_path)
    assert abandon(tmp_path, remove, keep=0) == 1
    assert names(tmp_path) == [".lock"]
    assert abandon(tmp_path, remove, keep=0) == 0


async def test_what_a_controller_left_is_kept_from_when_it_was_first_seen_and_no_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await inhabited_once(tmp_path)
    # However old its files are.
    os.utime(tmp_path / "nix", (0, 0))
    for _ in range(3):
        assert abandon(tmp_path, remove, keep=WEEK) == 0
    noted_ago(tmp_path, WEEK - 60)
    # Another daemon, which knows it from the disk alone.
    assert abandon(tmp_path, remove, keep=WEEK) == 0
    assert (tmp_path / "nix/store").is_dir()
    noted_ago(tmp_path, WEEK + 1)
    assert abandon(tmp_path, remove, keep=WEEK) == 1
    assert names(tmp_path) == [".lock"]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"the controller has left its store in {tmp_path}, which is kept for 168h0m (CKNIX_ABANDONED_STORE_TIME)",
        f"removed the store that a controller left in {tmp_path}",
    ]


async def test_a_controller_that_comes_back_finds_everything_and_the_time_begins_anew_when_it_goes_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await inhabited_once(tmp_path)
    abandon(tmp_path, remove, keep=WEEK)
    noted_ago(tmp_path, WEEK - 60)
    caplog.set_level(logging.INFO)
    os.close(await move_in(tmp_path, patience=0))
    assert names(tmp_path) == [".lock", "nix"]
    assert f"found the store in {tmp_path} again, which had been abandoned for 167h5" in caplog.text
    abandon(tmp_path, remove, keep=WEEK)
    noted_ago(tmp_path, 120)
    assert abandon(tmp_path, remove, keep=WEEK) == 0
    assert (tmp_path / "nix/store").is_dir()


async def test_a_clock_that_was_wrong_begins_the_time_anew(tmp_path: Path) -> None:
    await inhabited_once(tmp_path)
    abandon(tmp_path, remove, keep=60)
    noted_ago(tmp_path, -WEEK)
    assert abandon(tmp_path, remove, keep=60) == 0
    noted_ago(tmp_path, 61)
    assert abandon(tmp_path, remove, keep=60) == 1


async def test_a_note_that_cannot_be_read_or_made_is_no_permission(tmp_path: Path) -> None:
    await inhabited_once(tmp_path)
    (tmp_path / ".abandoned").symlink_to(tmp_path / ".abandoned")  # ELOOP
    with pytest.raises(OSError, match="symbolic links"):
        abandon(tmp_path, remove, keep=1)
    assert (tmp_path / "nix/store").is_dir()


async def test_nothing_is_removed_while_a_controller_lives_there(tmp_path: Path) -> None:
    await inhabited_once(tmp_path)
    abandon(tmp_path, remove, keep=WEEK)
    noted_ago(tmp_path, 2 * WEEK)
    with inhabited(tmp_path):
        assert abandon(tmp_path, remove, keep=WEEK) == 0
        assert abandon(tmp_path, remove, keep=0) == 0
        assert give_up(tmp_path, remove) == 0
        with pytest.raises(DataRootOccupied, match="another process has worked on"):
            await move_in(tmp_path, patience=0)
    assert (tmp_path / "nix/store").is_dir()
    os.close(await move_in(tmp_path, patience=0))


def test_a_directory_where_no_controller_ever_lived_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    for keep in (0, WEEK):
        assert abandon(tmp_path, remove, keep=keep) == 0
        assert abandon(tmp_path / "missing", remove, keep=keep) == 0
    assert give_up(tmp_path, remove) == 0
    assert names(tmp_path) == ["precious"]


async def test_for_room_goes_only_what_is_known_to_be_abandoned(tmp_path: Path) -> None:
    await inhabited_once(tmp_path)
    # Its controller may be about to start again here.
    assert give_up(tmp_path, remove) == 0
    abandon(tmp_path, remove, keep=WEEK)
    assert give_up(tmp_path, remove) == 1
    assert names(tmp_path) == [".lock"]


class Trash:
    """Deletes at once; *order* tells what happened when."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    async def throw_away(self, choose: Callable[[Callable[[str], None]], object]) -> None:
        def take(path: str) -> None:
            remove(path)
            self.order.append(f"thrown away {Path(path).name}")

        choose(take)

    async def emptied(self) -> None:
        self.order.append("emptied")


class Store:
    def __init__(self, order: list[str]) -> None:
        self.order = order

    async def space(self) -> Space:
        return Space(1, 2)

    async def collect(self, want: int, order: Sequence[StorePath], wants: Callable[[], Wants]) -> Collected:
        self.order.append("collected")
        return Collected(0, 0, ())


async def test_a_collection_begins_with_the_abandoned_store(tmp_path: Path) -> None:
    await inhabited_once(tmp_path)
    order: list[str] = []
    abandoned = AbandonedStore(tmp_path, Trash(order), node="here", keep=WEEK)
    store = abandoned.before(Store(order))
    assert await store.space() == Space(1, 2)
    await abandoned.controller_is_on("here")
    await store.collect(1, (), Wants)
    assert order == ["emptied", "collected"]
    order.clear()
    await abandoned.controller_is_on("elsewhere")
    assert order == []
    await store.collect(1, (), Wants)
    assert order == ["thrown away nix", "emptied", "collected"]


async def test_an_abandoned_store_that_cannot_go_stops_no_collection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await inhabited_once(tmp_path)
    order: list[str] = []

    class Full(Trash):
        async def throw_away(self, choose: Callable[[Callable[[str], None]], object]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    await AbandonedStore(tmp_path, Full(order), node="here", keep=WEEK).before(Store(order)).collect(1, (), Wants)
    assert order == ["emptied", "collected"]
    assert "is not removed: [Errno 28] No space left on device" in caplog.text
