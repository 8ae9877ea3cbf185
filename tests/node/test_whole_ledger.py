"""The whole daemon takes notes of what is published, and puts them right whatever has become of them."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.proto.csi_pb2 import NodeUnpublishVolumeRequest
from tests.node.whole import Source, WholeNode, require_exactly

VOLUMES = {"ro": False, "rw": True}


def file(node: WholeNode) -> Path:
    return node.namespace.see(node.data / "state/ledger.sqlite")


@contextmanager
def opened(node: WholeNode) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file(node), timeout=10)) as database:
        yield database
        database.commit()


def noted(node: WholeNode) -> dict[str, tuple[Any, ...]]:
    """What the ledger says is published, by target; nothing while there is none."""
    try:
        with opened(node) as database:
            rows = database.execute(
                "SELECT target, volume_id, closure_id, writable, presentation, pod_namespace, pod_name, pod_uid "
                "FROM publications"
            )
            return {os.fsdecode(target): tuple(rest) for target, *rest in rows}
    except sqlite3.Error:
        return {}


async def agrees(node: WholeNode) -> None:
    """Wait until the ledger names exactly what findmnt shows: it is written behind the calls."""
    await node.eventually(
        "ledger and mount table agree",
        lambda: sorted(noted(node)) == sorted(node.namespace.mounts(node.pods)),
        lambda: f"{sorted(noted(node))} is noted",
    )


def basename(path: str) -> str:
    return path.removeprefix("/nix/store/")


async def test_it_tells_what_is_published_for_whom_and_which_closures_were_used(
    whole: WholeNode, source: Source
) -> None:
    await whole.start()
    before = time.time()
    await whole.publish("ro", storePath=source.hello)
    await whole.publish("rw", writable=True, storePath=source.toolbox)
    await agrees(whole)
    assert noted(whole) == {
        str(whole.target("ro")): ("ro", basename(source.hello), 0, "redirect", "default", "pod-ro", "ro"),
        str(whole.target("rw")): ("rw", basename(source.toolbox), 1, "redirect", "default", "pod-rw", "rw"),
    }
    for _ in range(2):  # and once more, as kubelet does
        await whole.unpublish("ro")
    await whole.publish("rw", writable=True, storePath=source.toolbox)
    await agrees(whole)
    assert whole.terminate() == 0
    with opened(whole) as database:
        uses = {closure: rest for closure, *rest in database.execute("SELECT * FROM closures")}
    assert {closure: times for closure, (_, _, times, *_) in uses.items()} == {
        basename(source.hello): 1,
        basename(source.toolbox): 1,
    }
    for first, last, *_ in uses.values():
        assert before <= first <= last <= time.time()


async def test_a_target_is_noted_as_the_mount_table_names_it(whole: WholeNode, source: Source) -> None:
    """kubelet's directory may be a symbolic link, such as /var/lib/kubelet to another disk."""
    link = whole.directory / "link"
    link.symlink_to(whole.pods)
    await whole.start()
    request = whole.publish_request(storePath=source.file)
    target = link / whole.target().relative_to(whole.pods)
    request.target_path = str(target)
    await whole.call(request)
    await agrees(whole)
    assert list(noted(whole)) == [str(whole.target())]
    await whole.call(NodeUnpublishVolumeRequest(volume_id="v1", target_path=str(target)))
    await agrees(whole)
    assert noted(whole) == {}


def remove(node: WholeNode) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{file(node)}{suffix}").unlink(missing_ok=True)


def damage(node: WholeNode) -> None:
    size = file(node).stat().st_size
    with file(node).open("r+b") as opened_file:
        opened_file.seek(100)
        opened_file.write(os.urandom(size - 100))


def scribble(node: WholeNode) -> None:
    remove(node)
    file(node).write_bytes(b"not a database at all" * 1000)


def age(node: WholeNode) -> None:
    """As after a reboot: what it holds was mounted before."""
    with opened(node) as database:
        database.execute("UPDATE boot SET id = 'another boot'")
        database.execute("UPDATE publications SET target = CAST('/gone/' || CAST(target AS TEXT) AS BLOB)")


def contradict(node: WholeNode) -> None:
    with opened(node) as database:
        database.execute("DELETE FROM publications WHERE volume_id = 'ro'")
        database.execute("UPDATE publications SET closure_id = ?, writable = 0", ("0" * 32 + "-other",))
        database.execute("INSERT INTO publications VALUES (CAST('/nowhere' AS BLOB), 'x', 'x', 0, '', '', '', '', 1.0)")


@pytest.mark.parametrize("spoil", [damage, age, contradict])
async def test_the_next_daemon_believes_the_mount_table(
    whole: WholeNode, source: Source, spoil: Callable[[WholeNode], None]
) -> None:
    await whole.start()
    for volume, writable in VOLUMES.items():
        await whole.publish(volume, writable=writable, storePath=source.hello)
    mounted = {volume: whole.mount_id(volume) for volume in VOLUMES}
    assert whole.terminate() == 0
    spoil(whole)
    await whole.start()
    await agrees(whole)
    found = {target: row[1:3] for target, row in noted(whole).items()}
    assert found == {str(whole.target(volume)): (basename(source.hello), int(VOLUMES[volume])) for volume in VOLUMES}
    assert {volume: whole.mount_id(volume) for volume in VOLUMES} == mounted
    await whole.unpublish("ro")
    await agrees(whole)


@pytest.mark.parametrize("spoil", [remove, scribble])
async def test_it_may_be_spoilt_under_a_running_daemon(
    whole: WholeNode, source: Source, spoil: Callable[[WholeNode], None]
) -> None:
    await whole.start()
    await whole.publish("before", storePath=source.file)
    await agrees(whole)
    spoil(whole)
    for volume, writable in VOLUMES.items():
        require_exactly(await whole.publish(volume, writable=writable, storePath=source.file), source, source.file)
    await whole.unpublish("ro")
    assert whole.terminate() == 0
    await whole.start()
    await agrees(whole)


async def test_volumes_need_no_ledger(whole: WholeNode, source: Source) -> None:
    """Nothing can be where it should be."""
    (whole.data / "state").write_text("in the way")
    await whole.start()
    for volume, writable in VOLUMES.items():
        await whole.publish(volume, writable=writable, storePath=source.hello)
    for volume in VOLUMES:
        await whole.unpublish(volume)
    assert whole.terminate() == 0
    complaints = [line for line in whole.log().splitlines() if "the ledger" in line]
    assert len(complaints) == 1, "once, however often it fails"
    assert "volumes work without it" in complaints[0]
    (whole.data / "state").unlink()


async def test_a_daemon_killed_between_mount_and_note_is_corrected_by_the_next(
    whole: WholeNode, source: Source
) -> None:
    await whole.start()
    await whole.publish("old", storePath=source.hello)
    await agrees(whole)
    with opened(whole) as database:
        database.execute("BEGIN IMMEDIATE")  # nobody else can write
        for volume, writable in VOLUMES.items():
            await whole.publish(volume, writable=writable, storePath=source.hello)
        await whole.unpublish("old")
        whole.kill()
    assert list(noted(whole)) == [str(whole.target("old"))], "volumes do not wait for their notes"
    await whole.start()
    await agrees(whole)
    assert str(whole.target("ro")) in noted(whole)
