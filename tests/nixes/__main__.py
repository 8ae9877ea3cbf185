"""Build every supported Nix that is not cached yet and print where each one is."""

from __future__ import annotations

import sys

from tests.nixes import NixUnavailable, nix, selected


def main() -> int:
    try:
        suites = selected()
    except NixUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for suite in suites:
        try:
            version = nix(suite.name)
        except NixUnavailable as error:
            print(f"{suite.name:10} unavailable  {error}")
            failed = 1
        else:
            print(f"{suite.name:10} {version.version:10} {version.bin_dir}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
