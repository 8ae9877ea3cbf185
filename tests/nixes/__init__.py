"""Every Nix that cknix supports, as real programs for tests.

Debian packages the three we care about: bookworm (what a fresh Debian machine of this project's kind has), trixie (what
our own image is made of) and sid (what comes next).  No machine can install all of them at once, so each suite's
package is unpacked beside the host and made to run from there (``debian.py``), natively: no chroot, no namespace, no
emulation.  A test therefore sees exactly what a user sees, with its own paths, environment, signals and exit codes, at
no cost.

    python -m tests.nixes            # build what is missing, print a table
    tests.nixes.nix("trixie")        # one of them as a value: built at the first call, cached for every later run
    tests.nixes.NixEnv(nix, path)    # a clean configuration and a chroot store to run it on

``CKNIX_TEST_NIX=trixie`` (or several, separated by commas) runs the tests with a part of them.
"""

from __future__ import annotations

import functools
import os

from tests.nixes.debian import SUITES, NixUnavailable, NixVersion, Suite, cached, provide
from tests.nixes.environment import NixEnv, demo_search_path, host_busybox, remove

__all__ = [
    "SUITES",
    "NixEnv",
    "NixUnavailable",
    "NixVersion",
    "Suite",
    "all_versions",
    "demo_search_path",
    "host_busybox",
    "name_of",
    "nix",
    "remove",
    "selected",
]


@functools.cache
def nix(suite: str) -> NixVersion:
    """The Nix of Debian's *suite*.  Raises `NixUnavailable` with the reason when it cannot be had here."""
    return provide(_suite(suite))


def all_versions() -> list[NixVersion]:
    """Every selected version, oldest first."""
    return [nix(suite.name) for suite in selected()]


def selected() -> list[Suite]:
    """The suites to test with: all, or those that CKNIX_TEST_NIX names."""
    wanted = [name.strip() for name in os.environ.get("CKNIX_TEST_NIX", "").split(",") if name.strip()]
    return [_suite(name) for name in wanted] if wanted else list(SUITES)


def name_of(suite: Suite) -> str:
    """``nix-2.26.3`` once that suite has been built, else ``nix-2.26``: a test's id must not need a download."""
    version = cached(suite)
    return version.name if version else f"nix-{suite.series}"


def _suite(name: str) -> Suite:
    for suite in SUITES:
        if name in (suite.name, suite.series):
            return suite
    known = ", ".join(f"{suite.name} ({suite.series})" for suite in SUITES)
    raise NixUnavailable(f"no supported Nix is called {name!r}; there are: {known}")
