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
IMAGES_NIX = "trixie"
"""Debian's suite whose Nix is in our image."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_nix: is about our own code only, and runs with the Nix of our image")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``one_nix`` with any other Nix; with one Nix selected, everything runs with that."""
    if len(nixes.selected()) == 1:
        return
    left_out = [item for item in items if item.get_closest_marker("one_nix") and _suite_of(item) != IMAGES_NIX]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _suite_of(item: pytest.Item) -> str:
    """The name of the suite that a test gets as `nix`."""
    assert isinstance(item, pytest.Function)
    suite = item.callspec.params["nix"]
    assert isinstance(suite, Suite)
    return suite.name


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
