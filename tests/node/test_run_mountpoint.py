"""A machine without ``/nix`` has none again after a run, and no run takes it from another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cknix_csi.run.mountpoint import mountpoint

REPOSITORY = Path(__file__).parents[2]

_OTHER = """
import sys
from pathlib import Path
from cknix_csi.run.mountpoint import mountpoint
with mountpoint(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def nix(tmp_path: Path) -> Path:
    return tmp_path / "nix"


@contextmanager
def _other_run(nix: Path) -> Iterator[None]:
    command = [sys.executable, "-c", _OTHER, str(nix)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        yield
        other.communicate()
    assert other.returncode == 0


def test_a_directory_that_was_made_is_removed_again(nix: Path) -> None:
    with mountpoint(nix):
        assert nix.is_dir()
    assert not nix.exists()


def test_a_directory_that_was_there_stays(nix: Path) -> None:
    nix.mkdir()
    with mountpoint(nix):
        pass
    assert nix.is_dir()


def test_a_directory_that_is_not_empty_any_more_stays(nix: Path) -> None:
    with mountpoint(nix):
        (nix / "store").mkdir()
    assert (nix / "store").is_dir()


def test_a_directory_that_another_run_uses_stays(nix: Path) -> None:
    with mountpoint(nix):
        other = _other_run(nix)
        other.__enter__()
    assert nix.is_dir()
    other.__exit__(None, None, None)


def test_a_link_to_a_directory_is_one(nix: Path) -> None:
    (nix.parent / "elsewhere").mkdir()
    nix.symlink_to("elsewhere")
    with mountpoint(nix):
        pass
    assert nix.is_symlink()


@pytest.mark.parametrize("kind", ["file", "link to nowhere"])
def test_what_can_be_no_directory_is_told(nix: Path, kind: str) -> None:
    if kind == "file":
        nix.touch()
    else:
        nix.symlink_to("nowhere")
    with pytest.raises(OSError, match=r"Not a directory|No such file"), mountpoint(nix):
        pass


def test_runs_that_come_and_go_at_once_always_have_their_directory(nix: Path) -> None:
    def run(_: int) -> None:
        for _ in range(50):
            with mountpoint(nix):
                assert nix.is_dir()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(run, range(8)))
