"""A command whose database was busy is run again, with every supported Nix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cknix_csi.api.errors import EvaluationFailed
from cknix_csi.api.situations import Code
from cknix_csi.nix import nix as nix_module
from cknix_csi.nix.database import DatabaseUnreadable
from tests.nix.room import Room, wrap
from tests.nixes import NixEnv, NixVersion

SAID = "SQLite database '/data/nix/var/nix/db/db.sqlite' is busy"
BUSY = f"""echo started >> $directory/calls
[ $(wc -l < $directory/calls) -le %d ] || exec $real "$@"
cat >&2 <<"END"
@nix {{"action":"msg","level":0,"msg":"\\u001b[31;1merror:\\u001b[0m {SAID}"}}
END
exit 1"""


@pytest.fixture
def room(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    env = NixEnv(nix, tmp_path_factory.mktemp("busy"))
    monkeypatch.setattr(nix_module, "_BUSY_PAUSES", (0.01, 0.01))
    yield Room(env, monkeypatch)
    env.destroy()


def calls(room: Room) -> int:
    return len((room.env.directory / "calls").read_text().splitlines())


@pytest.mark.parametrize("program", ["nix", "nix-store"])
async def test_it_is_run_again_and_nothing_is_told(
    room: Room, program: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrap(room.env, monkeypatch, BUSY % 2, program, real=program)
    assert room.is_valid(await room.demo("hello"))
    assert calls(room) == 3
    assert caplog.text == ""


async def test_what_fails_afterwards_is_told_without_it(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(room.env, monkeypatch, BUSY % 1, "nix", real="nix")
    with pytest.raises(EvaluationFailed, match="undefined variable 'y'") as raised:
        await room.evaluate("let x = 1; in y")
    assert SAID not in raised.value.message
    assert calls(room) == 2


@pytest.mark.parametrize("program", ["nix", "nix-store"])
async def test_one_that_stays_busy_is_no_failure_of_the_expression(
    room: Room, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap(room.env, monkeypatch, BUSY % 1000, program, real=program)
    with pytest.raises(DatabaseUnreadable) as raised:
        await room.demo("hello")
    assert raised.value.message == f"{SAID}, again and again; it is tried again"
    assert raised.value.code is Code.UNAVAILABLE
    assert calls(room) == 3
