"""``cknix-csi volumes``: what the ledger says, for people and for programs, while its daemon goes on writing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from cknix_csi import cli
from cknix_csi.volumes.ledger import FILE, Ledger, Published

HELLO = "0" * 32 + "-hello"
VOLUMES = [
    Published("/pods/1/mount", "csi-1", HELLO, True, "redirect", "default", "web-0", "uid-1"),
    Published("/pods/\udcff/mount", "", HELLO, False, pod_uid="uid-2"),
]


async def note(root: Path, *entries: Published) -> None:
    moments = iter((1_700_000_000.0, 1_600_000_000.0))
    async with Ledger(root / FILE, clock=lambda: next(moments)) as ledger:
        for entry in entries:
            ledger.record_publish(entry)


async def test_volumes_are_listed_the_oldest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await note(tmp_path, *VOLUMES)
    assert cli.main(["volumes", "--data-root", str(tmp_path)]) == 0
    headings, *lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [cell.strip() for cell in headings if cell] == ["since", "pod", "closure", "made as", "target"]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["2020-09-13 12:26:40Z", "uid-2", HELLO, "read-only", "/pods/\\udcff/mount"],
        ["2023-11-14 22:13:20Z", "default/web-0", HELLO, "redirect writable", "/pods/1/mount"],
    ]


async def test_as_json_they_have_all_that_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await note(tmp_path, VOLUMES[0])
    assert cli.main(["volumes", "--json", "--data-root", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "since": "2023-11-14T22:13:20Z",
            "pod": {"namespace": "default", "name": "web-0", "uid": "uid-1"},
            "closure": HELLO,
            "writable": True,
            "presentation": "redirect",
            "volumeId": "csi-1",
            "target": "/pods/1/mount",
        }
    ]


async def test_the_daemon_may_be_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with Ledger(tmp_path / FILE, gather_seconds=0) as ledger:
        assert cli.main(["volumes", "--json", "--data-root", str(tmp_path)]) == 0
        ledger.record_publish(VOLUMES[0])
    assert json.loads(capsys.readouterr().out) == []


def test_without_a_ledger_that_is_said_and_nothing_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["volumes", "--json", "--data-root", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert f"there is no ledger {tmp_path / FILE}: no node daemon has worked with this data root" in told.err
    assert os.listdir(tmp_path) == []


def test_what_is_no_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).mkdir(parents=True)
    assert cli.main(["volumes", "--data-root", str(tmp_path)]) == 1
    assert f"the ledger {tmp_path / FILE} is a directory; the node daemon puts that aside" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "Permission denied; run this as root"), (errno.EIO, "see the kernel log")]
)
def test_a_file_that_may_not_or_cannot_be_opened_is_said_with_what_helps(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    remedy: str,
) -> None:
    def refuse(file: Path, _mode: str) -> None:
        raise OSError(number, os.strerror(number), str(file))

    monkeypatch.setattr(Path, "open", refuse)
    assert cli.main(["volumes", "--data-root", str(tmp_path)]) == 1
    assert remedy in capsys.readouterr().err


def test_a_ledger_that_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / FILE).write_text("not a database at all")
    assert cli.main(["volumes", "--data-root", str(tmp_path)]) == 1
    assert f"the ledger {tmp_path / FILE} cannot be read: file is not a database" in capsys.readouterr().err
