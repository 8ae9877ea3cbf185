"""What is mounted where, by one reading of the mount table, whatever presents it."""

from __future__ import annotations

from typing import Any

from cknix_csi.api.limits import Limit
from cknix_csi.api.presentation import Presentation
from tests.kernel.node import Node, run

MEBIBYTE = 1 << 20
VOLUMES: dict[str, dict[str, Any]] = {
    "redirect": {},
    "redirect-rw": {"writable": True},
    "redirect-limit": {"writable": True, "limit": Limit(32 * MEBIBYTE)},
    "farm": {"host_users": False},
    "farm-overlay": {"presentation": Presentation.HARDLINK},
    "farm-rw": {"presentation": Presentation.HARDLINK, "writable": True},
    "copy": {"presentation": Presentation.COPY},
    "copy-rw": {"presentation": Presentation.COPY, "writable": True},
    "copy-limit": {"presentation": Presentation.COPY, "writable": True, "limit": Limit(32 * MEBIBYTE)},
}


async def test_volumes_of_every_presentation_are_told_and_nothing_else(node: Node) -> None:
    for name, how in VOLUMES.items():
        await node.publish(node.small, name, **how)
    (node.scratch / "foreign").mkdir()
    run("mount", "-t", "tmpfs", "foreign", node.scratch / "foreign")
    for volumes in (node.volumes, None):
        if volumes is None:  # and by a process that has made none of them
            await node.restart()
            await node.volumes.reconcile()
        found = node.volumes.publications()
        assert set(found) == {str(node.pods / name) for name in VOLUMES}
        for name, how in VOLUMES.items():
            shown, alone = found[str(node.pods / name)], node.volumes.published(node.pods / name)
            assert alone is not None
            assert shown.closure_id == node.small.basename
            assert (shown.writable, shown.presentation) == (alone.writable, alone.presentation)
            assert shown.writable == how.get("writable", False)
    for name in VOLUMES:
        await node.unpublish(name)
    assert node.volumes.publications() == {}


async def test_closures_that_are_mounted_are_held_again_when_somebody_has_removed_their_roots(node: Node) -> None:
    await node.publish(node.small, "used")
    await node.publish(node.shapes, "other", writable=True)
    await node.publish(node.shapes, "gone")
    before = node.store.roots()
    await node.volumes.hold_mounted()
    assert node.store.roots() == before
    for name in list(before):
        await node.store.release(name)
    assert list(node.store.roots()) == []
    await node.volumes.hold_mounted()
    assert sorted(node.store.roots()) == sorted(before)
    for name in ("used", "other", "gone"):
        await node.unpublish(name)
    await node.volumes.hold_mounted()
    assert list(node.store.roots()) == []
