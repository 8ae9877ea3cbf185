"""What a person reads of a failure: every supported Nix fails in every way here, and each is told in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from cknix_csi.api.errors import BuildFailed, CacheUnavailable, CknixError, DeadlineExceeded, SourceUnavailable
from cknix_csi.api.expression import Data
from cknix_csi.nix.log import headline
from tests.nix.room import SYSTEM, Room
from tests.nixes import NixEnv, NixVersion

PACKAGES = "(import <cknix-demo> { })"
DRV = r"/nix/store/[0-9a-z]{32}-NAME\.drv"


@pytest.fixture(scope="module")
def env(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NixEnv]:
    env = NixEnv(nix, tmp_path_factory.mktemp("messages"))
    yield env
    env.destroy()


@pytest.fixture
def room(env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(env, monkeypatch)


def build(name: str, script: str, more: str = "") -> str:
    return (
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; builder = "${{{PACKAGES}.busybox}}/bin/sh"; '
        f"args = [ \"-c\" ''PATH=${{{PACKAGES}.busybox}}/bin; {script}'' ]; {more} }}"
    )


async def message(room: Room, expr: str, kind: type[CknixError] = CknixError, **options: object) -> str:
    with pytest.raises(kind) as caught:
        await room.build(expr, **options)
    return caught.value.message


def failed(name: str, code: int, said: str = "") -> str:
    """How a failed builder is told: before Nix 2.34, and since."""
    drv, last = DRV.replace("NAME", name), f": {re.escape(said)}" if said else ""
    exit_code = f"failed with exit code {code}"
    return f"(builder for '{drv}' {exit_code}|Cannot build '{drv}': builder {exit_code}){last}"


FIXED = 'outputHash = "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="; outputHashAlgo = "sha256";'
MISMATCH = (
    f"hash mismatch in fixed-output derivation '{DRV.replace('NAME', 'fixed')}': specified: sha256-A{{43}}=, "
    r"got: sha256-WJG1tSLV3whtD/CxEPvZ0hu0/HFjrzTQgoai6Eb2vgM="
)  # printf 'hello\n' | sha256sum

BROKEN = failed("broken", 3, "cknix-demo: this package is broken on purpose")

CASES = {
    "syntax error": ("{ a = ; }", "syntax error, unexpected ';', at expr:1:7"),
    "undefined variable": ("undefinedVariable", "undefined variable 'undefinedVariable', at expr:1:1"),
    "missing attribute": (f"\n  {PACKAGES}.helo", r"attribute 'helo' missing, at expr:2:3\. Did you mean hello\?"),
    "throw": ('builtins.seq (throw "on purpose") 1', "on purpose"),
    "throw of several lines": ('throw "on purpose\nerror: more"', "on purpose"),
    "abort": ('abort "no"', "evaluation aborted with the following error message: 'no'"),
    "infinite recursion": ("let x = x; in x", "infinite recursion encountered, at expr:1:9"),
    "wrong type": ('"a" + 1', "cannot coerce an integer to a string(: 1|, at expr:1:7)"),
    "forbidden": (
        "builtins.readFile /etc/hostname",
        "access to absolute path '/etc(/hostname)?' is forbidden in restricted mode",
    ),
    "not a derivation": (
        "1",
        "expr evaluates to a value of type int; it must evaluate to a derivation or a store path",
    ),
    "failed builder": (f"{PACKAGES}.broken", BROKEN),
    "failed dependency": (f"{PACKAGES}.needsBroken", BROKEN),
    "failed builder, silent": (build("silent", "exit 7"), failed("silent", 7)),
    "failed builder with errors of its own": (
        build("own", "echo error: first; echo error: second; exit 1"),
        failed("own", 1, "second"),
    ),
    "missing builder": (
        'derivation { name = "x"; system = builtins.currentSystem; builder = "/no/such/builder"; }',
        failed("x", 1, "executing '/no/such/builder': No such file or directory"),
    ),
    "failed import from a derivation": (f"import ({build('ifd', 'echo why; exit 4')})", failed("ifd", 4, "why")),
    "hash mismatch": (build("fixed", "echo hello > $out", FIXED), MISMATCH),
    "hash mismatch of a dependency": (
        build("needs", f": ${{{build('fixed', 'echo hello > $out', FIXED)}}}; echo > $out"),
        MISMATCH,
    ),
    "forbidden reference": (
        build("refers", f"echo ${{{PACKAGES}.busybox}} > $out", "allowedReferences = [ ];"),
        "output '/nix/store/.*-refers' is not allowed to refer to the following paths: /nix/store/[0-9a-z]{32}-busybox",
    ),
    "another system": (
        'derivation { name = "x"; system = "vax-linux"; builder = "/bin/sh"; }',
        rf"a 'vax-linux' with features \{{\}} is required to build '{DRV.replace('NAME', 'x')}', but I am a 'x86_64-.*"
        rf"|Cannot build '{DRV.replace('NAME', 'x')}': platform mismatch, "
        "Required system: 'vax-linux', Current system: 'x86_64-linux'",
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_failure_has_one_line_that_says_it(room: Room, case: str) -> None:
    expr, expected = CASES[case]
    told = await message(room, expr)
    assert re.fullmatch(expected, headline(told)), told


async def test_a_timeout_is_told_by_what_timed_out(room: Room) -> None:
    endless = build("endless", "echo working; sleep 60")
    told = await message(room, endless, DeadlineExceeded, build_timeout=2.0)
    assert re.fullmatch(
        r"the build of /nix/store/\S+-endless did not end within 2s and was stopped; "
        "raise CKNIX_BUILD_TIMEOUT if it needs longer",
        headline(told),
    )
    assert told.splitlines()[1:2] == ["working"], "the log follows on lines of its own"
    told = await message(room, endless, BuildFailed, settings={"timeout": "1"})
    assert "timed out after 1 seconds" in headline(told), "Nix's own limit, of nix.conf"


async def test_no_message_shows_what_is_meant_for_programs(room: Room) -> None:
    """Colours, serialised errors, events, and what a terminal writes over."""
    for expr in (
        'derivation { name = "x"; system = builtins.currentSystem; builder = "/no/such/builder"; }',
        build("wild", r"""printf '\033[31mred\n1%%\r2%%\r3%%\n'; echo '@nix { "action": "setPhase" }'; exit 1"""),
        f"{PACKAGES}.helo",
        "throw (builtins.fromJSON ''\"1%\\r2%\\r\\nend\\u001b[0m\"'')",
    ):
        told = await message(room, expr)
        assert "@nix" not in told
        assert "ErrorError" not in told
        assert ":Did" not in told
        assert all(character.isprintable() or character == "\n" for character in told)


async def test_what_writes_over_its_line_is_told_line_by_line(room: Room) -> None:
    told = await message(room, "throw (builtins.fromJSON ''\"1%\\r2%\\r\\nend\"'')")
    assert [line.strip() for line in told.splitlines()[-3:]] == ["error: 1%", "2%", "end"]


AWAY = {"connect_timeout": "1", "download_attempts": "1"}
NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "expr",
    ["import <nixpkgs> { }", f'import (fetchTarball "{NOWHERE}/x.tar.gz")'],
    ids=["search path", "fetch"],
)
async def test_an_evaluation_for_which_a_server_is_away_says_so_and_may_be_tried_again(
    nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch, expr: str
) -> None:
    nix_env.configure(nix_path=f"nixpkgs={NOWHERE}/x.tar.gz", allowed_uris="http://", **AWAY)
    told = await message(Room(nix_env, monkeypatch), expr, SourceUnavailable, search_path={})
    assert re.match(f"what the evaluation reads cannot be downloaded now: .*'{NOWHERE}/x.tar.gz'", told)


async def test_a_search_path_that_cannot_be_downloaded_is_told_with_the_cause(
    nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a second attempt, as in our nix.conf: of the last one Nix does not say why it failed."""
    nix_env.configure(nix_path=f"nixpkgs={NOWHERE}/x.tar.gz", **{**AWAY, "download_attempts": "2"})
    told = await message(Room(nix_env, monkeypatch), "import <nixpkgs> { }", SourceUnavailable, search_path={})
    assert re.search(f"'{NOWHERE}/x.tar.gz' cannot be downloaded: Could(n't| not) connect to server", told), told


async def test_a_path_that_no_substituter_could_be_asked_for_may_come(
    nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    nix_env.configure(substituters=NOWHERE, **AWAY)
    room = Room(nix_env, monkeypatch)
    evaluation = await room.nix().evaluate(Data("storePath", f"/nix/store/{'0' * 32}-nobodys"), SYSTEM)
    with pytest.raises(CacheUnavailable, match=f"a substituter is away: unable to download '{NOWHERE}/"):
        await room.nix().build(evaluation, progress=lambda _: None)


async def test_a_builders_last_words_come_first_also_where_a_substituter_is_away(
    nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    nix_env.configure(substituters=NOWHERE, **AWAY)
    told = await message(Room(nix_env, monkeypatch), build("bad", "echo trouble; exit 3"))
    assert headline(told).endswith(": trouble")
