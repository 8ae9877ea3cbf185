"""What volumes are said to use, beside what du, df and find say, and what is said to be wrong with them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.errors import NotFound
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.presentation import Presentation
from cknix_csi.volumes import sized
from cknix_csi.volumes.treesize import TreeSize, TreeSizes
from cknix_csi.volumes.usage import NOTHING, Amount, Measured, VolumeUsage
from cknix_csi.volumes.volumes import Volumes
from tests.kernel.kinds import KINDS, WRITABLE
from tests.kernel.node import Node, run

MIB = 1 << 20

kinds = pytest.mark.parametrize("kind", KINDS)
of_the_store = pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("copy")])
copies = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("copy")])


@pytest.fixture
async def node(node: Node) -> AsyncIterator[Node]:
    """The node, of which every measurement is made anew."""
    await another_process(node)
    yield node


async def another_process(node: Node, *, measured_for: float = 0) -> None:
    """A process that remembers nothing of the volumes that are there."""
    await node.volumes.close()
    probed = node.probed
    node.volumes = Volumes(node.data, node.store, prober=lambda *_: probed, measured_for=measured_for)


async def measure(node: Node, name: str = "a") -> Measured:
    return await node.volumes.measure(f"csi-{name}", node.pods / name)


async def problem(node: Node, name: str = "a") -> str:
    found = (await measure(node, name)).problem
    assert found is not None
    return found


def private(node: Node, name: str = "a") -> Path:
    """The directory of what a volume has of its own."""
    [directory] = (node.data / "volumes" / f"csi-{name}").iterdir()
    return directory


def du(directory: Path) -> TreeSize:
    """Blocks and inodes, as du counts them after everything has been written."""
    run("sync", "--file-system", directory)
    sizes = [run("du", "--summarize", "--one-file-system", unit, directory) for unit in ("--block-size=1", "--inodes")]
    return TreeSize(*(int(size.split()[0]) for size in sizes))


def df(directory: Path) -> tuple[Amount, Amount]:
    """Bytes and inodes of the file system that a directory is on."""
    fields = "--output=size,used,avail,itotal,iused,iavail"
    counts = [int(word) for word in run("df", "--block-size=1", fields, directory).splitlines()[1].split()]
    return Amount(*counts[:3]), Amount(*counts[3:])


def write_all_sorts(volume: Path, node: Node) -> None:
    """What a pod may do to a writable volume: files made, changed, deleted, linked; and some of the closure's too."""
    store = volume / "store"
    (store / "new/deep").mkdir(parents=True)
    (store / "new/data").write_bytes(os.urandom(3 * MIB))
    os.link(store / "new/data", store / "new/deep/the same")
    (store / "new/link").symlink_to("/etc")
    os.mkfifo(store / "new/fifo")
    with open(store / "new/sparse", "wb") as sparse:
        sparse.truncate(1 << 30)
    [library] = store.glob("*-library-1.0")
    library.chmod(0o755)
    (library / "lib").chmod(0o755)
    (library / "lib/big").chmod(0o755)
    (library / "lib/nothing").unlink()
    (library / "loop").unlink()
    (store / node.shapes.basename).chmod(0o755)


async def paths_of(node: Node) -> int:
    """Paths of the closure of all shapes, each of which is a byte to the store of these tests."""
    return (await node.store.query(node.shapes)).nar_size


@kinds
async def test_another_processs_volume_is_measured_as_du_and_df_measure_it(node: Node, kind: str) -> None:
    arguments = KINDS[kind]
    volume = await node.publish(node.shapes, **arguments)
    await another_process(node)
    if arguments.get("writable"):
        await node.publish(node.small, "other", writable=True)  # whose use is not this one's
        before = (await measure(node)).bytes.used
        write_all_sorts(volume, node)
        run("sync", "--file-system", volume)
        assert (await measure(node)).bytes.used > before + 3 * MIB - 4096
    found = await measure(node)
    assert found.problem is None
    if kind == "copy":
        size = du(private(node) / "copy")
        assert found == Measured(Amount(size.bytes, size.bytes, 0), Amount(size.inodes, size.inodes, 0))
    elif not arguments.get("writable"):
        paths = await paths_of(node)
        assert found == Measured(Amount(total=paths, used=paths, available=0), None)
    elif "limit" in arguments:
        assert (found.bytes, found.inodes) == df(private(node) / "space")
        assert found.bytes.total <= sized.image_size(arguments["limit"].bytes)
    else:
        assert found.inodes is not None
        of_its_own = private(node) / ("copy" if kind == "writable copy" else "upper")
        assert TreeSize(found.bytes.used, found.inodes.used) == du(of_its_own)
        disk, inodes = df(node.data)
        assert (found.bytes.total, found.inodes.total) == (disk.total, inodes.total)
        assert found.bytes.available == pytest.approx(disk.available, abs=256 * MIB)  # others use the disk as well
        assert found.inodes.available == pytest.approx(inodes.available, abs=100_000)


@pytest.mark.parametrize("medium", Medium)
@pytest.mark.parametrize("presentation", [None, Presentation.COPY])
async def test_a_limits_room_is_told_as_the_pod_sees_it(
    node: Node, medium: Medium, presentation: Presentation | None
) -> None:
    limit = Limit(96 * MIB, medium)
    volume = await node.publish(node.shapes, writable=True, limit=limit, presentation=presentation)
    before = (await measure(node)).bytes
    (volume / "store/new").write_bytes(os.urandom(20 * MIB))
    run("sync", "--file-system", volume)
    found = await measure(node)
    assert (found.bytes, found.inodes) == df(volume)
    assert found.bytes.used - before.used == pytest.approx(20 * MIB, abs=MIB)


@kinds
async def test_what_somebody_has_unmounted_is_told_with_what_is_left_of_it(node: Node, kind: str) -> None:
    volume = await node.publish(node.shapes, **KINDS[kind])
    left = (await measure(node)).bytes if kind in WRITABLE or kind == "copy" else NOTHING
    run("umount", volume)
    found = await measure(node)
    assert found.problem is not None
    assert found.problem.startswith("nothing is mounted at the volume's path any more: delete the pod")
    assert found.bytes.used == left.used
    await node.unpublish()
    await node.volumes.reconcile()  # nothing has told the unpublish which closure it was
    assert await node.left() == []


@pytest.mark.parametrize("kind", ["view", "farm without overlay", "writable view", "writable copy"])
async def test_a_foreign_mount_over_a_volume_is_told(node: Node, kind: str) -> None:
    volume = await node.publish(node.shapes, **KINDS[kind])
    run("mount", "-t", "tmpfs", "somebody's", volume)
    assert await problem(node) == 'covered by a foreign mount of "somebody\'s" (tmpfs): unmount that on the node'
    run("umount", volume)
    assert (await measure(node)).problem is None


@of_the_store
async def test_a_store_path_that_is_gone_under_a_volume_is_told_until_it_is_back(node: Node, kind: str) -> None:
    await node.publish(node.shapes, **KINDS[kind])
    library = next(node.store.store_dir.glob("*-library-1.0"))
    library.rename(node.scratch / "gone")
    assert (await problem(node)).startswith(
        f"/nix/store/{library.name} is in the store's database but not in the store"
    )
    (node.scratch / "gone").rename(library)
    assert (await measure(node)).problem is None


@pytest.mark.parametrize("kind", ["view", "farm", "writable view"])
async def test_a_gc_root_that_is_gone_is_told_until_it_is_back(node: Node, kind: str) -> None:
    await node.publish(node.shapes, **KINDS[kind])
    await node.store.release(node.shapes.basename)
    assert (await problem(node)).startswith("its GC root is gone, so Nix may delete its files: restart the node daemon")
    await another_process(node)
    await node.volumes.reconcile()
    assert (await measure(node)).problem is None


@copies
async def test_a_copy_needs_neither_store_path_nor_gc_root(node: Node, kind: str) -> None:
    await node.publish(node.shapes, **KINDS[kind])
    next(node.store.store_dir.glob("*-library-1.0")).rename(node.scratch / "gone")
    assert node.store.roots() == set()
    (node.scratch / "nix/references" / node.shapes.basename).unlink()
    await another_process(node)
    found = await measure(node)
    assert found.problem is None
    assert found.bytes.used > 3 * MIB


@pytest.mark.parametrize(
    ("kind", "entries"), [("view", "views/{}/meta/nix/store"), ("farm", "farms/{}/tree/nix/store")]
)
async def test_what_was_taken_out_of_a_view_or_farm_is_told(node: Node, kind: str, entries: str) -> None:
    await node.publish(node.shapes, **KINDS[kind])
    directory = node.data / entries.format(node.shapes.basename)
    run("rm", "--recursive", next(directory.glob("*-library-1.0")))
    said = await problem(node)
    assert said.startswith(f"the {kind} is damaged: ")
    assert said.endswith(
        f"delete the pods on this node that use {node.shapes.basename}: when the last has gone, it is built anew"
    )


async def test_a_look_at_a_volume_is_no_reason_to_trust_what_it_shows_later(node: Node) -> None:
    await node.publish(node.shapes)
    await measure(node)
    await node.unpublish()
    assert await node.left() == []


async def test_a_closure_that_the_store_does_not_know_any_more_is_told(node: Node) -> None:
    await node.publish(node.shapes)
    (node.scratch / "nix/references" / node.shapes.basename).unlink()
    await another_process(node)
    assert await measure(node) == Measured(NOTHING, None, f"{node.shapes} is not valid")


@pytest.mark.parametrize(
    "path", ["some/path", ".", "..", "/", "/nowhere/at/all", "/proc/1/status/x", "/" + "x/" * 4000, "/" + "x" * 4000]
)
async def test_no_volume_is_found_where_none_can_be(node: Node, path: str) -> None:
    with pytest.raises(NotFound):
        await node.volumes.measure("csi-a", Path(path))


@kinds
async def test_an_unpublished_volume_is_not_found(node: Node, kind: str) -> None:
    await node.publish(node.shapes, **KINDS[kind])
    await node.unpublish()
    with pytest.raises(NotFound, match=f"csi-a is not published at {node.pods / 'a'}: nothing is mounted there"):
        await measure(node)


async def test_what_belongs_to_others_is_not_found(node: Node) -> None:
    volume = await node.publish(node.shapes, writable=True)
    with pytest.raises(NotFound, match="another volume, not csi-b"):
        await node.volumes.measure("csi-b", volume)
    (node.pods / "files").mkdir()
    (node.pods / "files/one").touch()
    with pytest.raises(NotFound):
        await measure(node, "files")
    (node.pods / "mount").mkdir()
    run("mount", "-t", "tmpfs", "somebody's", node.pods / "mount")
    with pytest.raises(NotFound, match="no volume of this driver"):
        await measure(node, "mount")
    (node.pods / "link").symlink_to(volume)
    with pytest.raises(NotFound):
        await measure(node, "link")


async def test_a_path_through_a_symbolic_link_is_the_same_volume(node: Node) -> None:
    await node.publish(node.shapes, writable=True)
    (node.scratch / "kubelet").symlink_to(node.pods)
    found = await node.volumes.measure("csi-a", node.scratch / "kubelet/a")
    assert found.problem is None
    assert found.bytes.used > 0


@pytest.mark.parametrize("kind", ["view", "farm without overlay", "writable view", "writable view in memory"])
async def test_volumes_that_come_and_go_are_never_said_to_be_unwell(node: Node, kind: str) -> None:
    found: list[Measured] = []
    gone = asyncio.Event()

    async def watch() -> None:
        while not gone.is_set():
            try:
                found.append(await measure(node))
            except NotFound:
                await asyncio.sleep(0)

    watching = [asyncio.create_task(watch()) for _ in range(2)]
    for _ in range(5):
        await node.publish(node.small, **KINDS[kind])
        seen = len(found)
        while len(found) == seen:
            await asyncio.sleep(0.001)
        await node.unpublish()
    gone.set()
    await asyncio.gather(*watching)
    assert {each.problem for each in found} == {None}


async def test_a_volume_that_is_published_anew_while_it_is_measured_is_well(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS["writable view in memory"]
    await node.publish(node.small, **kind)
    measured = VolumeUsage._amounts
    gone: list[Any] = []

    async def amounts(self: VolumeUsage, found: Any) -> Any:
        if gone:
            return await measured(self, found)
        gone.append(found)
        await node.unpublish()
        try:
            return await measured(self, found)
        finally:
            await node.publish(node.small, **kind)

    monkeypatch.setattr(VolumeUsage, "_amounts", amounts)
    with suppress(NotFound):  # where its new mount has got another number
        assert (await measure(node)).problem is None
    assert gone
    assert (await measure(node)).problem is None


async def test_what_costs_something_is_said_again_for_a_minute(node: Node) -> None:
    await another_process(node, measured_for=60)
    volume = await node.publish(node.shapes, writable=True)
    before = await measure(node)
    (volume / "store/new").write_bytes(os.urandom(MIB))
    next(node.store.store_dir.glob("*-library-1.0")).rename(node.scratch / "gone")
    again = await measure(node)
    assert (again.bytes.used, again.problem) == (before.bytes.used, None)


async def test_the_end_of_what_was_wrong_is_told_at_once(node: Node) -> None:
    await another_process(node, measured_for=60)
    await node.publish(node.shapes)
    library = next(node.store.store_dir.glob("*-library-1.0"))
    library.rename(node.scratch / "gone")
    assert library.name in await problem(node)
    (node.scratch / "gone").rename(library)
    assert (await measure(node)).problem is None


# Trees


async def size(tree: Path, **arguments: Any) -> TreeSize:
    sizes = TreeSizes(fresh=0, **{"patience": 60, **arguments})
    try:
        return await sizes.of(str(tree))
    finally:
        await sizes.close()


@pytest.fixture
def tree(scratch: Path) -> Path:
    """5,000 files in 100 directories, in memory."""
    tree = scratch / "tree"
    tree.mkdir()
    run("mount", "-t", "tmpfs", "cknix-test", tree)
    for number in range(100):
        (tree / f"{number}").mkdir(parents=True)
        for file in range(50):
            (tree / f"{number}/{file}").write_text("x" * file)
    return tree


async def test_odd_things_in_a_tree_are_counted_as_du_counts_them(tree: Path) -> None:
    (tree / "out").symlink_to("/")
    os.mknod(tree / "whiteout", 0o20000, 0)
    os.link(tree / "whiteout", tree / "1/whiteout")
    os.mkfifo(tree / "fifo")
    (tree / os.fsdecode(b"not-utf8-\xff\n")).mkdir()
    (tree / os.fsdecode(b"not-utf8-\xff\n") / "file").write_bytes(b"x" * 100_000)
    (tree / ("n" * 255)).mkdir()
    run("mount", "-t", "tmpfs", "somebody's", tree / "2")
    (tree / "2/elsewhere").write_bytes(b"x" * MIB)
    found = await size(tree)
    assert found == du(tree)
    assert found.inodes > 4900


async def test_a_tree_that_is_nested_deeper_than_a_path_can_name_is_counted_down_to_there(scratch: Path) -> None:
    run("mount", "-t", "tmpfs", "cknix-test", scratch)
    top = os.open(scratch, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("dd", dir_fd=top)
        below = os.open("dd", os.O_RDONLY, dir_fd=top)
        os.close(top)
        top = below
    os.close(top)
    assert 1000 < (await size(scratch)).inodes < 3002


async def test_a_count_ends_at_the_most_that_is_counted(tree: Path) -> None:
    assert (await size(tree, most=777)).inodes == 777


async def test_a_tree_is_counted_while_it_changes(tree: Path) -> None:
    sizes = TreeSizes(fresh=0, patience=60)
    counted = asyncio.Event()

    def churn() -> None:
        number = 0
        while not counted.is_set():
            number += 1
            (tree / f"{number % 100}").rename(tree / "aside")
            (tree / "aside/new").touch()
            (tree / "aside/new").unlink()
            (tree / "aside").rename(tree / f"{number % 100}")

    churning = asyncio.create_task(asyncio.to_thread(churn))
    for _ in range(3):
        assert (await sizes.of(str(tree))).inodes > 4000
    counted.set()
    await churning
    assert await sizes.of(str(tree)) == du(tree)


async def test_who_asks_meanwhile_is_told_the_last_size_and_nothing_is_counted_twice_at_once(tree: Path) -> None:
    begun = 0

    class Counting(TreeSizes):
        async def _run(self, count: Any) -> TreeSize:
            nonlocal begun
            begun += 1
            return await super()._run(count)

    sizes = Counting(fresh=0, patience=0.001)
    first = await asyncio.gather(*(sizes.of(str(tree)) for _ in range(20)))
    assert begun == 1
    assert max(each.inodes for each in first) < 5101
    whole = du(tree)
    async with asyncio.timeout(30):
        while await sizes.of(str(tree)) != whole:
            await asyncio.sleep(0.01)
    (tree / "new").write_text("new")
    assert await sizes.of(str(tree)) == whole
    async with asyncio.timeout(30):
        while await sizes.of(str(tree)) != du(tree):
            await asyncio.sleep(0.01)
    await sizes.close()


async def test_closing_ends_a_count_at_once(tree: Path) -> None:
    sizes = TreeSizes(fresh=60, patience=0)
    assert (await sizes.of(str(tree))).inodes < 5101
    await sizes.close()
    assert [task.get_name() for task in asyncio.all_tasks() if "size" in task.get_name()] == []
    sizes_again = TreeSizes(patience=60)
    assert await sizes_again.of(str(tree)) == du(tree)
