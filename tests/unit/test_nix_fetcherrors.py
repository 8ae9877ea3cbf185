"""Nix's words about a failed fetch, as recorded from each supported version, and what they are taken for."""

from __future__ import annotations

import pytest

from cknix_csi.api.errors import CacheUnavailable, CknixError, NotFound, PathUntrusted
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.fetcherrors import PathCollected, fetch_error, unreachable

PATH = StorePath("0" * 32, "x")
URL = "http://cache"
UNKNOWN = f"don't know how to build these paths:\n  {PATH}"
FAILED_26 = f"error: build of '{PATH}' failed"
FAILED_34 = f"error: path '{PATH}' is required, but there is no substituter that can build it"
NO_SERVER = "Couldn't connect to server (7)"
UNSIGNED = "signed by any of the keys in 'trusted-public-keys'"
LEFT_OUT = f"warning: Nix search path entry '{URL}/x' cannot be downloaded, ignoring"
REFUSED = "Could not connect to server (7) Failed to connect to cache port 80 after 0 ms: Could not connect to server"

CASES: dict[str, tuple[list[str], list[str], type[CknixError]]] = {
    "2.8, the collector has just gone": (
        [
            "error: cannot connect to socket at '/data/nix/var/nix/gc-socket/socket': Connection refused",
            f"error: build of '{PATH}' failed",
        ],
        [],
        PathCollected,
    ),
    "2.8, cache down": (
        [FAILED_26],
        [
            f"warning: error: unable to download '{URL}/nix-cache-info': {NO_SERVER}; retrying in 251 ms",
            f"warning: unable to download '{URL}/nix-cache-info': {NO_SERVER}",
            UNKNOWN,
        ],
        CacheUnavailable,
    ),
    "2.34, cache down": (
        [FAILED_34],
        [f"warning: unable to download '{URL}/nix-cache-info': {REFUSED}"],
        CacheUnavailable,
    ),
    "2.26, cache down, its nix-cache-info remembered": (
        [f"error: unable to download '{URL}/00.narinfo': {REFUSED}"],
        [],
        CacheUnavailable,
    ),
    "2.8, wrong key": (
        [FAILED_26],
        [f"warning: the substitute for '{PATH}' from '{URL}' is not {UNSIGNED}"],
        PathUntrusted,
    ),
    "2.34, wrong key": (
        [FAILED_34],
        [f"warning: ignoring substitute for '{PATH}' from '{URL}', as it's not {UNSIGNED}"],
        PathUntrusted,
    ),
    "any, changed content": (
        [f"error: hash mismatch importing path '{PATH}';\n         specified: sha256:a\n         got:       sha256:b"],
        [],
        PathUntrusted,
    ),
    "2.26, connection lost in the NAR": (
        [f"error: unable to download '{URL}/nar/0.nar': HTTP error 200 (curl error: Transferred a partial file)"],
        [],
        CacheUnavailable,
    ),
    "2.26, NAR gone": ([f"error: file 'nar/0.nar' does not exist in binary cache '{URL}'"], [], CacheUnavailable),
    "2.8, a reference collected meanwhile": (
        [
            "nix-store: src/libstore/build/substitution-goal.cc:190: "
            "void nix::PathSubstitutionGoal::referencesValid(): Assertion `worker.store.isValidPath(i)' failed."
        ],
        [],
        PathCollected,
    ),
    "2.26, a reference collected meanwhile": (
        [f"error: path '/nix/store/{'1' * 32}-y' is not valid", FAILED_26],
        [],
        PathCollected,
    ),
    "2.34, a reference collected meanwhile": (
        [f"error: reference '/nix/store/{'1' * 32}-y' of path '{PATH}' is not a valid path"],
        [],
        PathCollected,
    ),
    "any, nobody has it": ([FAILED_26], [UNKNOWN], NotFound),
}


@pytest.mark.parametrize("case", CASES)
def test_a_failed_fetch_is_understood(case: str) -> None:
    errors, warnings, kind = CASES[case]
    error = fetch_error(PATH, [URL], errors, warnings)
    assert type(error) is kind
    assert str(PATH) in error.message


def test_without_a_known_cache_the_path_may_still_come() -> None:
    assert fetch_error(PATH, [], [FAILED_26], [UNKNOWN]).code.transient


def test_a_retry_that_succeeded_is_not_blamed() -> None:
    retried = f"warning: unable to download '{URL}/nix-cache-info': {REFUSED}; retrying in 297 ms (attempt 1/2)"
    assert isinstance(fetch_error(PATH, [URL], [FAILED_34], [retried, UNKNOWN]), NotFound)


@pytest.mark.parametrize(
    ("errors", "warnings", "why"),
    [
        ([f"error: unable to download '{URL}/x': {NO_SERVER}"], [], f"unable to download '{URL}/x': {NO_SERVER}"),
        ([], [f"warning: unable to download '{URL}/x': {REFUSED}"], f"unable to download '{URL}/x': {REFUSED}"),
        ([f"error: unable to download '{URL}/x': HTTP error 404"], [], ""),
        ([], [f"warning: error: unable to download '{URL}/x': {NO_SERVER}; retrying in 251 ms"], ""),
        ([], [LEFT_OUT], f"Nix search path entry '{URL}/x' cannot be downloaded"),
        (
            [],
            [f"warning: error: unable to download '{URL}/x': {NO_SERVER}; retrying in 251 ms", LEFT_OUT],
            f"Nix search path entry '{URL}/x' cannot be downloaded: {NO_SERVER}",
        ),
        (
            [],
            [f"warning: unable to download '{URL}/x': {REFUSED}; retrying in 297 ms (attempt 1/2)", LEFT_OUT],
            f"Nix search path entry '{URL}/x' cannot be downloaded: {REFUSED}",
        ),
        (
            [],
            [f"warning: unable to download '{URL}/y': {REFUSED}; retrying in 297 ms (attempt 1/2)", LEFT_OUT],
            f"Nix search path entry '{URL}/x' cannot be downloaded",
        ),
        (["error: syntax error"], [], ""),
    ],
)
def test_a_server_that_did_not_answer_is_told_from_one_that_said_no(
    errors: list[str], warnings: list[str], why: str
) -> None:
    assert unreachable(errors, warnings) == why
