"""The whole daemon keeps room on its disk: what goes, what stays, and that no pod notices."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import time
from typing import Any

import pytest
from grpclib.exceptions import GRPCError

from tests.nix.disks import MEBIBYTE
from tests.nix.disks import fill as make_closures
from tests.node.disks import fill, mount_small_disk
from tests.node.whole import LIMIT, Cluster, Source, WholeNode, require_exactly

ROUNDS = int(os.environ.get("CKNIX_TEST_ROUNDS", "3"))
EVERYTHING = {"CKNIX_GC_LOW": "98%", "CKNIX_GC_HIGH": "99%"}
"""Whatever can go goes: no disk is ever so empty."""


@pytest.fixture(scope="module")
def big(source: Source) -> dict[str, str]:
    """Closures A to D of 12 MiB each, and Many of 150 small paths, in the cluster's cache."""
    sizes = {f"{name}{part}": 6 * MEBIBYTE for name in "abcd" for part in (0, 1)}
    many = {f"m{number}": 2000 for number in range(150)}
    closures = {name: [f"{name.lower()}0", f"{name.lower()}1"] for name in "ABCD"}
    paths = make_closures(source.env, {**closures, "Many": list(many)}, {**sizes, **many})
    return {name: str(path) for name, path in paths.items()}


def free(node: WholeNode) -> int:
    state = os.statvfs(node.namespace.see(node.data))
    return state.f_bavail * state.f_frsize


def deletions(node: WholeNode) -> list[str]:
    return [call for call in node.nix_calls() if call.startswith("nix-store --delete")]


def there(node: WholeNode, source: Source, path: str) -> bool:
    """The whole closure is valid."""
    return source.closure(path) <= node.registered_paths()


def on_disk(node: WholeNode, path: str) -> bool:
    return os.path.lexists(node.namespace.see(node.data / path.removeprefix("/")))


async def at_rest(node: WholeNode) -> None:
    await node.eventually("no Nix runs", lambda: not node.children())


async def use(node: WholeNode, *paths: str) -> None:
    """A pod after the other uses them, and ends."""
    for number, path in enumerate(paths):
        await node.publish(f"user-{number}", storePath=path)
        await node.unpublish(f"user-{number}")


async def retried(node: WholeNode, volume: str, path: str, **attributes: Any) -> list[str]:
    """Publish as kubelet does, until it succeeds; the codes of the answers before."""
    codes: list[str] = []
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            await node.publish(volume, storePath=path, **attributes)
        except GRPCError as error:
            codes.append(error.status.name)
        else:
            return codes
        await asyncio.sleep(0.5)
    raise AssertionError(f"{codes[-1]} to the end\n{node.log()}")


async def test_a_disk_that_fills_up_loses_what_was_used_least_recently_and_nothing_in_use(
    whole: WholeNode, source: Source, big: dict[str, str]
) -> None:
    mount_small_disk(whole, "ext4", 128)
    await whole.start()
    await whole.publish("resident", storePath=big["D"])
    mounted = whole.mount_id("resident")
    await use(whole, big["B"], big["A"], big["C"], big["B"])
    assert whole.terminate() == 0
    filler = fill(whole.namespace.see(whole.data), 28 * MEBIBYTE)
    assert free(whole) < 24 * MEBIBYTE
    await whole.start(CKNIX_GC_LOW="24Mi", CKNIX_GC_HIGH="34Mi")
    await whole.eventually("there is room", lambda: free(whole) >= 34 * MEBIBYTE)
    await at_rest(whole)
    assert not there(whole, source, big["A"]), "it was used before the others"
    for name in ("B", "C", "D"):
        assert there(whole, source, big[name]), name
    assert whole.mount_id("resident") == mounted
    require_exactly(whole.shown("resident"), source, big["D"])
    assert whole.admin("nix-store", "--verify", "--check-contents") == []
    filler.unlink()


async def test_a_publish_that_found_the_disk_full_succeeds_when_it_is_tried_again(
    whole: WholeNode, source: Source, big: dict[str, str]
) -> None:
    mount_small_disk(whole, "ext4", 128)
    await whole.start(CKNIX_GC_LOW="1Mi", CKNIX_GC_HIGH="24Mi")
    await whole.publish("resident", storePath=big["D"])
    await use(whole, big["A"], big["B"])
    filler = fill(whole.namespace.see(whole.data), 8 * MEBIBYTE)
    codes = await retried(whole, "new", big["C"])
    assert set(codes) == {"RESOURCE_EXHAUSTED"}
    await at_rest(whole)
    require_exactly(whole.shown("new"), source, big["C"])
    require_exactly(whole.shown("resident"), source, big["D"])
    assert not there(whole, source, big["A"])
    filler.unlink()


async def test_a_copy_that_found_no_room_gets_that_of_older_closures_and_never_its_own(
    whole: WholeNode, source: Source, big: dict[str, str]
) -> None:
    mount_small_disk(whole, "ext4", 128)
    await whole.start(CKNIX_GC_LOW="1Mi", CKNIX_GC_HIGH="2Mi")
    await use(whole, big["A"], big["B"])
    filler = fill(whole.namespace.see(whole.data), 20 * MEBIBYTE)
    codes = await retried(whole, "new", big["C"], presentation="copy")
    assert set(codes) == {"RESOURCE_EXHAUSTED"}
    await at_rest(whole)
    require_exactly(whole.shown("new"), source, big["C"])
    assert not there(whole, source, big["A"])
    assert there(whole, source, big["C"]), "which no volume holds, and nobody has used before"
    assert len([call for call in whole.nix_calls() if big["C"] in call and "--delete" not in call]) == 1, "one fetch"
    filler.unlink()


async def test_room_that_the_marks_call_enough_and_that_is_not_is_made_larger(
    whole: WholeNode, source: Source, big: dict[str, str]
) -> None:
    """It is inodes that are missing: no mark in bytes is ever reached."""
    whole.namespace.run("mount", "-t", "tmpfs", "-o", "size=256m,nr_inodes=700", "small-disk", whole.data)
    await whole.start(CKNIX_GC_LOW="2Mi", CKNIX_GC_HIGH="4Mi")
    await use(whole, big["Many"])
    await whole.left_nothing()
    taken = whole.data / "somebody-elses-data"
    state = os.statvfs(whole.namespace.see(whole.data))
    whole.namespace.run("sh", "-c", f"mkdir {taken}; cd {taken}; seq {state.f_ffree - 12} | xargs touch")
    codes = await retried(whole, "new", source.wide)
    # A database that could not be opened, and by the time that this was looked into could have been, is UNAVAILABLE.
    assert "RESOURCE_EXHAUSTED" in codes
    assert set(codes) <= {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
    await at_rest(whole)
    require_exactly(whole.shown("new"), source, source.wide)
    assert not there(whole, source, big["Many"])


async def test_without_a_low_mark_nothing_is_collected(whole: WholeNode, source: Source, big: dict[str, str]) -> None:
    await whole.start(CKNIX_GC_LOW="0")
    await use(whole, source.hello)
    assert whole.terminate() == 0
    await whole.start(CKNIX_GC_LOW="0", CKNIX_GC_HIGH="99%")
    await use(whole, source.hello)
    assert deletions(whole) == []
    assert there(whole, source, source.hello)


def slow_down_deletions(node: WholeNode, seconds: float) -> None:
    real = node.nix.nix.program("nix-store")
    node.wrap("nix-store", f'case $1 in --delete) sleep {seconds};; esac; exec {real} "$@"')


async def test_neither_publishes_nor_fetches_wait_for_a_collection_nor_lose_by_it(
    whole: WholeNode, cluster: Cluster, source: Source, big: dict[str, str]
) -> None:
    await whole.start()
    await whole.publish("resident", storePath=source.chain)
    await use(whole, big["Many"])
    assert whole.terminate() == 0
    slow_down_deletions(whole, 0.7)
    await whole.start(**EVERYTHING)
    await whole.eventually("it collects", lambda: deletions(whole))
    began = time.monotonic()
    cluster.cache.pace = 0.1
    fetching = asyncio.create_task(whole.publish("fetched", storePath=source.toolbox))
    waits: list[float] = []
    overlapped = False
    many = source.closure(big["Many"])
    while any(on_disk(whole, path) for path in many) or len(waits) < 10:
        start = time.monotonic()
        await whole.publish(f"known-{len(waits)}", writable=len(waits) % 2 == 1, storePath=source.chain)
        waits.append(time.monotonic() - start)
        overlapped |= len(deletions(whole)) >= 2 and not fetching.done()
        await asyncio.sleep(0.1)
    took = time.monotonic() - began
    await fetching
    assert overlapped, "what is fetched was so while garbage was deleted"
    await at_rest(whole)
    require_exactly(whole.shown("fetched"), source, source.toolbox)
    print(f"collected in {took:.1f} s; {len(waits)} publishes meanwhile, longest {max(waits) * 1000:.0f} ms")
    assert len(deletions(whole)) >= 2, "in portions"
    assert max(waits) < took / 3
    for volume in ("resident", "known-0", "known-1"):
        require_exactly(whole.shown(volume), source, source.chain)
    assert whole.admin("nix-store", "--verify", "--check-contents") == []


async def test_a_root_that_somebody_removed_of_what_is_mounted_is_taken_before_a_collection(
    whole: WholeNode, source: Source
) -> None:
    await whole.start(CKNIX_GC_LOW="1Mi", CKNIX_GC_HIGH="2Mi")
    await whole.publish("resident", storePath=source.hello)
    roots = whole.namespace.see(whole.data / "nix/var/nix/gcroots/cknix")
    for link in [path for path in roots.rglob("*") if path.is_symlink()]:
        link.unlink()
    code, _ = await found_full(whole, source)
    assert code == "RESOURCE_EXHAUSTED"
    await whole.eventually("it has collected", lambda: "somebody had removed" in whole.log())
    await at_rest(whole)
    require_exactly(whole.shown("resident"), source, source.hello)
    whole.collect_garbage()
    require_exactly(whole.shown("resident"), source, source.hello)


async def found_full(node: WholeNode, source: Source) -> tuple[str, str]:
    """A publish whose fetch ends as on a full disk."""
    real = node.nix.nix.program("nix-store")
    said = "error: writing to file: No space left on device"
    node.wrap("nix-store", f'case $1 in --realise) echo "{said}" >&2; exit 1;; esac; exec {real} "$@"')
    return await node.refused("full", storePath=source.wide)


async def test_a_daemon_killed_while_it_collects_leaves_a_sound_store_and_no_pod_notices(
    whole: WholeNode, source: Source, big: dict[str, str]
) -> None:
    seed = int(os.environ.get("CKNIX_TEST_SEED") or random.randrange(1_000_000))
    print(f"CKNIX_TEST_SEED={seed}")
    dice = random.Random(seed)
    residents = {"resident-ro": False, "resident-rw": True}
    await whole.start()
    for resident, writable in residents.items():
        await whole.publish(resident, writable=writable, storePath=source.chain)
    mounted = {resident: whole.mount_id(resident) for resident in residents}
    garbage = [big["Many"], source.wide, source.toolbox]
    cut_short = 0
    for number in range(ROUNDS):
        await use(whole, *dice.sample([big["Many"], dice.choice(garbage[1:])], 2))
        whole.kill()
        slow_down_deletions(whole, 0.1)
        # There are three portions at least, with pauses in between: of the first round, two are still to come.
        begun = len(deletions(whole)) + (dice.randint(1, 2) if number else 1)
        whole.launch(**EVERYTHING)
        await whole.eventually("it collects", lambda begun=begun: len(deletions(whole)) >= begun)  # type: ignore[misc]
        if number:
            if dice.random() < 0.3:
                whole.collect_garbage()
            await asyncio.sleep(0.4 * dice.random())
        whole.kill(with_children=dice.random() < 0.5)
        cut_short += bool(garbage_left(whole, source))
        await whole.start()
        assert {resident: whole.mount_id(resident) for resident in residents} == mounted
        require_exactly(whole.shown("resident-ro"), source, source.chain)
    print(f"{cut_short} of {ROUNDS} collections were cut short")
    assert cut_short > 0
    for resident in residents:
        require_exactly(whole.shown(resident), source, source.chain)
    assert whole.admin("nix-store", "--verify", "--check-contents") == []
    for path in garbage:  # and what was half deleted comes back whole
        require_exactly(await whole.publish("again", storePath=path), source, path)
        await whole.unpublish("again")
    for resident in residents:
        await whole.unpublish(resident)
    await whole.left_nothing()


def garbage_left(node: WholeNode, source: Source) -> set[str]:
    return node.registered_paths() - source.closure(source.chain)


async def test_who_holds_the_collectors_lock_keeps_nobody_from_a_known_closure(
    whole: WholeNode, source: Source
) -> None:
    await whole.start()
    await whole.publish("known", storePath=source.hello)
    lock = os.open(whole.namespace.see(whole.data / "nix/var/nix/gc.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = [
            asyncio.create_task(whole.refused(f"new-{number}", storePath=f"/nix/store/{number:032}-x"))
            for number in range(12)
        ]
        await asyncio.sleep(0.5)
        for number in range(3):
            async with asyncio.timeout(5):
                await whole.publish(f"pod-{number}", storePath=source.hello)
                await whole.unpublish(f"pod-{number}")
        code, message = await refused[0]
        assert code == "UNAVAILABLE"
        assert "nix/var/nix/gc.lock, such as a stopped nix-collect-garbage: it is tried again" in message
    finally:
        os.close(lock)
    await asyncio.gather(*refused)
    await whole.publish("after", storePath=source.toolbox)
