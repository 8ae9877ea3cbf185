"""The table of rights in docs/security.md is that of yaml/20-rbac.yaml, and names tests that exist."""

from __future__ import annotations

import re

from tests.api import rbac
from tests.api.rights import granted
from tests.api.server import REPOSITORY

ROLES = {"controller": rbac.CONTROLLER, "node": rbac.NODE}


def rows() -> list[list[str]]:
    text = (REPOSITORY / "docs/security.md").read_text()
    table = text.partition("| role | verbs |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]


def test_the_table_of_rights_is_what_the_manifest_grants() -> None:
    said = [
        (role, verb, *re.findall("`([^`]+)`", resource))
        for role, verbs, resource, *_ in rows()
        for verb in re.findall("`([a-z]+)`", verbs)
    ]
    assert len(set(said)) == len(said)
    assert set(said) == {
        (role, right.verb, right.resource, *filter(None, [right.name]))
        for role, account in ROLES.items()
        for right in granted(account)
    }


def test_each_right_has_a_test() -> None:
    for *_, test in rows():
        file, _, name = test.strip("`").partition("::")
        assert f"async def {name}(" in (REPOSITORY / file).read_text(), test


def test_no_right_is_for_everything() -> None:
    for account in ROLES.values():
        for right in granted(account):
            assert "*" not in {right.resource, right.verb, right.name}
