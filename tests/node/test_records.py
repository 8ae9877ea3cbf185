"""What is noted and told beside a publish, and that no publish depends on it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.attributes import FromStorePath, PodInfo
from cknix_csi.api.errors import CknixError, OutOfSpace
from cknix_csi.api.limits import Limit
from cknix_csi.api.options import VolumeOptions
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.publisher import Publisher
from cknix_csi.csi.records import Notes, Records
from cknix_csi.csi.requests import AccessMode, PublishCall, UnpublishCall
from cknix_csi.csi.resolve import Resolver
from cknix_csi.csi.room import NO_MATTER, Room
from cknix_csi.volumes.failures import LimitReached
from cknix_csi.volumes.ledger import Published
from tests.node.fakes import HELLO, OTHER, SYSTEM, FakeFetcher, FakeVolumes

POD = PodInfo("web-0", "default", "uid-1")


class Diary:
    """Notes in a dictionary."""

    def __init__(self) -> None:
        self.entries: dict[str, Published] = {}

    def record_publish(self, entry: Published) -> None:
        self.entries[entry.target] = entry

    def record_unpublish(self, target: str) -> None:
        self.entries.pop(target, None)

    def publications(self) -> list[Published]:
        return list(self.entries.values())


class Broken(Diary):
    def record_publish(self, entry: Published) -> None:
        raise ZeroDivisionError("while it was noted")

    def record_unpublish(self, target: str) -> None:
        raise ZeroDivisionError("while it was noted")


@asynccontextmanager
async def publisher(volumes: FakeVolumes, notes: Notes, room: Room = NO_MATTER) -> AsyncIterator[Publisher]:
    closures = ClosureService(FakeFetcher(HELLO, OTHER))
    publisher = Publisher(
        volumes=volumes,
        closures=closures,
        resolver=Resolver(SYSTEM, None, None),
        budget=10.0,
        records=Records(notes),
        room=room,
    )
    try:
        yield publisher
    finally:
        await publisher.close()
        await closures.close()


def call(target: Path, *, writable: bool = False, limit: Limit | None = None) -> PublishCall:
    options = VolumeOptions(limit=limit)
    return PublishCall("v1", target, FromStorePath(HELLO), writable, AccessMode.SINGLE_NODE_WRITER, POD, options)


async def test_a_volume_is_noted_by_the_real_path_of_its_target_until_it_is_gone(tmp_path: Path) -> None:
    (tmp_path / "pods").mkdir()
    (tmp_path / "link").symlink_to("pods")
    diary = Diary()
    async with publisher(FakeVolumes(), diary) as daemon:
        target = tmp_path / "link/mount"
        await daemon.publish(call(target, writable=True))
        (entry,) = diary.entries.values()
        assert entry.target == str(tmp_path / "pods/mount")
        assert (entry.volume_id, entry.closure_id, entry.writable) == ("v1", HELLO.basename, True)
        assert (entry.pod_namespace, entry.pod_name, entry.pod_uid) == ("default", "web-0", "uid-1")
        await daemon.unpublish(UnpublishCall("v1", target))
        assert diary.entries == {}


async def test_what_is_mounted_already_is_noted_as_well(tmp_path: Path) -> None:
    """An earlier daemon mounted it, and its note may be lost."""
    volumes, diary = FakeVolumes(), Diary()
    async with publisher(volumes, Diary()) as daemon:
        await daemon.publish(call(tmp_path / "mount"))
    async with publisher(volumes, diary) as daemon:
        await daemon.publish(call(tmp_path / "mount"))
    assert list(diary.entries) == [str(tmp_path / "mount")]


async def test_a_publish_or_unpublish_that_fails_is_not_noted(tmp_path: Path) -> None:
    class Stuck(FakeVolumes):
        async def unpublish(self, volume_id: str, target: Path) -> None:
            raise OutOfSpace("no room to unmount in")

    volumes, diary = Stuck(), Diary()
    async with publisher(volumes, diary) as daemon:
        volumes.failure = OutOfSpace("no room")
        with pytest.raises(OutOfSpace):
            await daemon.publish(call(tmp_path / "mount"))
        assert diary.entries == {}
        await daemon.publish(call(tmp_path / "mount"))
        with pytest.raises(OutOfSpace):
            await daemon.unpublish(UnpublishCall("v1", tmp_path / "mount"))
        assert list(diary.entries) == [str(tmp_path / "mount")]


async def test_what_an_earlier_daemon_mounted_counts_for_a_volume_that_may_be_at_one_target(tmp_path: Path) -> None:
    volumes, diary = FakeVolumes(), Diary()
    async with publisher(volumes, diary) as daemon:
        await daemon.publish(call(tmp_path / "first"))
    async with publisher(volumes, diary) as daemon:
        with pytest.raises(CknixError, match="allows one target") as refused:
            await daemon.publish(call(tmp_path / "second"))
        assert refused.value.situation is Situation.ALREADY_PUBLISHED
        await daemon.unpublish(UnpublishCall("v1", tmp_path / "first"))
        await daemon.publish(call(tmp_path / "second"))
    # A note of what is not there any more keeps nobody away.
    volumes.mounted.clear()
    async with publisher(volumes, diary) as daemon:
        await daemon.publish(call(tmp_path / "third"))


async def test_notes_that_fail_fail_no_volume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volumes = FakeVolumes()
    async with publisher(volumes, Broken()) as daemon:
        await daemon.publish(call(tmp_path / "mount"))
        assert list(volumes.mounted) == [tmp_path / "mount"]
        await daemon.unpublish(UnpublishCall("v1", tmp_path / "mount"))
        assert volumes.mounted == {}
    assert caplog.text.count(f"what has happened at {tmp_path / 'mount'} is missing from the ledger") == 2


class Notebook:
    """A :class:`Room` that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def out_of_space(
        self, closure: StorePath | None = None, *, needed: int | None = None, began: float | None = None
    ) -> None:
        self.told.append((closure, needed, began))

    def had(self, closure: StorePath) -> None:
        self.told.append(closure)


@pytest.mark.parametrize("limit", [None, Limit(1 << 30)])
async def test_a_mount_that_finds_the_disk_full_is_told_and_when_it_has_room_too(
    tmp_path: Path, limit: Limit | None
) -> None:
    volumes, room = FakeVolumes(), Notebook()
    volumes.failure = full = OutOfSpace("no room")
    full.needed = 1234
    async with publisher(volumes, Diary(), room) as daemon:
        with pytest.raises(OutOfSpace):
            await daemon.publish(call(tmp_path / "mount", writable=True, limit=limit))
        await daemon.publish(call(tmp_path / "mount", writable=True, limit=limit))
    assert room.told == [(HELLO, 1234, None), HELLO]


async def test_a_volume_that_reaches_its_own_limit_asks_for_no_room_on_the_disk(tmp_path: Path) -> None:
    volumes, room = FakeVolumes(), Notebook()
    volumes.failure = LimitReached("too small")
    async with publisher(volumes, Diary(), room) as daemon:
        with pytest.raises(OutOfSpace):
            await daemon.publish(call(tmp_path / "mount", writable=True, limit=Limit(1 << 30)))
    assert room.told == []


async def test_a_fetch_that_finds_the_disk_full_is_told_with_the_time_at_which_it_began() -> None:
    fetcher, room, before = FakeFetcher(), Notebook(), time.time()
    fetcher.failure = OutOfSpace("no room")
    closures = ClosureService(fetcher, room)
    with pytest.raises(OutOfSpace):
        await closures.ensure(HELLO, budget=10)
    ((closure, needed, began),) = room.told
    assert (closure, needed) == (HELLO, None)
    assert before <= began <= time.time()
