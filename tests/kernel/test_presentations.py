"""All kinds of volume side by side: chosen or asked for, shared or a volume's own, and gone without a trace."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from typing import Any

import pytest

from cknix_csi.api.errors import Conflict
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.situations import Code
from cknix_csi.volumes.choose import PresentationUnavailable
from cknix_csi.volumes.volumes import Made, Publication
from cknix_csi.volumes.warm import Warm
from tests.kernel.kinds import KINDS
from tests.kernel.node import Node, metadata, mount_ids, mounts_below, node_without, require_shows, run
from tests.kernel.test_failure import Cancel, Injected, calls_of, failing_at, stepped

kinds = pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS.keys())
others = pytest.mark.parametrize(
    "arguments",
    [KINDS[kind] for kind in ("farm", "farm without overlay", "writable farm", "copy", "writable copy")],
    ids=["farm", "farm without overlay", "writable farm", "copy", "writable copy"],
)
FREE = KINDS["writable copy"] | {"host_users": False}
"""What alone can be written to by a pod with a user namespace of its own."""


def presentation(arguments: dict[str, Any]) -> Presentation:
    """What *arguments* lead to on a node that can do everything but id-map an overlay."""
    unasked = Presentation.REDIRECT if arguments.get("host_users", True) else Presentation.HARDLINK
    asked: Presentation | None = arguments.get("presentation")
    return asked or unasked


def is_overlay(target: os.PathLike[str]) -> bool:
    return run("findmnt", "--noheadings", "--output", "FSTYPE", "--mountpoint", str(target)).strip() == "overlay"


async def made_of(node: Node, **arguments: Any) -> Made | None:
    return await node.volumes.publish(node.request(node.small, **arguments))


@kinds
async def test_a_volume_is_what_was_chosen_and_a_second_publish_touches_nothing(
    node: Node, arguments: dict[str, Any]
) -> None:
    made, target = await made_of(node, **arguments), node.pods / "a"
    assert made is not None
    assert made.presentation is presentation(arguments)
    assert (made.cost is not None) == (made.presentation is Presentation.COPY)
    # Whoever may be privileged on the node gets nothing but overlays, or what is his own.
    plain = made.presentation is Presentation.COPY or arguments.get("host_users") is False
    assert is_overlay(target) == (not plain)
    require_shows(target, node.store, [node.small])
    before, table = mount_ids(target), mounts_below(node.scratch)
    assert await made_of(node, **arguments) is None
    assert (mount_ids(target), mounts_below(node.scratch)) == (before, table)
    assert len(before) == 1
    await node.unpublish()
    await node.unpublish()
    assert await node.left() == []


@kinds
async def test_the_kernel_tells_what_a_volume_is_to_the_next_process_too(node: Node, arguments: dict[str, Any]) -> None:
    writable = arguments.get("writable", False)
    wanted = Publication(node.small.basename, writable, arguments.get("limit"), presentation(arguments))
    target = await node.publish(node.small, **arguments)
    assert node.volumes.published(target) == wanted
    if writable:
        (target / "store/mark").touch()
    await node.restart()
    report = await node.volumes.reconcile()
    assert report.problems == report.volumes_removed == report.views_removed == []
    adopted = [] if wanted.presentation is Presentation.COPY else [node.small.basename]
    assert report.adopted == adopted
    assert node.store.roots() == set(adopted)
    assert node.volumes.published(target) == wanted
    assert await made_of(node, **arguments) is None
    assert (target / "store/mark").exists() == writable
    await node.unpublish()
    assert await node.left() == []


async def test_another_presentation_at_a_published_target_is_a_conflict_for_who_asks_for_one(node: Node) -> None:
    for made, writable in itertools.product(Presentation, (False, True)):
        target = await node.publish(node.small, writable=writable, presentation=made)
        before = mount_ids(target)
        await node.publish(node.small, writable=writable)  # whatever suits: what is there does
        for asked in set(Presentation) - {made}:
            with pytest.raises(Conflict, match="already holds"):
                await node.publish(node.small, writable=writable, presentation=asked)
        assert mount_ids(target) == before
        await node.unpublish()
    assert await node.left() == []


async def test_a_pod_with_a_user_namespace_can_write_to_a_copy_and_to_nothing_else(node: Node) -> None:
    for asked in (None, Presentation.REDIRECT, Presentation.HARDLINK):
        with pytest.raises(PresentationUnavailable, match="what this node can do: `presentation: copy`") as refused:
            await node.publish(node.small, writable=True, host_users=False, presentation=asked)
        assert refused.value.code is Code.INVALID_ARGUMENT
        assert await node.left() == []
    before = metadata(node.store.store_dir, content=True)
    target = await node.publish(node.small, **FREE)
    program = target / "store" / node.small.basename / "bin/hello"
    program.chmod(0o755)
    program.write_text("changed")
    assert metadata(node.store.store_dir, content=True) == before
    await node.unpublish()
    assert await node.left() == []


async def test_volumes_of_all_kinds_share_one_closure_and_each_tree_goes_with_its_last_user(node: Node) -> None:
    for kind, arguments in KINDS.items():
        await node.publish(node.small, kind, **arguments)
    assert os.listdir(node.data / "views") == os.listdir(node.data / "farms") == [node.small.basename]
    for kind in ("farm", "writable farm", "farm without overlay"):
        await node.unpublish(kind)
    assert os.listdir(node.data / "farms") == []
    assert node.store.roots() == {node.small.basename}
    for kind in ("view", "writable view", "writable view on a disk of its own", "writable view in memory"):
        await node.unpublish(kind)
    assert os.listdir(node.data / "views") == []
    assert node.store.roots() == set(), "a copy needs nothing of the store"
    for kind in ("copy", "writable copy"):
        require_shows(node.pods / kind, node.store, [node.small])
        await node.unpublish(kind)
    assert await node.left() == []


async def test_a_farm_is_made_once_and_kept_warm_as_a_view_is(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    await node.restart(keep_warm=Warm())
    with caplog.at_level(logging.INFO, "cknix_csi.volumes.farm"):
        for arguments in (KINDS["farm"], KINDS["farm without overlay"], KINDS["writable farm"]):
            require_shows(await node.publish(node.small, **arguments), node.store, [node.small])
            await node.unpublish()
            assert mounts_below(node.scratch) == []
            assert node.store.roots() == {node.small.basename}
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"made a farm of hard links for {node.small.basename} in 0.")
    assert "files: 1 linked; " in told
    await node.publish(node.small, **KINDS["writable copy"])
    assert node.store.roots() == {node.small.basename}, "a copy does not end what is kept warm"
    await node.unpublish()
    assert await node.volumes.forget_unused() == [node.small.basename]
    assert await node.left() == []


async def test_a_copy_says_what_it_cost(node: Node) -> None:
    made = await made_of(node, **KINDS["copy"])
    assert made is not None
    assert made.cost is not None
    report = made.cost.report
    size = (node.store.store_dir / node.small.basename / "bin/hello").stat().st_size
    assert (report.copied, report.bytes_copied, report.linked, report.reflinked) == (1, size, 0, 0)
    assert 0 < made.cost.seconds < 60
    assert str(made.cost).startswith(f"files: 1 copied ({size} bytes); ")


async def test_where_views_do_not_work_a_farm_is_made_and_the_reason_told(node: Node) -> None:
    node.probed = node_without("listing", "idmapped_overlay")
    await node.restart()
    made = await made_of(node)
    assert made is not None
    assert made.presentation is Presentation.HARDLINK
    assert made.reason == "redirect view lists exactly the closure: no (because of listing)"


@others
async def test_a_publish_that_fails_at_any_step_leaves_nothing_and_its_retry_works(
    node: Node, arguments: dict[str, Any]
) -> None:
    names = await calls_of(node, lambda: node.publish(node.small, **arguments))
    await node.unpublish()
    assert {"hold", "query", "write_state", "clone"} <= set(names)
    # What comes after its mount is about what a copy does not need, and can wait.
    needed = names.index("clone") + 1 if presentation(arguments) is Presentation.COPY else len(names)
    for number, name in enumerate(names, 1):
        await stepped(node, failing_at(number))
        if number <= needed:
            with pytest.raises(Injected, match=f"{name} fails"):
                await node.publish(node.small, **arguments)
            assert await node.left() == [], f"failed at {number}: {name}"
        require_shows(await node.publish(node.small, **arguments), node.store, [node.small])
        await node.unpublish()
        assert await node.left() == [], f"failed at {number}: {name}"


@others
async def test_a_publish_that_is_cancelled_at_any_step_leaves_nothing(node: Node, arguments: dict[str, Any]) -> None:
    names = await calls_of(node, lambda: node.publish(node.small, **arguments))
    await node.unpublish()
    for number, name in enumerate(names, 1):
        cancel = Cancel(number)
        await stepped(node, cancel)
        cancel.task = asyncio.create_task(node.publish(node.small, **arguments))
        with pytest.raises(asyncio.CancelledError):
            await cancel.task
        assert await node.left() == [], f"cancelled at {number}: {name}"


@others
async def test_an_unpublish_that_fails_at_any_step_is_finished_by_its_retry(
    node: Node, arguments: dict[str, Any]
) -> None:
    await node.publish(node.small, **arguments)
    names = await calls_of(node, node.unpublish)
    assert "unmount_one" in names
    for number, name in enumerate(names, 1):
        await node.publish(node.small, **arguments)
        await stepped(node, failing_at(number))
        with pytest.raises(Injected, match=f"{name} fails"):
            await node.unpublish()
        await node.unpublish()
        assert await node.left() == [], f"failed at {number}: {name}"
