"""Farms of hard links, by both engines: each is the other's oracle."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cknix_csi.api.closure import Closure
from cknix_csi.api.errors import DeadlineExceeded, OutOfSpace
from cknix_csi.nix import process
from cknix_csi.volumes.failures import StoreDamaged, VolumeFailed
from cknix_csi.volumes.farm import FarmEngine, FarmReport, Farms
from cknix_csi.volumes.linking import LinkEngine
from cknix_csi.volumes.mountinfo import read_mount_table
from cknix_csi.volumes.mounts import KernelMounts, Upper
from cknix_csi.volumes.rsync import RsyncEngine
from cknix_csi.volumes.trash import Trash
from cknix_csi.volumes.view import Var, Views
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

MOUNTS = KernelMounts()
ENGINES: dict[str, Callable[[], FarmEngine]] = {"link": LinkEngine, "rsync": lambda: RsyncEngine(process.run)}


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> FarmEngine:
    if request.param == "rsync" and shutil.which("rsync") is None:
        pytest.skip("no rsync on the PATH")
    return ENGINES[request.param]()


def farms_at(data: Path, store: FakeStore, engine: FarmEngine) -> Farms:
    """Farms of *store* below *data*."""
    (data / "farms").mkdir(parents=True)
    (data / "trash").mkdir()
    return farms_again(data, store, engine)


def farms_again(data: Path, store: FakeStore, engine: FarmEngine) -> Farms:
    """What another process sees of them."""
    return Farms(str(data / "farms"), store.store_dir, Trash(str(data / "trash")), engine, Var())


@pytest.fixture
def farms(scratch: Path, store: FakeStore, engine: FarmEngine) -> Farms:
    return farms_at(scratch / "data", store, engine)


async def build(farms: Farms, store: FakeStore, closure: Closure) -> FarmReport:
    """A whole farm, in the way that volumes make one."""
    building = farms.reserve()
    try:
        report = await farms.begin(building, closure)
        await store.write_state(closure, Path(building, "tree"))
        await asyncio.to_thread(farms.complete, building, closure.id)
    except BaseException:
        farms.abandon(building)
        raise
    return report


def made_store(farms: Farms, closure: Closure) -> Path:
    return Path(farms.origin(closure.id), "store")


# What a farm is


async def test_a_farm_equals_the_store_in_every_entrys_metadata_and_content(farms: Farms, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    before = contents(store.store_dir)
    await build(farms, store, closure)
    require_equal(made_store(farms, closure), store.store_dir, closure)
    assert contents(store.store_dir) == before


async def test_every_file_and_link_of_a_farm_is_the_stores_own_inode(farms: Farms, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    await build(farms, store, closure)
    for info in closure.paths:
        original, made = store.store_dir / info.path.basename, made_store(farms, closure) / info.path.basename
        for kind in ("f", "l"):
            assert inodes(made, kind=kind) == inodes(original, kind=kind)
        assert not set(inodes(made, kind="d").values()) & set(inodes(original, kind="d").values())


async def test_the_report_counts_what_is_there(farms: Farms, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    report = await build(farms, store, closure)
    files, directories, symlinks = (count(store.store_dir, closure, kind) for kind in "fdl")
    assert report == FarmReport(linked=files, directories=directories, symlinks=symlinks)
    assert str(report) == f"files: {files} linked; {directories} directories, {symlinks} symbolic links"


async def test_nix_var_is_the_same_as_in_a_view(farms: Farms, store: FakeStore, scratch: Path) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    before = os.umask(0o077)
    try:
        await build(farms, store, closure)
    finally:
        os.umask(before)
    (scratch / "views").mkdir()
    views = Views(str(scratch / "views"), store.store_dir, Trash(str(scratch / "views-trash")))
    building = views.reserve()
    views.begin(building, closure)
    await store.write_state(closure, Path(building, "meta"))
    views.complete(building, closure.id)
    view = Path(views.layers(closure.id)[0])
    farm = Path(farms.origin(closure.id))
    assert metadata(farm / "var", content=True) == metadata(view / "nix/var", content=True)
    for name in ("", "store", "store/.links"):
        original, made = (view / "nix" / name).stat(), (farm / name).stat()
        assert (made.st_mode, made.st_uid, made.st_mtime_ns) == (
            original.st_mode,
            original.st_uid,
            original.st_mtime_ns,
        )


async def test_names_of_one_inode_in_the_store_are_one_inode_in_the_farm(farms: Farms, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    await build(farms, store, closure)
    expected = families(store.store_dir, closure)
    assert expected
    assert families(made_store(farms, closure), closure) == expected


@given(entries=closures, threads=st.integers(1, 4))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_closure_is_linked_as_it_is(scratch: Path, entries: list[Entry], threads: int) -> None:
    asyncio.run(require_linked(scratch, entries, LinkEngine(threads)))


@given(entries=closures)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_rsync_links_any_closure_as_it_is(scratch: Path, entries: list[Entry]) -> None:
    asyncio.run(require_linked(scratch, entries, RsyncEngine(process.run)))


async def require_linked(scratch: Path, entries: list[Entry], engine: FarmEngine) -> None:
    run("rm", "--recursive", "--force", scratch / "example")
    store = FakeStore(scratch / "example/nix")
    farms = farms_at(scratch / "example/data", store, engine)
    closure = await store.query(make_closure(store, entries))
    report = await build(farms, store, closure)
    made = made_store(farms, closure)
    require_equal(made, store.store_dir, closure)
    for info in closure.paths:
        assert inodes(made / info.path.basename) == inodes(store.store_dir / info.path.basename)
    assert report.linked == count(store.store_dir, closure, "f")
    assert not report.copied


async def test_paths_longer_than_the_kernel_takes_are_linked(scratch: Path, store: FakeStore) -> None:
    root, at = store.add("deep")
    at.mkdir()
    deep = os.open(at, os.O_RDONLY)
    for _ in range(20):
        os.mkdir(b"n" * 255, dir_fd=deep)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o444, dir_fd=deep))
        outer, deep = deep, os.open(b"n" * 255, os.O_RDONLY, dir_fd=deep)
        os.close(outer)
    os.close(deep)
    farms = farms_at(scratch / "data", store, LinkEngine())
    closure = await store.query(root)
    assert (await build(farms, store, closure)).linked == 20
    made = made_store(farms, closure)
    assert metadata(made / root.basename) == metadata(at)
    assert inodes(made / root.basename) == inodes(at)
    farms.discard(closure.id)


# Where links cannot be made


def with_as_many_names_as_it_can_have(path: Path, beside: Path) -> None:
    """Use up the link count of *path*, by names in the new directory *beside*."""
    beside.mkdir()
    try:
        for number in range(1 << 17):
            os.link(path, beside / str(number))
    except OSError as error:
        assert error.errno == errno.EMLINK
        return
    pytest.skip("this file system has no limit that a test could reach")


async def test_a_file_that_can_have_no_more_names_is_copied_once(farms: Farms, store: FakeStore, scratch: Path) -> None:
    root, at = store.add("root")
    at.mkdir()
    (at / "full").write_bytes(b"f" * 5000)
    os.link(at / "full", at / "full-again")
    (at / "ordinary").write_text("ordinary")
    seal(at)
    closure = await store.query(root)
    with_as_many_names_as_it_can_have(at / "full", scratch / "names")
    before = (at / "full").stat()
    report = await build(farms, store, closure)
    made = made_store(farms, closure)
    require_equal(made, store.store_dir, closure)
    assert families(made, closure) == families(store.store_dir, closure)
    assert not (made / root.basename / "full").samefile(at / "full")
    assert (made / root.basename / "ordinary").samefile(at / "ordinary")
    assert (report.copied, report.bytes_copied, report.linked) == (1, 5000, 2)
    assert str(report).startswith("files: 2 linked and 1 copied (5000 bytes);")
    after = (at / "full").stat()
    assert (after.st_nlink, after.st_ctime_ns) == (before.st_nlink, before.st_ctime_ns)


@pytest.mark.parametrize("how", ["another file system", "another mount of the same"])
async def test_a_farm_elsewhere_is_a_copy_that_keeps_holes_and_links(
    scratch: Path, store: FakeStore, engine: FarmEngine, how: str
) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    other = scratch / "other"
    other.mkdir()
    if how == "another file system":
        run("mount", "-t", "tmpfs", "none", other)
    else:
        run("mount", "--bind", other, other)
    farms = farms_at(other / "data", store, engine)
    report = await build(farms, store, closure)
    made = made_store(farms, closure)
    require_equal(made, store.store_dir, closure)
    assert families(made, closure) == families(store.store_dir, closure)
    if isinstance(engine, LinkEngine):  # rsync fills holes when it copies for want of a link
        assert blocks(made) <= blocks(store.store_dir) + (64 << 10)
    files = count(store.store_dir, closure, "f")
    assert report.copied == files - 1  # one of them has two names
    assert report.symlinks == count(store.store_dir, closure, "l")
    run("umount", other)


async def test_where_the_file_system_can_a_file_that_cannot_be_linked_shares_its_blocks(scratch: Path) -> None:
    with btrfs(scratch) as disk:
        store = FakeStore(disk / "nix")
        closure = await store.query(fill_of_all_shapes(store))
        (disk / "elsewhere").mkdir()
        run("mount", "--bind", disk / "elsewhere", disk / "elsewhere")
        farms = farms_at(disk / "elsewhere/data", store, LinkEngine())
        report = await build(farms, store, closure)
        require_equal(made_store(farms, closure), store.store_dir, closure)
        assert (report.reflinked, report.copied) == (count(store.store_dir, closure, "f") - 1, 0)
        run("umount", disk / "elsewhere")


# Finding a farm again


async def test_a_farm_that_is_there_is_found_whole_and_listed(farms: Farms, store: FakeStore) -> None:
    closure = await store.query(fill_small(store, "a"))
    assert not farms.sound(closure.id)
    await build(farms, store, closure)
    assert farms.sound(closure.id)
    assert list(farms.ids()) == [closure.id]
    assert list(farms.abandoned()) == []


@pytest.mark.parametrize("damage", ["another boot", "a lost path", "another closure", "never sealed"])
async def test_a_farm_that_is_not_whole_is_not_found_and_made_again(
    farms: Farms, store: FakeStore, damage: str
) -> None:
    closure = await store.query(fill_small(store, "a", [fill_small(store, "b")]))
    await build(farms, store, closure)
    path = Path(farms.path(closure.id))
    match damage:
        case "another boot":
            sealed = (path / "sealed").read_text()
            (path / "sealed").write_text("00000000-0000-0000-0000-000000000000" + sealed[36:])
        case "a lost path":
            run("rm", "--recursive", path / "tree/nix/store" / closure.paths[0].path.basename)
        case "another closure":
            (path / "tree/nix/var/result").unlink()
            (path / "tree/nix/var/result").symlink_to("/nix/store/another")
        case "never sealed":
            (path / "sealed").unlink()
    assert not farms.sound(closure.id)
    assert list(farms.ids()) == [closure.id]
    await build(farms, store, closure)
    assert farms.sound(closure.id)
    require_equal(made_store(farms, closure), store.store_dir, closure)


async def test_a_half_built_farm_is_nobodys_only_after_its_process(
    farms: Farms, store: FakeStore, scratch: Path, engine: FarmEngine
) -> None:
    closure = await store.query(fill_small(store, "a"))
    building = farms.reserve()
    await farms.begin(building, closure)
    assert not farms.sound(closure.id)
    assert list(farms.abandoned()) == []
    next_process = farms_again(scratch / "data", store, engine)
    assert list(next_process.abandoned()) == [building]
    next_process.abandon(building)
    assert os.listdir(scratch / "data/farms") == []


async def test_two_who_build_one_farm_at_once_both_end_with_a_whole_one(farms: Farms, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    await asyncio.gather(build(farms, store, closure), build(farms, store, closure))
    assert farms.sound(closure.id)
    require_equal(made_store(farms, closure), store.store_dir, closure)


# Failure


async def test_a_path_that_is_gone_from_the_store_is_reported_by_name(farms: Farms, store: FakeStore) -> None:
    missing, _ = store.add("missing")
    closure = await store.query(fill_small(store, "a", [missing]))
    with pytest.raises(StoreDamaged, match=rf"{missing}.*repair"):
        await build(farms, store, closure)
    assert list(farms.ids()) == []


async def test_something_in_the_store_that_no_store_can_hold_is_refused(scratch: Path, store: FakeStore) -> None:
    farms = farms_at(scratch / "data", store, LinkEngine())
    root = fill_small(store, "a")
    os.mkfifo(store.store_dir / root.basename / "fifo")
    with pytest.raises(StoreDamaged, match="no directory, file or link"):
        await build(farms, store, await store.query(root))


async def test_a_full_disk_is_named_and_nothing_is_left(scratch: Path, store: FakeStore, engine: FarmEngine) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    small = scratch / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", small)
    farms = farms_at(small / "data", store, engine)
    with pytest.raises(OutOfSpace, match="free space"):
        await build(farms, store, closure)
    assert os.listdir(small / "data/farms") == []
    assert working_threads() == []
    run("umount", small)


def working_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cknix tree")]


def processes_with(words: str) -> list[str]:
    """Command lines of running processes that contain *words*."""
    found = []
    for process_id in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{process_id}/cmdline").read_bytes()
        except OSError:
            continue
        if words.encode() in line:
            found.append(os.fsdecode(line))
    return found


async def test_a_cancelled_build_stops_soon_and_leaves_only_what_can_be_abandoned(
    farms: Farms, store: FakeStore, scratch: Path
) -> None:
    root, at = store.add("many")
    for number in range(100):
        (at / str(number)).mkdir(parents=True)
        for file in range(100):
            (at / str(number) / str(file)).touch()
    closure = await store.query(root)
    building = farms.reserve()
    task = asyncio.create_task(farms.begin(building, closure))
    made = Path(building, "tree/nix/store", root.basename)
    while not (made.exists() and any(made.iterdir())):
        assert not task.done()
        await asyncio.sleep(0.001)
    task.cancel()
    cancelled = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - cancelled < 5
    assert working_threads() == []
    while processes_with(building):  # killed, but a kernel has its time to end them
        assert time.monotonic() - cancelled < 5
        await asyncio.sleep(0.01)
    assert len(inodes(made)) < 10_000
    assert not farms.sound(closure.id)
    farms.abandon(building)
    assert os.listdir(scratch / "data/farms") == []
    assert len(inodes(at)) == 10_000


CALLS = ("mkdir", "link", "symlink", "chmod", "fchmod", "utime", "rename")
"""Every kind of change that building a farm makes."""


def killed_in_its_step(step: int, scratch: Path, store: FakeStore, closure: Closure) -> int:
    """Begin a build in a child that is killed before call *step* (from 1) of CALLS; how it ended.  For a thread."""

    def die(calls: list[str]) -> None:
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            counting(die, setattr)
            asyncio.run(build(farms_again(scratch / "data", store, LinkEngine(1)), store, closure))
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counting(before: Callable[[list[str]], None], patch: Callable[[object, str, object], None]) -> list[str]:
    """Make every call of CALLS announce itself to *before*, with the names of all until now; returns that list."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            calls.append(name)
            before(calls)
            return real(*arguments, **keywords)

        return call

    for name in CALLS:
        patch(os, name, counted(name, getattr(os, name)))
    return calls


async def test_a_build_that_is_killed_in_any_kind_of_step_is_nobodys_and_the_next_one_works(
    scratch: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, at = store.add("library")
    at.mkdir()
    (at / "file").touch()
    seal(at)
    root = fill_small(store, "a", [library])
    closure = await store.query(root)
    before = contents(store.store_dir)
    farms = farms_at(scratch / "data", store, LinkEngine(1))
    with monkeypatch.context() as patched:
        calls = counting(lambda _: None, patched.setattr).copy
        await build(farms, store, closure)
        names = calls()
    steps = {names.index(name) + 1 for name in CALLS} | {len(names) - names[::-1].index(name) for name in CALLS}
    farms.discard(closure.id)
    for step in sorted(steps):
        ended = await asyncio.to_thread(killed_in_its_step, step, scratch, store, closure)
        assert ended == -signal.SIGKILL, names[step - 1]
        assert not farms.sound(closure.id)
        assert list(farms.ids()) == []
        for building in list(farms.abandoned()):
            farms.abandon(building)
        await build(farms, store, closure)
        require_equal(made_store(farms, closure), store.store_dir, closure)
        assert os.listdir(scratch / "data/farms") == [closure.id]
        farms.discard(closure.id)
    assert contents(store.store_dir) == before


async def test_no_descriptor_is_left_open(farms: Farms, store: FakeStore) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    await build(farms, store, closure)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        farms.discard(closure.id)
        await build(farms, store, closure)
    assert len(os.listdir("/proc/self/fd")) == before


# What a farm is for


async def test_a_clone_of_a_farm_refuses_writes_and_is_recognised(
    farms: Farms, store: FakeStore, scratch: Path
) -> None:
    closure = await store.query(fill_small(store, "a"))
    other = await store.query(fill_small(store, "b"))
    await build(farms, store, closure)
    await build(farms, store, other)
    target = scratch / "pod"
    target.mkdir()
    assert not farms.in_use(closure.id, read_mount_table())
    MOUNTS.clone(farms.origin(closure.id), str(target), writable=False)
    with pytest.raises(OSError) as refused:
        (target / "store" / closure.id / "bin/hello").open("ab")
    assert refused.value.errno == errno.EROFS
    (mount,) = read_mount_table().at(str(target))
    assert farms.closure_of(mount) == closure.id
    assert farms.shown(read_mount_table()) == {closure.id}
    assert farms.in_use(closure.id, read_mount_table())
    assert not farms.in_use(other.id, read_mount_table())
    MOUNTS.unmount(str(target))
    assert not farms.in_use(closure.id, read_mount_table())


async def test_an_overlay_over_a_farm_shows_it_and_keeps_writes_to_itself(
    farms: Farms, store: FakeStore, scratch: Path
) -> None:
    closure = await store.query(fill_of_all_shapes(store))
    await build(farms, store, closure)
    before = contents(store.store_dir)
    shared, target = farms.mountpoint(closure.id), scratch / "pod"
    upper = Upper(str(scratch / "upper"), str(scratch / "work"))
    for directory in (target, upper.upper, upper.work):
        os.mkdir(directory)
    MOUNTS.overlay(shared, source=farms.source(closure.id), lower=farms.layers(closure.id), upper=None)
    assert farms.is_shown(closure.id)
    require_equal(Path(shared, "nix/store"), store.store_dir, closure)
    assert not farms.in_use(closure.id, read_mount_table())
    MOUNTS.overlay(str(target), source=farms.source(closure.id), lower=farms.layers(closure.id), upper=upper)
    assert farms.in_use(closure.id, read_mount_table())
    assert {farms.closure_of(mount) for mount in read_mount_table().at(str(target))} == {closure.id}
    pod = target / "nix/store" / closure.id / "bin/hello"
    pod.chmod(0o777)
    pod.write_text("pwned")
    assert contents(store.store_dir) == before
    assert (made_store(farms, closure) / closure.id / "bin/hello").samefile(store.store_dir / closure.id / "bin/hello")
    for mounted in (str(target), shared):
        MOUNTS.unmount(mounted)


async def test_mounts_of_others_are_not_taken_for_farms(farms: Farms, store: FakeStore, scratch: Path) -> None:
    closure = await store.query(fill_small(store, "a"))
    await build(farms, store, closure)
    assert all(farms.closure_of(mount) is None for mount in read_mount_table().all())


# rsync itself


async def test_a_driver_without_rsync_says_so(scratch: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    farms = farms_at(scratch / "data", store, RsyncEngine(process.run))
    monkeypatch.setenv("PATH", str(scratch))
    with pytest.raises(VolumeFailed, match="rsync is not on the driver's PATH"):
        await build(farms, store, await store.query(fill_small(store, "a")))


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("echo 'write failed: No space left on device (28)' >&2; exit 11", OutOfSpace, "No space left"),
        ("echo 'some file vanished' >&2; exit 24", VolumeFailed, "status 24: some file vanished"),
        ("exec sleep 60", DeadlineExceeded, "longer than 0.5 s"),
    ],
)
async def test_what_rsync_says_about_its_failure_reaches_the_reader(
    scratch: Path, store: FakeStore, monkeypatch: pytest.MonkeyPatch, script: str, error: type[Exception], words: str
) -> None:
    path = scratch / "bin/rsync"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    farms = farms_at(scratch / "data", store, RsyncEngine(process.run, deadline=0.5))
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    with pytest.raises(error, match=words):
        await build(farms, store, await store.query(fill_small(store, "a")))
