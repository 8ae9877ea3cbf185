"""The benchmark runs from end to end on a very small closure; what it measures is for `make bench` to say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.report import write
from tests.cluster.harness.scratch import scratch_base
from tests.kernel.node import mounts_below, run

REPOSITORY = Path(__file__).parents[2]
ROWS = {
    "new closure, first pod": {"median", "of it GC root", "of it closure query", "of it database", "of it mounts"},
    "next pod, read-only": {"median", "p99", "unpublish median"},
    "next pod, writable": {"median", "p99", "unpublish median"},
    "next pod through gRPC, read-only": {"median", "p99"},
    "next pod through gRPC, writable": {"median", "p99"},
    "written per further read-only pod": {"bytes", "inodes"},
    "100 pods of one closure, then 100 unpublished": {
        "publish p50",
        "publish p99",
        "publish p99 / p50",
        "unpublish p99 / p50",
        "daemon's memory at start",
        "daemon's memory with all",
        "daemon's memory at end",
    },
    "12 different closures mounted": {
        "start-up reconciliation",
        "known closure, alone",
        "known closure, beside them",
        "known closure, beside / alone",
    },
    "against nix-csi's sequence": {"times faster, first pod", "times faster, further pod"},
}
METHODS = {
    "cknix, read-only",
    "cknix, writable",
    "nix-csi's sequence",
    "nix-csi's sequence, --link-dest",
    "bind mount per store path",
    "composefs image",
}


def bench(data_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "--quick", "--size", "tiny", "--data-root", str(data_root), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def data_root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="cknix-bench-", dir=scratch_base()))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def done(data_root: Path) -> subprocess.CompletedProcess[str]:
    if missing := [name for name in ("rsync", "nix-store", "mkfs.ext4", "losetup") if not shutil.which(name)]:
        pytest.skip(f"the benchmark needs {', '.join(missing)}")
    return bench(data_root)


@pytest.fixture(scope="module")
def results(data_root: Path, done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads((data_root / "out/results.json").read_text())


def test_every_row_is_there_and_measured(results: Any) -> None:
    figures = {(figure["row"], figure["what"]): figure["value"] for figure in results["figures"]}
    for row, names in ROWS.items():
        for name in names:
            value = figures[row, name]
            assert isinstance(value, int | float), (row, name, value)
            # What a read-only pod writes is the one thing that may be nothing.
            assert value > 0 or row == "written per further read-only pod", (row, name, value)


def test_a_further_read_only_pod_writes_nothing(results: Any) -> None:
    written = [figure for figure in results["figures"] if figure["row"] == "written per further read-only pod"]
    assert [(figure["what"], figure["value"]) for figure in written] == [("bytes", 0), ("inodes", 0)]


def test_the_page_cache_holds_a_program_once_and_each_copy_of_it(results: Any) -> None:
    megabytes = {figure["what"]: figure["value"] for figure in results["figures"] if "page cache" in figure["row"]}
    if not all("by cgroup" in what for what in megabytes):
        pytest.skip("no memory cgroup can be made here, and the machine's own counter counts what others do")
    assert list(megabytes.values()) == pytest.approx([50, 50, 100], rel=0.1)


def test_every_method_is_timed_or_says_why_not(results: Any) -> None:
    timings = {timing["method"]: timing for timing in results["timings"]}
    assert set(timings) == METHODS
    for timing in timings.values():
        assert timing["further"] or timing["note"], timing


def test_the_table_is_printed_and_written(data_root: Path, done: subprocess.CompletedProcess[str]) -> None:
    written = (data_root / "out/results.md").read_text()
    for row in (*ROWS, *METHODS):
        assert row in done.stdout
        assert f"| {row} |" in written


def test_nothing_is_left_but_the_cache(data_root: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert {path.name for path in data_root.iterdir()} == {"image.ext4", "out"}
    assert mounts_below(data_root) == []
    assert run("losetup", "--associated", data_root / "image.ext4") == ""
    assert bench(data_root, "--delete-cache").returncode == 0
    assert not data_root.exists()


def test_a_benchmark_that_does_not_exist_is_named(tmp_path: Path) -> None:
    answer = bench(tmp_path, "frist")
    assert answer.returncode == 2
    assert "no benchmark frist; there are: first, next" in answer.stderr


def test_results_are_kept_newest_first_until_they_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    write(file, "## Monday\nslow\n", replace=False)
    write(file, "## Tuesday\nfast\n", replace=False)
    assert [line for line in file.read_text().splitlines() if line.startswith("#")] == [
        "# Results",
        "## Tuesday",
        "## Monday",
    ]
    write(file, "## Wednesday\nfaster\n", replace=True)
    assert [line for line in file.read_text().splitlines() if line.startswith("#")] == ["# Results", "## Wednesday"]
