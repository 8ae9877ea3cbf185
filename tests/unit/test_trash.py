"""Deleting in the background, and stopping it half-way."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cknix_csi.volumes.trash import Trash

ENTRIES = 1000
LIMIT = 20.0


class Gate:
    """Lets so many deletions of a file pass; the next one waits until :attr:`open` is set."""

    def __init__(self, passing: int) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self._passing = passing
        self._unlink: Callable[..., None] = os.unlink

    def __call__(self, *args: object, **kw: object) -> None:
        if self._passing == 0:
            self.reached.set()
            assert self.open.wait(LIMIT)
        self._passing -= 1
        self._unlink(*args, **kw)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    (tmp_path / "trash/old").mkdir(parents=True)
    for number in range(ENTRIES):
        (tmp_path / f"trash/old/{number}").touch()
    return tmp_path / "trash"


async def test_a_deletion_stops_between_two_entries_and_another_process_goes_on(
    full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(10)
    monkeypatch.setattr(os, "unlink", gate)
    trash = Trash(str(full))
    trash.retry()
    assert await asyncio.to_thread(gate.reached.wait, LIMIT)
    closing = asyncio.create_task(trash.close(patience=0.0))
    await asyncio.sleep(0.1)
    assert not closing.done()  # while a deletion is under way, whoever comes next must not begin
    gate.open.set()
    async with asyncio.timeout(LIMIT):
        await closing
    assert len(list((full / "old").iterdir())) == ENTRIES - 11

    following = Trash(str(full))
    following.retry()
    await following.emptied(LIMIT)
    assert list(full.iterdir()) == []


async def test_what_is_deleted_soon_is_deleted_at_the_end(full: Path) -> None:
    trash = Trash(str(full))
    trash.retry()
    await trash.close(patience=LIMIT)
    assert list(full.iterdir()) == []


async def test_the_same_trash_can_go_on_after_it_was_closed(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(10)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", gate)
        trash = Trash(str(full))
        trash.retry()
        assert await asyncio.to_thread(gate.reached.wait, LIMIT)
        closing = asyncio.create_task(trash.close(patience=0.0))
        await asyncio.sleep(0.1)
        gate.open.set()
        await closing
    trash.empty()
    await trash.emptied(LIMIT)
    assert list(full.iterdir()) == []
