"""Fixtures of the nix rung: every test that asks for `nix` runs once with each supported version."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests import nixes
from tests.nixes import NixEnv, NixUnavailable, NixVersion, Suite

DEMO = Path(__file__).parents[2] / "nix/demo"


@pytest.fixture(scope="session", params=nixes.selected(), ids=nixes.name_of)
def nix(request: pytest.FixtureRequest) -> NixVersion:
    """One supported Nix."""
    suite: Suite = request.param
    try:
        return nixes.nix(suite.name)
    except NixUnavailable as error:
        return _unavailable(error)


@pytest.fixture
def nix_env(nix: NixVersion, tmp_path: Path) -> Iterator[NixEnv]:
    """`nix` with a clean configuration and a chroot store of its own, gone after the test."""
    env = NixEnv(nix, tmp_path / "nix-env")
    yield env
    env.destroy()


@pytest.fixture(scope="session")
def demo_search_path() -> tuple[str, ...]:
    """The ``-I`` arguments for the demo packages."""
    try:
        return tuple(nixes.demo_search_path(DEMO))
    except NixUnavailable as error:
        return _unavailable(error)


def _unavailable(error: NixUnavailable) -> NoReturn:
    """Without it a person skips the test, loudly; CI has no excuse."""
    if os.environ.get("CI") == "true":
        pytest.fail(str(error))
    pytest.skip(str(error))
