"""How many files a role may have open; in a process of its own, since a limit that was lowered stays so."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from cknix_csi.serve import take_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
take_descriptors()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard"), [(64, 640), (640, 640)])
def test_a_role_takes_all_that_it_may_have(soft: int, hard: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(soft), str(hard)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["640", "640"]


@pytest.mark.parametrize("role", ["controller", "node", "provisioner"])
def test_every_role_does_so_first(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cknix_csi import logs, serve

    class Taken(Exception):
        pass

    def take() -> None:
        raise Taken

    monkeypatch.setattr(serve, "take_descriptors", take)
    monkeypatch.setattr(logs, "set_up", lambda *settings: None)
    with pytest.raises(Taken):
        getattr(serve, role)({})
