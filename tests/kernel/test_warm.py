"""Views that outlive their last user for a while, and views that are found again: whole, or not used."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cknix_csi.api.errors import CknixError
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes.failures import StoreDamaged, ViewDamaged
from cknix_csi.volumes.soundness import flaw
from cknix_csi.volumes.warm import Warm
from tests.kernel.node import Node, metadata, mounts_below, require_shows, run
from tests.kernel.steps import Stepped, SteppedClosures, SteppedMounts
from tests.kernel.store import fill_small
from tests.kernel.test_failure import Injected, kill_at

both = pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])


async def steps_of(node: Node, keep_warm: Warm) -> list[str]:
    """Restart *node* so that it keeps views warm; the list receives the name of each step."""
    steps = Stepped(lambda _number, _name: None)
    await node.restart(closures=SteppedClosures(node.store, steps), mounts=SteppedMounts(steps), keep_warm=keep_warm)
    await node.volumes.reconcile()
    steps.calls.clear()
    return steps.calls


def views(node: Node) -> set[str]:
    return set(os.listdir(node.data / "views"))


async def require_shows_closure(node: Node, volume: Path, root: StorePath) -> None:
    require_shows(volume, node.store, [info.path for info in (await node.store.query(root)).paths])


async def cool(node: Node) -> None:
    """Drop what is warm, and require that nothing was left but that."""
    await node.volumes.forget_unused()
    assert await node.left() == []


@both
async def test_a_view_outlives_its_last_user_with_its_gc_root_and_without_a_mount_and_is_not_built_again(
    node: Node, writable: bool
) -> None:
    calls = await steps_of(node, Warm())
    for _ in range(3):
        await require_shows_closure(node, await node.publish(node.shapes, writable=writable), node.shapes)
        await node.unpublish()
        assert mounts_below(node.scratch) == []
        assert os.listdir(node.pods) == os.listdir(node.data / "volumes") == []
        assert views(node) == node.store.roots() == {node.shapes.basename}
    assert (calls.count("query"), calls.count("write_state"), calls.count("release")) == (1, 1, 0)
    assert await node.volumes.forget_unused() == [node.shapes.basename]
    assert await node.volumes.forget_unused() == []
    assert await node.left() == []


async def test_what_has_users_is_not_unused(node: Node) -> None:
    await node.restart(keep_warm=Warm())
    target = await node.publish(node.shapes)
    await node.publish(node.shapes, "b", writable=True)
    await node.unpublish("b")
    assert await node.volumes.forget_unused() == []
    await require_shows_closure(node, target, node.shapes)
    await node.unpublish()
    await cool(node)


async def test_the_least_recently_used_views_go_when_there_are_too_many(node: Node) -> None:
    await node.restart(keep_warm=Warm(count=2))
    roots = [fill_small(node.store, f"small-{number}") for number in range(4)]
    for at in (0, 1, 2, 1, 3):  # the second is used again, and outlives the third
        await node.publish(roots[at])
        await node.unpublish()
    assert views(node) == node.store.roots() == {roots[1].basename, roots[3].basename}
    await cool(node)


async def test_a_view_goes_when_its_time_is_up_and_a_user_in_between_starts_the_time_anew(node: Node) -> None:
    await node.restart(keep_warm=Warm(seconds=0.5))
    await node.publish(node.small)
    await node.unpublish()
    target = await node.publish(node.small)
    await asyncio.sleep(0.7)
    require_shows(target, node.store, [node.small])
    await node.unpublish()
    assert views(node) == {node.small.basename}
    async with asyncio.timeout(10):
        while views(node):
            await asyncio.sleep(0.02)
    assert await node.left() == []


async def test_only_what_is_wanted_stays_and_no_longer_than_that(node: Node) -> None:
    wanted = {node.small.basename}
    await node.restart(keep_warm=Warm(wanted=wanted.__contains__))
    for root in (node.small, node.shapes):
        await node.publish(root)
        await node.unpublish()
    assert views(node) == node.store.roots() == {node.small.basename}
    target = await node.publish(node.small)
    wanted.clear()
    await asyncio.sleep(1.5)
    require_shows(target, node.store, [node.small])
    wanted.add(node.small.basename)
    await node.unpublish()
    assert views(node) == {node.small.basename}
    wanted.clear()
    async with asyncio.timeout(10):
        while views(node):
            await asyncio.sleep(0.02)
    assert await node.left() == []


async def test_reconciling_leaves_warm_views_and_drops_one_whose_gc_root_was_removed(node: Node) -> None:
    await node.restart(keep_warm=Warm())
    for root in (node.small, node.shapes):
        await node.publish(root)
        await node.unpublish()
    await node.store.release(node.shapes.basename)
    report = await node.volumes.reconcile()
    assert (report.warm, report.views_removed) == ([node.small.basename], [node.shapes.basename])
    assert report.words() == [
        f"removed 1 view nobody uses: {node.shapes.basename}",
        f"kept 1 view for a while that nobody uses: {node.small.basename}",
    ]
    assert views(node) == node.store.roots() == {node.small.basename}
    await cool(node)


async def test_the_next_process_keeps_none_of_them(node: Node) -> None:
    await node.restart(keep_warm=Warm())
    await node.publish(node.small)
    await node.unpublish()
    await node.restart(keep_warm=Warm())
    report = await node.volumes.reconcile()
    assert report.views_removed == [node.small.basename]
    assert await node.left() == []


async def test_a_view_that_cannot_be_dropped_in_time_is_tried_again_by_a_later_operation(node: Node) -> None:
    await node.restart(keep_warm=Warm(seconds=0.05))
    await node.publish(node.small)
    await node.unpublish()
    bound = node.scratch / "bound"
    bound.mkdir()
    run("mount", "--bind", node.data / "views" / node.small.basename / "meta", bound)
    await asyncio.sleep(0.2)
    assert await node.volumes.forget_unused() == []
    assert views(node) == node.store.roots() == {node.small.basename}
    run("umount", bound)
    await node.unpublish("another")
    assert await node.left() == []


async def test_many_pods_of_few_closures_coming_and_going_are_always_shown_the_whole(node: Node) -> None:
    await node.restart(keep_warm=Warm(count=1, seconds=0.01))
    roots = [node.small, fill_small(node.store, "second-1.0"), fill_small(node.store, "third-1.0")]

    async def pod(number: int) -> None:
        for round_ in range(8):
            root = roots[(number + round_) % 3]
            target = await node.publish(root, f"p{number}", writable=round_ % 3 == 0)
            require_shows(target, node.store, [root])
            await node.unpublish(f"p{number}")
            if round_ == number:
                await node.volumes.forget_unused()
            await asyncio.sleep(0.005 * number)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(pod(number))
    await cool(node)


async def test_a_view_that_another_process_left_without_a_user_is_not_used_however_whole_it_looks(node: Node) -> None:
    """A power cut may have taken what was written to it, and left names, sizes and times."""
    view, kept = node.data / "views" / node.shapes.basename, node.scratch / "kept"
    await node.restart(keep_warm=Warm())
    await node.publish(node.shapes)
    expected = metadata(view / "meta", content=True)
    await node.unpublish()
    run("cp", "--archive", view, kept)
    await node.restart(keep_warm=Warm())
    await node.volumes.reconcile()
    assert not view.exists()
    kept.rename(view)  # as when it could not be thrown away
    database = view / "meta/nix/var/nix/db/db.sqlite"
    database.write_bytes(bytes(database.stat().st_size))
    os.utime(database, ns=(10**9, 10**9))
    assert flaw(str(view), node.shapes.basename, str(node.store.store_dir)) is None
    await require_shows_closure(node, await node.publish(node.shapes), node.shapes)
    assert metadata(view / "meta", content=True) == expected
    await node.unpublish()
    await cool(node)


def remove_database(view: Path) -> None:
    (view / "meta/nix/var/nix/db/db.sqlite").unlink()


def empty_database(view: Path) -> None:
    database = view / "meta/nix/var/nix/db/db.sqlite"
    os.truncate(database, 0)
    os.utime(database, ns=(10**9, 10**9))


def change_database(view: Path) -> None:
    with (view / "meta/nix/var/nix/db/db.sqlite").open("r+") as database:
        database.write("X")


def remove_database_directory(view: Path) -> None:
    shutil.rmtree(view / "meta/nix/var/nix/db")


def remove_var(view: Path) -> None:
    shutil.rmtree(view / "meta/nix/var")


def remove_layer(view: Path) -> None:
    shutil.rmtree(view / "meta")


def remove_links_directory(view: Path) -> None:
    (view / "meta/nix/store/.links").rmdir()


def turn_the_result_elsewhere(view: Path) -> None:
    (view / "meta/nix/var/result").unlink()
    (view / "meta/nix/var/result").symlink_to("/nix/store")


def forbid_a_directory(view: Path) -> None:
    (view / "meta/nix/var").chmod(0o700)


def remove_root_entry(view: Path) -> None:
    (view / "meta/nix/store" / view.name).rmdir()


def remove_another_entry(view: Path) -> None:
    next((view / "meta/nix/store").glob("*-library-1.0")).rmdir()


def restore_without_attributes(view: Path) -> None:
    """As a backup or a move to another disk does that keeps times but no trusted attributes."""
    os.removexattr(next((view / "meta/nix/store").glob("*-library-1.0")), "trusted.overlay.redirect")


def restore_a_file_without_attributes(view: Path) -> None:
    os.removexattr(next((view / "meta/nix/store").glob("*-source.tar")), "trusted.overlay.metacopy")


def file_for_directory(view: Path) -> None:
    entry = next((view / "meta/nix/store").glob("*-library-1.0"))
    entry.rmdir()
    entry.touch()
    os.utime(entry.parent, ns=(10**9, 10**9))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "the database is gone": (remove_database, "meta/nix/var/nix/db was changed"),
    "the database is empty": (empty_database, "the database is empty"),
    "the database was written to": (change_database, "db.sqlite was changed"),
    "the database's directory is gone": (remove_database_directory, "meta/nix/var/nix was changed"),
    "var is gone": (remove_var, "meta/nix was changed"),
    "the layer is gone": (remove_layer, "meta/nix/store is missing"),
    ".links is gone": (remove_links_directory, "meta/nix/store was changed"),
    "the result leads elsewhere": (turn_the_result_elsewhere, "meta/nix/var was changed"),
    "a directory is closed": (forbid_a_directory, "meta/nix/var was changed"),
    "the root's entry is gone": (remove_root_entry, "root-1.0 is missing"),
    "another entry is gone": (remove_another_entry, "meta/nix/store was changed"),
    "a directory lost its redirect": (restore_without_attributes, "library-1.0 does not lead to the store"),
    "a file lost its metacopy": (restore_a_file_without_attributes, "source.tar hides the store's file"),
    "an entry has another type": (file_for_directory, "library-1.0 is of another type"),
}
damages = pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES.keys())


@damages
async def test_a_warm_view_that_is_not_whole_is_built_anew(
    node: Node, damage: Callable[[Path], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    view = node.data / "views" / node.shapes.basename
    await node.restart(keep_warm=Warm())
    await node.publish(node.shapes)
    before = metadata(view / "meta", content=True)
    await node.unpublish()
    damage(view)
    await require_shows_closure(node, await node.publish(node.shapes), node.shapes)
    assert metadata(view / "meta", content=True) == before
    assert said in caplog.text
    await node.unpublish()
    await cool(node)


@damages
async def test_after_a_restart_a_view_that_is_not_whole_is_left_to_its_users_and_handed_to_no_one_else(
    node: Node, damage: Callable[[Path], None], said: str
) -> None:
    await node.publish(node.shapes, "resident")
    damage(node.data / "views" / node.shapes.basename)
    await node.restart()
    before = mounts_below(node.scratch)
    for writable in (False, True):
        with pytest.raises(ViewDamaged, match=rf"damaged: .*{said}.*; the pods that use it keep it"):
            await node.publish(node.shapes, writable=writable)
    assert mounts_below(node.scratch) == before
    assert os.listdir(node.pods) == ["resident"]
    assert node.store.roots() == {node.shapes.basename}
    await node.publish(node.shapes, "resident")
    await node.unpublish("resident")
    await require_shows_closure(node, await node.publish(node.shapes), node.shapes)
    await node.unpublish()
    assert await node.left() == []


@both
async def test_a_store_path_that_went_behind_nixs_back_is_told_when_a_view_is_taken_up_and_healing_it_heals_all(
    node: Node, writable: bool
) -> None:
    library = next(node.store.store_dir.glob("*-library-1.0"))
    gone = node.scratch / "gone"
    await node.restart(keep_warm=Warm())
    await node.publish(node.shapes)
    await node.unpublish()
    library.rename(gone)
    with pytest.raises(StoreDamaged, match=library.name):
        await node.publish(node.shapes, writable=writable)
    assert await node.left() == []

    gone.rename(library)
    await node.restart()
    resident = await node.publish(node.shapes, "resident")
    library.rename(gone)
    await node.restart()
    with pytest.raises(StoreDamaged, match=library.name):
        await node.publish(node.shapes, writable=writable)
    gone.rename(library)
    for volume in (resident, await node.publish(node.shapes, writable=writable)):
        await require_shows_closure(node, volume, node.shapes)
    await node.unpublish()
    await node.unpublish("resident")
    assert await node.left() == []


async def test_a_view_in_use_is_looked_at_once_and_not_for_every_pod(node: Node) -> None:
    await node.publish(node.shapes, "resident")
    calls = await steps_of(node, Warm())
    await node.publish(node.shapes, "first")
    assert calls.count("hold") == 1
    calls.clear()
    await node.publish(node.shapes, "second")
    assert "hold" not in calls


async def test_a_disk_that_cannot_be_read_is_not_taken_for_damage(node: Node) -> None:
    await node.publish(node.small, "resident")
    await node.restart()
    moved = node.store.store_dir.rename(node.scratch / "elsewhere")
    with pytest.raises(CknixError, match="cannot look at the view"):
        await node.publish(node.small)
    moved.rename(node.store.store_dir)
    await node.publish(node.small)


@pytest.mark.parametrize(("writable", "when"), [(False, "before"), (True, "after")], ids=["read-only", "writable"])
async def test_a_process_killed_at_any_step_of_keeping_using_again_and_forgetting_is_recovered_from(
    node: Node, writable: bool, when: str
) -> None:
    publish: dict[str, object] = {"do": "publish", "root": str(node.small), "writable": writable}
    operations: list[dict[str, object]] = [
        publish,
        {"do": "unpublish"},
        publish,
        {"do": "unpublish"},
        {"do": "forget_unused"},
    ]
    step = 0
    while True:
        step += 1
        if (done := kill_at(node, operations, step, when, warm="1")) == 0:
            break
        assert done == -signal.SIGKILL
        await node.restart(keep_warm=Warm())
        report = await node.volumes.reconcile()
        assert report.problems == []
        require_shows(await node.publish(node.small, writable=writable), node.store, [node.small])
        await node.unpublish()
        await cool(node)
    assert step > 25
    assert await node.left() == []


class Armed:
    """Fails in the step of that number, counted from when ``number`` was set; 0 fails nowhere."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, _number: int, name: str) -> None:
        if self.number:
            self.number -= 1
            if not self.number:
                raise Injected(f"{name} fails")


@both
async def test_a_publish_from_a_warm_view_that_fails_at_any_step_leaves_nothing_in_use(
    node: Node, writable: bool
) -> None:
    armed = Armed()
    steps = Stepped(armed)
    await node.restart(closures=SteppedClosures(node.store, steps), mounts=SteppedMounts(steps), keep_warm=Warm())
    failed = 0
    while True:
        await node.publish(node.small)
        await node.unpublish()
        assert views(node) == {node.small.basename}
        armed.number = failed + 1
        try:
            await node.publish(node.small, writable=writable)
        except Injected:
            failed += 1
            assert mounts_below(node.scratch) == os.listdir(node.pods) == []
            assert views(node) == node.store.roots()
            continue
        break
    assert failed > 4
    armed.number = 0
    await node.unpublish()
    await cool(node)


@both
async def test_an_unpublish_that_keeps_the_view_and_fails_at_any_step_is_finished_by_its_retry(
    node: Node, writable: bool
) -> None:
    armed = Armed()
    steps = Stepped(armed)
    await node.restart(closures=SteppedClosures(node.store, steps), mounts=SteppedMounts(steps), keep_warm=Warm())
    failed = 0
    while True:
        await node.publish(node.small, writable=writable)
        armed.number = failed + 1
        try:
            await node.unpublish()
        except Injected:
            failed += 1
            await node.unpublish()
            assert mounts_below(node.scratch) == os.listdir(node.pods) == os.listdir(node.data / "volumes") == []
            assert views(node) == node.store.roots()
            continue
        break
    assert failed > 4
    armed.number = 0
    await cool(node)
