"""The whole daemon on a full disk: it says so, leaves nothing of the attempt, and goes on as soon as there is room."""

from __future__ import annotations

import pytest

from tests.nix.disks import MEBIBYTE
from tests.node.disks import fill, mount_small_disk
from tests.node.whole import Source, WholeNode, require_exactly


@pytest.mark.parametrize(("kind", "left"), [("ext4", MEBIBYTE), ("ext4", 0), ("tmpfs", MEBIBYTE)])
async def test_a_full_disk_is_said_and_nothing_left_on_it(
    whole: WholeNode, source: Source, kind: str, left: int
) -> None:
    mount_small_disk(whole, kind)
    await whole.start()
    await whole.publish("resident", storePath=source.wide)
    await whole.publish("known", storePath=source.hello)  # and stays, so that there is no garbage to make room with
    before = whole.traces()
    filler = fill(whole.namespace.see(whole.data), left)
    # Once: by the next try a collection may have made room, with the reserve that Nix keeps.
    code, message = await whole.refused(storePath=source.shapes)
    assert code == "RESOURCE_EXHAUSTED"
    assert "free space" in message
    assert len(message) < 1000
    await whole.eventually("it is as before", lambda: whole.traces() == before, lambda: "\n".join(whole.traces()))
    filler.unlink()
    assert source.shapes not in whole.registered_paths()
    require_exactly(await whole.publish(storePath=source.shapes), source, source.shapes)
    require_exactly(await whole.publish("again", writable=True, storePath=source.hello), source, source.hello)
    require_exactly(whole.shown("resident"), source, source.wide)
