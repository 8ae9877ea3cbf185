"""No secret is committed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SECRETS = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY"
    rb"|gh[pousr]_[0-9A-Za-z]{36}|github_pat_[0-9A-Za-z_]{60}|glpat-[0-9A-Za-z_-]{20}"
    rb"|AKIA[0-9A-Z]{16}|xox[abpr]-[0-9A-Za-z-]{20}"
    rb"|eyJ[0-9A-Za-z_-]{20,}\.eyJ[0-9A-Za-z_-]{20,}\.[0-9A-Za-z_-]{20,}"
    rb"|[0-9A-Za-z._-]+:[0-9A-Za-z+/]{86}=="
)
"""Private keys, tokens of code hosts and clouds, service-account tokens, secret keys of Nix (64 bytes in base64)."""


def committed() -> list[Path]:
    command = (
        "git",
        "-c",
        f"safe.directory={REPOSITORY}",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    )
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    return [path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file()]


@pytest.mark.parametrize(
    "text",
    [
        b"-----BEGIN OPENSSH PRIVATE" + b" KEY-----",
        b"token: ghp_" + b"a" * 36,
        b"key-1:" + b"A" * 86 + b"==",
    ],
)
def test_a_secret_is_known_when_it_is_seen(text: bytes) -> None:
    assert SECRETS.search(text)


def test_no_file_holds_a_secret() -> None:
    files = committed()
    assert len(files) > 50
    for file in files:
        found = SECRETS.search(file.read_bytes())
        assert found is None, f"{file}: {found[0][:12]!r}..."
