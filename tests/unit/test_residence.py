"""A data root has one inhabitant, and what a controller left is cleared out only when it is vacant."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cknix_csi.nix.residence import DataRootOccupied, clear_out, move_in

HOLD = "import sys, fcntl; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"


def remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


async def inhabited_once(data_root: Path) -> None:
    os.close(await move_in(data_root, patience=0))
    (data_root / "nix/store").mkdir(parents=True)


async def test_what_a_controller_left_is_removed_but_not_the_directory_itself(tmp_path: Path) -> None:
    await inhabited_once(tmp_path)
    assert clear_out(tmp_path, remove) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert clear_out(tmp_path, remove) == 0


async def test_nothing_is_removed_while_a_controller_lives_there(tmp_path: Path) -> None:
    await inhabited_once(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin and holder.stdout
    try:
        holder.stdout.readline()
        assert clear_out(tmp_path, remove) == 0
        with pytest.raises(DataRootOccupied, match="another process has worked on"):
            await move_in(tmp_path, patience=0)
    finally:
        holder.stdin.close()
        holder.wait()
    assert (tmp_path / "nix/store").is_dir()
    os.close(await move_in(tmp_path, patience=0))


def test_a_directory_where_no_controller_ever_lived_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    assert clear_out(tmp_path, remove) == 0
    assert clear_out(tmp_path / "missing", remove) == 0
    assert (tmp_path / "precious").exists()
