"""Dumps of trees that change or cannot be dumped; ``tests/nix/test_cache.py`` compares bytes with Nix's."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from cknix_csi.nix.cache.nar import CHUNK, NarUnreadable, dump, dump_of_size


def open_files(below: Path) -> list[str]:
    """What this process has open below *below*."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if target.startswith(str(below)):
            found.append(target)
    return found


def test_pieces_are_never_longer_than_a_chunk_nor_needlessly_short(tmp_path: Path) -> None:
    for size in (0, 1, 7, 8, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK):
        (tmp_path / f"{size}").write_bytes(b"x" * size)
    sizes = [len(piece) for piece in dump(tmp_path)]
    assert all(0 < size <= CHUNK for size in sizes)
    assert all(one + other > CHUNK for one, other in pairwise(sizes))


def test_a_file_that_shrinks_while_it_is_read_ends_the_dump_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "directory" / "big"
    file.parent.mkdir()
    file.write_bytes(b"x" * 4 * CHUNK)
    pieces = dump(tmp_path)
    next(pieces)
    os.truncate(file, CHUNK)
    with pytest.raises(NarUnreadable, match=r"directory/big': it shrank while it was read"):
        list(pieces)
    assert open_files(tmp_path) == []


def test_a_file_that_vanishes_between_listing_and_reading_ends_the_dump_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 4 * CHUNK)
    (tmp_path / "b").touch()
    pieces = dump(tmp_path)
    next(pieces)
    (tmp_path / "b").unlink()
    with pytest.raises(NarUnreadable, match=r"/b': No such file"):
        list(pieces)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NarUnreadable, match=r"/gone': No such file"):
        list(dump(tmp_path / "gone"))
    with pytest.raises(NarUnreadable, match=r"/gone/too': No such file"):
        list(dump(tmp_path / "gone" / "too"))


def test_what_a_nar_cannot_hold_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NarUnreadable, match=r"/fifo': a NAR holds only"):
        list(dump(tmp_path))


def test_a_tree_with_paths_longer_than_the_kernel_takes_is_dumped(tmp_path: Path) -> None:
    depth = 600  # longer than PATH_MAX, since each name has 8 bytes
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("12345678", dir_fd=here)
        below = os.open("12345678", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert b"".join(dump(tmp_path)).count(b"12345678") == depth


def test_a_dump_that_is_given_up_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "big").write_bytes(b"x" * 2 * CHUNK)
    pieces = dump(tmp_path)
    next(pieces)
    assert open_files(tmp_path) != []
    pieces.close()
    assert open_files(tmp_path) == []


@pytest.mark.parametrize(("change", "problem"), [(-1, "longer"), (1, "shorter")])
def test_a_nar_of_another_size_than_registered_is_never_completed(tmp_path: Path, change: int, problem: str) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3 * CHUNK)
    size = len(b"".join(dump(tmp_path)))
    assert len(b"".join(dump_of_size(tmp_path, size))) == size
    given = 0
    with pytest.raises(NarUnreadable, match=problem):
        for piece in dump_of_size(tmp_path, size + change):
            given += len(piece)
    assert given < size + change
