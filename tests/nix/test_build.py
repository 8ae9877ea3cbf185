"""Builds with every supported Nix: success, failure, limits, interruption, a full disk, and many at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cknix_csi.api.errors import BuildFailed, BuildKilled, DeadlineExceeded
from cknix_csi.api.expression import Data
from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.nix import Evaluation
from tests.nix.room import SYSTEM, Room, processes_of
from tests.nixes import NixEnv, NixVersion

PACKAGES = "(import <cknix-demo> { })"
ROOT = Path(__file__).parents[2]
# How long a builder sleeps, by which its processes are found: of this run and this test alone.
markers = (f"{os.getpid()}{number:04}" for number in itertools.count())


@pytest.fixture(scope="module")
def env(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NixEnv]:
    env = NixEnv(nix, tmp_path_factory.mktemp("build"))
    yield env
    env.destroy()


@pytest.fixture
def room(env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(env, monkeypatch)


def build(name: str, script: str, **attributes: str) -> str:
    more = " ".join(f"{key} = {value};" for key, value in attributes.items())
    return (
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; builder = "${{{PACKAGES}.busybox}}/bin/sh"; '
        f"args = [ \"-c\" ''PATH=${{{PACKAGES}.busybox}}/bin; {script}'' ]; {more} }}"
    )


async def failed(room: Room, expr: str) -> str:
    with pytest.raises(BuildFailed) as caught:
        await room.build(expr)
    assert len(caught.value.message) < 8000
    assert "\x1b" not in caught.value.message
    assert str(room.env.root) not in caught.value.message
    return caught.value.message


async def until_building(marker: str) -> list[int]:
    """The builder's processes, once there are some."""
    async with asyncio.timeout(30):
        while not (found := processes_of(marker)):
            await asyncio.sleep(0.02)
    return found


async def until_gone(marker: str) -> None:
    async with asyncio.timeout(10):
        while processes_of(marker):
            await asyncio.sleep(0.02)


async def test_a_build_makes_its_result_valid_with_all_it_refers_to(room: Room) -> None:
    path = await room.demo("hello")
    assert room.is_valid(path)
    assert "hello from" in room.store.physical_path(path).joinpath("bin/hello").read_text() or room.closure(path)
    room.env.run("nix-store", "--verify-path", *room.closure(path))


async def test_progress_rises_from_nothing_to_everything(room: Room) -> None:
    expr = " ".join(f"${{{build(f'step-{number}', 'echo $name; echo x > $out')}}}" for number in range(4))
    await room.demo("busybox")
    _, seen = await room.build(build("steps", f": {expr}; echo done > $out"))
    counts = [(progress.done, progress.expected) for progress in seen]
    started = next(index for index, progress in enumerate(seen) if progress.building)
    assert counts[-1] == (5, 5)
    assert counts == sorted(counts, key=lambda pair: pair[0]), "what is done stays done"
    total = counts[-1][1]
    # Nix 2.34 counts a build twice for a moment, and two run at a time.
    assert {expected for _, expected in counts[started:]} <= {total, total + 1, total + 2}
    assert all(str(progress)[0].isdigit() for progress in seen), "never 'starting' again"
    assert "steps" in {name for progress in seen for name in progress.building}


async def test_what_is_there_is_not_built_again(room: Room) -> None:
    first, _ = await room.build(build("once", "cat /proc/sys/kernel/random/uuid > $out"))
    content = room.store.physical_path(first).read_text()
    again, seen = await room.build(build("once", "cat /proc/sys/kernel/random/uuid > $out"))
    assert again == first
    assert room.store.physical_path(first).read_text() == content
    assert not any(progress.building for progress in seen)


async def test_only_the_wanted_output_is_promised(room: Room) -> None:
    lib = await room.demo("multi.lib")
    assert (room.store.physical_path(lib) / "lib/libmulti.txt").read_text() == "the library\n"
    assert (await room.demo("multi")).name == "multi"


async def test_a_text_with_all_outputs_of_a_derivation_in_it_is_built(room: Room) -> None:
    path, _ = await room.build(f'let p = {PACKAGES}; in "${{p.hello}}${{builtins.substring 0 0 p.multi.drvPath}}"')
    assert path.name == "hello"
    outputs = (await room.evaluate(f"{PACKAGES}.multi.{output}") for output in ("out", "lib", "doc"))
    assert [room.is_valid(output.result) async for output in outputs] == [True] * 3


async def test_a_failure_shows_the_builders_last_lines_and_nixs_error(room: Room) -> None:
    message = await failed(room, f"{PACKAGES}.broken")
    lines = message.splitlines()
    assert lines[:4] == [
        "configuring",
        "compiling 1 of 2",
        "compiling 2 of 2",
        "cknix-demo: this package is broken on purpose",
    ]
    assert "-broken.drv" in message
    assert "exit code 3" in message


async def test_a_builder_that_was_killed_is_no_failure_of_what_it_builds(room: Room) -> None:
    marker = next(markers)
    building = asyncio.create_task(room.build(build("killed", f"exec sleep {marker}")))
    for pid in await until_building(f"sleep\0{marker}"):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(BuildKilled, match=r"-killed\.drv"):
        await building


async def test_a_failed_dependency_is_the_one_that_is_shown(room: Room) -> None:
    message = await failed(room, f"{PACKAGES}.needsBroken")
    assert "cknix-demo: this package is broken on purpose" in message
    assert "-needs-broken.drv" in message


async def test_a_talkative_builder_is_told_by_its_end(room: Room) -> None:
    message = await failed(
        room,
        build(
            "talks",
            "i=0; while [ $i -lt 3000 ]; do echo line-$i; i=$((i + 1)); done; printf '\\\\033[31mred\\\\n'; exit 1",
        ),
    )
    assert "line-2999" in message
    assert "red" in message
    assert "line-100\n" not in message


async def test_a_line_without_end_is_cut(room: Room) -> None:
    message = await failed(room, build("long", "head -c 300000 /dev/zero | tr '\\\\0' x; echo; echo the-end; exit 1"))
    assert "the-end" in message


async def test_an_output_that_is_not_made_is_a_failed_build(room: Room) -> None:
    assert "failed to produce output path" in await failed(room, build("nothing", "true"))


async def test_a_builder_that_is_missing_is_a_failed_build(room: Room) -> None:
    message = await failed(
        room, 'derivation { name = "x"; system = builtins.currentSystem; builder = "/no/such/builder"; }'
    )
    assert "/no/such/builder" in message


async def test_another_systems_build_is_refused_with_both_systems(room: Room) -> None:
    evaluation = await room.evaluate(f"{PACKAGES}.hello", "aarch64-linux")
    with pytest.raises(BuildFailed) as caught:
        await room.nix().build(evaluation, progress=lambda _: None)
    assert "aarch64-linux" in caught.value.message
    assert SYSTEM in caught.value.message


async def test_a_store_path_that_nobody_has_is_told_so(room: Room) -> None:
    path = StorePath.parse("/nix/store/6c1vlf6kyyl0x5cjdhvr3bymgxa74fjb-nobody-has-this")
    with pytest.raises(BuildFailed) as caught:
        await room.nix().build(Evaluation(path), progress=lambda _: None)
    assert caught.value.message.startswith(f"{path} is not in the store and no substituter has it")


async def test_a_store_path_that_is_there_is_good_at_once(room: Room) -> None:
    path = (await room.evaluate('builtins.toFile "there" "x"')).result
    evaluation = await room.nix().evaluate(Data("storePath", str(path)), SYSTEM)
    await room.nix().build(evaluation, progress=lambda _: None)
    assert room.is_valid(path)


# --- limits and interruption ---


async def test_a_build_that_never_ends_is_stopped_with_its_builder(room: Room) -> None:
    marker = next(markers)
    endless = build("endless", f"echo working; mkdir $out; sleep {marker}")
    with pytest.raises(DeadlineExceeded) as caught:
        await room.build(endless, build_timeout=3.0)
    assert "did not end within 3s" in caught.value.message
    assert "CKNIX_BUILD_TIMEOUT" in caught.value.message
    assert "working" in caught.value.message
    await until_gone(f"sleep\0{marker}")


async def test_a_cancelled_build_leaves_nothing_running_and_nothing_locked(room: Room, tmp_path: Path) -> None:
    """The same derivation is built at once by the next who asks."""
    marker = next(markers)
    expr = build("twice", f"mkdir $out; sleep {marker} & sleep {marker}; exit 1")
    evaluation = await room.evaluate(expr)
    task = asyncio.create_task(room.nix().build(evaluation, progress=lambda _: None))
    await until_building(f"sleep\0{marker}")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_gone(f"sleep\0{marker}")
    assert not room.is_valid(evaluation.result)

    again = asyncio.create_task(room.nix().build(evaluation, progress=lambda _: None))
    await until_building(f"sleep\0{marker}")
    while not again.done():  # the second sleep may begin after the first was seen
        for pid in processes_of(f"sleep\0{marker}"):
            subprocess.run(["kill", "-9", str(pid)], check=False)
        await asyncio.sleep(0.05)
    with pytest.raises(BuildFailed):
        await again


async def test_a_build_whose_nix_was_killed_does_not_block_the_next(room: Room) -> None:
    """What a restarted controller finds."""
    marker = next(markers)
    evaluation = await room.evaluate(build("killed-nix", f"mkdir $out; sleep {marker}; exit 1"))
    task = asyncio.create_task(room.nix().build(evaluation, progress=lambda _: None))
    await until_building(f"sleep\0{marker}")
    for pid in processes_of("--realise"):
        if str(room.env.root).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            subprocess.run(["kill", "-9", str(pid)], check=True)
    with pytest.raises(BuildFailed):
        await task
    await until_gone(f"sleep\0{marker}")

    again = asyncio.create_task(room.nix().build(evaluation, progress=lambda _: None))
    await until_building(f"sleep\0{marker}")
    again.cancel()
    with pytest.raises(asyncio.CancelledError):
        await again
    await until_gone(f"sleep\0{marker}")


# --- many at once ---


@pytest.mark.one_nix
async def test_two_builds_of_the_same_derivation_build_it_once(room: Room) -> None:
    expr = build("shared", "sleep 1; cat /proc/sys/kernel/random/uuid > $out")
    seen: list[list[Progress]] = [[], []]
    evaluation = await room.evaluate(expr)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for one in seen:
            tasks.create_task(room.nix().build(evaluation, progress=one.append))
    assert room.is_valid(evaluation.result)
    room.env.run("nix-store", "--verify-path", str(evaluation.result))


@pytest.mark.one_nix
async def test_eight_different_builds_at_once_all_succeed(room: Room) -> None:
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(room.build(build(f"parallel-{number}", f"echo {number} > $out"))) for number in range(8)
        ]
    for number, task in enumerate(running):
        path, _ = task.result()
        assert room.store.physical_path(path).read_text() == f"{number}\n"
        assert room.is_valid(path)


@pytest.mark.one_nix
async def test_one_failure_of_many_is_told_of_the_one_that_failed(room: Room) -> None:
    good = " ".join(f"${{{build(f'good-{number}', f'echo good-{number}-says; echo x > $out')}}}" for number in range(3))
    message = await failed(room, build("bad", f": {good}; echo bad-says-why; exit 9"))
    assert "bad-says-why" in message
    assert "good-" not in message.partition("error:")[0]


# --- the sandbox ---


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"__noChroot": "true"},
        {"__structuredAttrs": "true"},
        {"outputHash": '"sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="', "outputHashAlgo": '"sha256"'},
    ],
    ids=["ordinary", "__noChroot", "__structuredAttrs", "fixed output"],
)
async def test_a_builder_cannot_read_this_machines_files(
    room: Room, tmp_path: Path, attributes: dict[str, str]
) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cr3t-t0k3n")
    expr = build("spy", f"cat {secret}; cat /proc/1/root{secret}; echo looked; exit 1", **attributes)
    assert "s3cr3t" not in await failed(room, expr)


@pytest.mark.parametrize(
    "expr",
    [
        'derivation { name = "x"; system = "builtin"; builder = "builtin:fetchurl"; url = "file://FILE"; '
        'outputHash = "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="; outputHashMode = "flat"; }',
        'derivation { name = "x"; system = "builtin"; builder = "builtin:unpack-channel"; src = "FILE.tar"; '
        'channelName = "token"; }',
        'derivation { name = "x"; system = "builtin"; builder = "builtin:buildenv"; derivations = [ "true" "5" "1" '
        '"DIRECTORY" ]; manifest = "FILE"; }',
    ],
    ids=["fetchurl", "unpack-channel", "buildenv"],
)
async def test_a_builtin_builder_cannot_either(room: Room, tmp_path: Path, expr: str) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cr3t-t0k3n")
    subprocess.run(["tar", "-cf", f"{secret}.tar", "-C", str(tmp_path), "token"], check=True)
    await failed(room, expr.replace("FILE", str(secret)).replace("DIRECTORY", str(tmp_path)))
    found = subprocess.run(["grep", "-rlF", "s3cr3t-t0k3n", str(room.env.root / "nix/store")], check=False)
    assert found.returncode == 1


# --- a full disk ---

FULL = """
import asyncio, json, subprocess, sys
from pathlib import Path
from cknix_csi.api.errors import CknixError
from cknix_csi.api.expression import Data
from cknix_csi.nix.nix import Nix, NixOptions
from cknix_csi.nix.store import Store

mount, search, expr = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=" + sys.argv[4], "small", str(mount)], check=True)
options = NixOptions(home=mount / "home", search_path={name: Path(path) for name, path in search.items()})
nix = Nix(Store.chroot(mount / "root"), options)

async def main():
    try:
        evaluation = await nix.evaluate(Data("expr", expr), "x86_64-linux")
        await nix.build(evaluation, progress=lambda _: None)
    except CknixError as error:
        return {"type": type(error).__name__, "code": error.code.value, "message": error.message}
    return {"type": None}

print(json.dumps(asyncio.run(main())))
"""


@pytest.mark.parametrize("size", ["16k", "600k", "4m"])
def test_a_full_disk_is_told_as_a_full_disk(room: Room, tmp_path: Path, size: str) -> None:
    """On a tmpfs in a mount namespace of its own: too small for the database, for the inputs, for the output."""
    (tmp_path / "small").mkdir()
    search = {name: str(path) for name, path in room.nix()._options.search_path.items()}
    expr = build("big", "head -c 8000000 /dev/zero > $out")
    run = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", FULL, str(tmp_path / "small"), json.dumps(search), expr, size],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert (told["type"], told["code"]) == ("OutOfSpace", "RESOURCE_EXHAUSTED"), told
