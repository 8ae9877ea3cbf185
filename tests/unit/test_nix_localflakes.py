"""Which references to this machine's own files a restricted evaluation takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cknix_csi.nix.localflakes import refused

PRIVATE = Path("/var/lib/private-root")


@pytest.mark.parametrize(
    "reference",
    [
        "path:/etc",
        "path:/etc/nix#x",
        "path:///etc",
        "PATH:/etc",
        "/etc",
        "path:/",
        "path:/var/lib",
        "path:/var/lib/private-root/nix/var/nix/db?dir=x#y",
        "path:/var/lib/private%2Droot",
        "path:/proc/self/root/etc",
        "path:/srv/../etc",
        "git+file:///var/lib/private-root",
        "file:///etc/passwd",
        "tarball+file:///etc/x.tar",
        "path:.",
        "path:",
        "path:/proc/self/fd",
        ".",
        "./x#y",
        "~/x",
    ],
)
def test_private_and_relative_places_are_refused(reference: str) -> None:
    assert refused(reference, [PRIVATE])


@pytest.mark.parametrize(
    "reference",
    [
        "github:NixOS/nixpkgs#hello",
        "nixpkgs#hello",
        "git+https://example.org/x?dir=etc",
        "https://example.org/x.tar.gz",
        "path:/srv/flakes/app#app",
        "git+file:///srv/flakes/app",
    ],
)
def test_other_places_are_not(reference: str) -> None:
    assert refused(reference, [PRIVATE]) is None


def test_a_link_is_followed_before_it_is_judged(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    assert refused(f"path:{tmp_path}/link", [PRIVATE])
