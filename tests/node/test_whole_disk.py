"""The whole daemon on a full disk: it says so, leaves nothing of the attempt, and goes on as soon as there is room."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.node.whole import Source, WholeNode, require_exactly

MEBIBYTE = 1024 * 1024


def mount_small_disk(node: WholeNode, kind: str) -> None:
    """A file system of 48 MiB at the node's data root, gone with its namespace."""
    if kind == "tmpfs":
        node.namespace.run("mount", "-t", "tmpfs", "-o", "size=48m", "small-disk", node.data)
        return
    image = node.directory / "disk"
    with image.open("wb") as file:
        file.truncate(48 * MEBIBYTE)
    node.namespace.run("mkfs.ext4", "-q", "-F", image)
    node.namespace.run("mount", "-o", "loop", image, node.data)


def fill(data: Path, left: int) -> Path:
    """A file that leaves *left* bytes of the disk, also of what is reserved for root."""
    filler = data / "somebody-elses-data"
    with filler.open("wb") as file:
        while (excess := os.statvfs(data).f_bfree * os.statvfs(data).f_frsize - left) > 0:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), excess)
            except OSError:
                break
    return filler


@pytest.mark.parametrize("left", [MEBIBYTE, 0])
@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
async def test_a_full_disk_is_said_and_nothing_left_on_it(
    whole: WholeNode, source: Source, kind: str, left: int
) -> None:
    mount_small_disk(whole, kind)
    await whole.start()
    await whole.publish("resident", storePath=source.wide)
    await whole.publish("known", storePath=source.hello)
    await whole.unpublish("known")
    before = whole.traces()
    filler = fill(whole.namespace.see(whole.data), left)
    for _ in range(2):
        code, message = await whole.refused(storePath=source.shapes)
        assert code == "RESOURCE_EXHAUSTED"
        assert "free space" in message
        assert len(message) < 1000
        await whole.eventually("it is as before", lambda: whole.traces() == before, lambda: "\n".join(whole.traces()))
    filler.unlink()
    assert source.shapes not in whole.registered_paths()
    require_exactly(await whole.publish(storePath=source.shapes), source, source.shapes)
    require_exactly(await whole.publish("known", writable=True, storePath=source.hello), source, source.hello)
    require_exactly(whole.shown("resident"), source, source.wide)
