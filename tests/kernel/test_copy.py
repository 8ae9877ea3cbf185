"""Private copies: every file of the closure, and none of the store's inodes."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cknix_csi.api.closure import Closure
from cknix_csi.api.errors import OutOfSpace
from cknix_csi.volumes import syscalls
from cknix_csi.volumes.copytree import CopyEngine
from cknix_csi.volumes.farm import FarmReport, furnish, settle
from cknix_csi.volumes.linking import LinkEngine
from cknix_csi.volumes.view import Var
from tests.kernel.node import metadata, run
from tests.kernel.store import FakeStore, fill_of_all_shapes, fill_small, seal
from tests.kernel.trees import (
    Entry,
    blocks,
    btrfs,
    closures,
    contents,
    count,
    families,
    inodes,
    make_closure,
    require_equal,
)


async def build(copy: Path, store: FakeStore, closure: Closure, threads: int = 2) -> FarmReport:
    """A private copy, in the way that volumes make one."""
    report = await furnish(str(copy), closure, store.store_dir, CopyEngine(threads), Var())
    await store.write_state(closure, copy)
    settle(str(copy), Var())
    return report


def distinct(store: FakeStore, closure: Closure) -> int:
    """Regular files of the closure, those with several names counted once."""
    return len({inode for info in closure.paths for inode in inodes(store.store_dir / info.path.basename).values()})


async def test_a_copy_equals_the_store_and_shares_no_inode_with_it(scratch: Path, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    await build(scratch / "copy", store, closure)
    made = scratch / "copy/nix/store"
    require_equal(made, store.store_dir, closure)
    assert not set(inodes(made).values()) & set(inodes(store.store_dir).values())
    assert sorted(os.listdir(scratch / "copy/nix/var")) == ["nix", "result"]


async def test_whatever_is_done_to_a_copy_the_store_stays_as_it_is(scratch: Path, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    before = contents(store.store_dir)
    await build(scratch / "copy", store, closure)
    run("chmod", "--recursive", "a+rwx", scratch / "copy")
    run("chown", "--recursive", "--no-dereference", "1234:1234", scratch / "copy")
    run("find", scratch / "copy", "-type", "f", "-exec", "sh", "-c", 'for f; do echo pwned >"$f"; done', "-", "{}", "+")
    assert contents(store.store_dir) == before
    run("rm", "--recursive", scratch / "copy")
    assert contents(store.store_dir) == before


async def test_files_of_one_inode_stay_one_and_holes_stay_holes(scratch: Path, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    await build(scratch / "copy", store, closure)
    made = scratch / "copy/nix/store"
    assert families(made, closure) == families(store.store_dir, closure)
    assert blocks(made) <= blocks(store.store_dir) + (64 << 10)


async def test_the_report_says_what_a_copy_costs(scratch: Path, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    report = await build(scratch / "copy", store, closure)
    files = count(store.store_dir, closure, "f")
    assert (report.copied + report.reflinked, report.linked) == (distinct(store, closure), 1)
    assert report.copied + report.reflinked + report.linked == files
    assert report.directories == count(store.store_dir, closure, "d")
    assert report.symlinks == count(store.store_dir, closure, "l")
    if not report.reflinked:
        on_disk = blocks(scratch / "copy/nix/store")
        assert on_disk - 4096 * files <= report.bytes_copied <= on_disk


async def test_one_inode_with_more_names_than_an_inode_can_have_becomes_several(
    scratch: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kernel that allows three names: the real limit would take 65,000 in one closure."""
    root, at = store.add("many-names")
    at.mkdir()
    (at / "0").write_text("content")
    for number in range(1, 8):
        os.link(at / "0", at / str(number))
    seal(at)
    closure = await store.query(root)
    link = os.link

    def limited(
        source: str, target: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None, **_: bool
    ) -> None:
        if os.stat(source, dir_fd=src_dir_fd, follow_symlinks=False).st_nlink >= 3:
            raise OSError(errno.EMLINK, "Too many links", source)
        link(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=False)

    monkeypatch.setattr(os, "link", limited)
    report = await build(scratch / "copy", store, closure)
    require_equal(scratch / "copy/nix/store", store.store_dir, closure)
    assert (report.copied, report.linked) == (4, 4)  # each copy: its name, the anchor, and one more


async def test_where_the_file_system_can_a_copy_shares_the_stores_blocks(scratch: Path) -> None:
    with btrfs(scratch) as disk:
        store = FakeStore(disk / "nix")
        closure = await store.query(fill_of_all_shapes(store))
        run("sync", "--file-system", disk)
        report = await build(disk / "copy", store, closure)
        require_equal(disk / "copy/nix/store", store.store_dir, closure)
        assert not set(inodes(disk / "copy/nix/store").values()) & set(inodes(store.store_dir).values())
        assert (report.reflinked, report.copied, report.bytes_copied) == (distinct(store, closure), 0, 0)


async def test_a_file_that_cannot_be_cloned_is_copied_and_the_others_are_not(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with btrfs(scratch) as disk:
        store = FakeStore(disk / "nix")
        closure = await store.query(fill_of_all_shapes(store))
        clone = syscalls.clone_file
        refused: list[int] = []

        def refuse_the_first(source: int, target: int) -> None:
            if not refused:
                refused.append(source)
                raise OSError(errno.EINVAL, "Invalid argument")
            clone(source, target)

        monkeypatch.setattr(syscalls, "clone_file", refuse_the_first)
        report = await build(disk / "copy", store, closure, threads=1)
        require_equal(disk / "copy/nix/store", store.store_dir, closure)
        assert (report.copied, report.reflinked) == (1, distinct(store, closure) - 1)


@given(entries=closures, threads=st.integers(1, 4))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_closure_is_copied_as_it_is(scratch: Path, entries: list[Entry], threads: int) -> None:
    async def example() -> None:
        run("rm", "--recursive", "--force", scratch / "example")
        store = FakeStore(scratch / "example/nix")
        closure = await store.query(make_closure(store, entries))
        report = await build(scratch / "example/copy", store, closure, threads)
        made = scratch / "example/copy/nix/store"
        require_equal(made, store.store_dir, closure)
        assert families(made, closure) == families(store.store_dir, closure)
        assert report.copied + report.reflinked == distinct(store, closure)
        files = count(store.store_dir, closure, "f")
        assert blocks(made) <= blocks(store.store_dir) + 8192 * files
        assert not set(inodes(made).values()) & set(inodes(store.store_dir).values())

    asyncio.run(example())


async def test_paths_longer_than_the_kernel_takes_are_copied(scratch: Path, store: FakeStore) -> None:
    root, at = store.add("deep")
    at.mkdir()
    deep = os.open(at, os.O_RDONLY)
    for _ in range(40):
        os.mkdir(b"n" * 200, dir_fd=deep)
        os.symlink("nowhere", "link", dir_fd=deep)
        with open(os.open("file", os.O_CREAT | os.O_WRONLY, 0o444, dir_fd=deep), "wb") as file:
            file.write(b"content")
        outer, deep = deep, os.open(b"n" * 200, os.O_RDONLY, dir_fd=deep)
        os.close(outer)
    os.close(deep)
    report = await build(scratch / "copy", store, await store.query(root))
    assert (report.copied + report.reflinked, report.symlinks) == (40, 40)
    assert metadata(scratch / "copy/nix/store" / root.basename) == metadata(at)


async def test_files_of_another_owner_keep_it(scratch: Path, store: FakeStore) -> None:
    root = fill_small(store, "owned")
    run("chown", "--recursive", "--no-dereference", "0:30000", store.store_dir / root.basename)
    (store.store_dir / root.basename / "link").symlink_to("nowhere")
    os.chown(store.store_dir / root.basename / "link", 5, 6, follow_symlinks=False)
    closure = await store.query(root)
    for name, engine in (("copy", CopyEngine()), ("farm", LinkEngine())):
        await furnish(str(scratch / name), closure, store.store_dir, engine, Var())
        require_equal(scratch / name / "nix/store", store.store_dir, closure)


async def test_a_full_disk_is_named(scratch: Path, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    small = scratch / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", small)
    with pytest.raises(OutOfSpace, match="free space"):
        await build(small / "copy", store, closure)
    run("umount", small)


async def test_a_cancelled_copy_stops_in_the_middle_of_a_large_file(
    scratch: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, at = store.add("large")
    at.mkdir()
    (at / "file").write_bytes(b"x" * (40 << 20))
    seal(at)
    closure = await store.query(root)
    loop = asyncio.get_running_loop()
    begun, send = asyncio.Event(), os.sendfile
    cancelled = threading.Event()

    def slow(target: int, source: int, offset: int, count: int) -> int:
        loop.call_soon_threadsafe(begun.set)
        assert cancelled.wait(10)
        return send(target, source, offset, min(count, 4096))

    monkeypatch.setattr(os, "sendfile", slow)
    monkeypatch.setattr(syscalls, "clone_file", refused)
    task = asyncio.create_task(build(scratch / "copy", store, closure))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)  # the cancellation arrives
    cancelled.set()
    started = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 5
    assert blocks(scratch / "copy") <= 64 << 10
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("cknix tree")]


def refused(_source: int, _target: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")
