"""The probe: it finds what is there, and what is not leads to another presentation."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path

import pytest

from cknix_csi.api.errors import MountFailed
from cknix_csi.api.presentation import Presentation
from cknix_csi.volumes import loop, syscalls
from cknix_csi.volumes import probe as probe_module
from cknix_csi.volumes.choose import PresentationUnavailable, Wish, choose
from cknix_csi.volumes.failures import DataRootTaken
from cknix_csi.volumes.locks import ProcessLock
from cknix_csi.volumes.mounts import KernelMounts, Mounts, Upper
from cknix_csi.volumes.probe import TITLES, Finding, ProbeResult, probe, table
from tests.kernel.node import mounts_below, run
from tests.kernel.steps import Stepped, SteppedMounts
from tests.kernel.store import FakeStore, fill_small
from tests.kernel.trees import btrfs

VIEW = {"listing", "directory_content", "stub_content", "read_only"}
WRITABLE = {"write_apart", "chmod_apart"}
PLAIN = {"overlay_read_only", "overlay_writable"}
NEVER = {"idmapped_overlay"}
IDMAP = {"idmap", "idmap_sized"}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(scratch: Path) -> Iterator[Path]:
    """A store with one path, which a probe must leave as it is."""
    filled = FakeStore(scratch / "nix")
    fill_small(filled, "a")
    before = tree(filled.store_dir)
    yield filled.store_dir
    assert tree(filled.store_dir) == before


def tree(directory: Path) -> str:
    return run("find", directory, "-printf", r"%P %m %s %T@ %i %n\n")


def failing(result: ProbeResult) -> set[str]:
    """The properties that do not hold, but for what no kernel can do and what hangs on the file system."""
    return {name for name in TITLES if not getattr(result, name).ok} - NEVER - {"reflink"}


def left(scratch: Path) -> list[str]:
    """Mounts, and files of the probe."""
    return mounts_below(scratch) + os.listdir(scratch / "probe")


# What there is


def test_on_a_kernel_that_can_everything_holds_but_the_id_mapped_overlay(scratch: Path, store: Path) -> None:
    result = probe(scratch / "probe", store, KernelMounts())
    assert failing(result) == set()
    assert result.kernel == run("uname", "-r").strip()
    assert result.idmapped_overlay == Finding(False, "Invalid argument")
    assert choose(result, Wish(writable=False)).presentation is Presentation.REDIRECT
    assert choose(result, Wish(writable=True)).presentation is Presentation.REDIRECT


def test_a_new_node_can_what_it_will_be_able_to_when_it_has_a_store(scratch: Path) -> None:
    result = probe(scratch / "probe", scratch / "nix/store", KernelMounts())
    assert failing(result) == set()
    assert result.hardlink == Finding(True, "the store is empty: tried beside it")
    assert not (scratch / "nix").exists()


def test_a_probe_leaves_no_mount_no_file_no_descriptor_and_no_process(scratch: Path, store: Path) -> None:
    probe(scratch / "probe", store, KernelMounts())
    descriptors, children = os.listdir("/proc/self/fd"), child_processes()
    for _ in range(3):
        probe(scratch / "probe", store, KernelMounts())
    assert left(scratch) == []
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert child_processes() == children


def child_processes() -> list[str]:
    """The ids of this process's children."""
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return sorted(child for task in tasks for child in (task / "children").read_text().split())


def test_reflinks_are_found_where_the_file_system_has_them_and_nowhere_else(scratch: Path, store: Path) -> None:
    on_ext4 = run("stat", "--file-system", "--format=%T", scratch).strip() == "ext2/ext3"
    if on_ext4:
        assert probe(scratch / "probe", store, KernelMounts()).reflink == Finding(False, "Operation not supported")
    with btrfs(scratch) as disk:
        (disk / "store").mkdir()
        empty = probe(disk / "probe", disk / "store", KernelMounts())
        assert empty.reflink == Finding(True, "the store is empty: tried beside it")
        (disk / "store/file").write_text("content")
        assert probe(disk / "probe", disk / "store", KernelMounts()).reflink == Finding(True, "")


@pytest.mark.parametrize("filled", [True, False], ids=["a store with files", "an empty store"])
def test_a_store_on_another_mount_has_no_hard_links_to_the_data_root(scratch: Path, filled: bool) -> None:
    other = scratch / "other"
    other.mkdir()
    run("mount", "--bind", other, other)
    if filled:
        (other / "file").touch()
    result = probe(scratch / "probe", other, KernelMounts())
    assert not result.hardlink.ok
    assert ("cross-device" if filled else "different mounts") in result.hardlink.detail
    assert failing(result) == {"hardlink"}
    run("umount", other)


def test_the_table_names_every_property_and_what_is_wrong(scratch: Path, store: Path) -> None:
    text = table(probe(scratch / "probe", store, KernelMounts()))
    assert run("uname", "-r").strip() in text
    assert all(title in text for title in TITLES.values())
    (refused,) = (line for line in text.splitlines() if line.startswith(TITLES["idmapped_overlay"]))
    assert refused.split()[-3:] == ["no", "Invalid", "argument"]
    assert len(text.splitlines()) == len(fields(ProbeResult))


# What there is not: each by mounts that misbehave


class Options(KernelMounts):
    """Overlays by mount(8), with other options than ours."""

    def __init__(self, *options: str, writable_only: bool = False) -> None:
        self._options = options
        self._writable_only = writable_only

    def overlay(self, target: str, *, source: str, lower: Sequence[str], upper: Upper | None) -> None:
        if self._writable_only and upper is None:
            super().overlay(target, source=source, lower=lower, upper=upper)
            return
        options = [f"lowerdir={':'.join(lower)}", *self._options]
        if upper is not None:
            options += [f"upperdir={upper.upper}", f"workdir={upper.work}"]
        run("mount", "-t", "overlay", "-o", ",".join(options), source, target)


class NoOverlay(KernelMounts):
    """A kernel without overlayfs; with *of*, only those overlays fail that have this directory as a layer."""

    def __init__(self, of: str | None = None) -> None:
        self._of = of

    def overlay(self, target: str, *, source: str, lower: Sequence[str], upper: Upper | None) -> None:
        if self._of is None or self._of in lower:
            raise MountFailed("the kernel has no overlayfs")
        super().overlay(target, source=source, lower=lower, upper=upper)


class NoClone(KernelMounts):
    """A kernel that mounts, but makes no copies of mounts."""

    def clone(self, source: str, target: str, *, writable: bool) -> None:
        raise MountFailed("no copies of mounts")


class WholeRoot(KernelMounts):
    """Clones that show all there is in the overlay."""

    def clone(self, source: str, target: str, *, writable: bool) -> None:
        super().clone(source.removesuffix("/nix"), target, writable=writable)


class Leaking(KernelMounts):
    """Writable views whose directories are the store's own."""

    def clone(self, source: str, target: str, *, writable: bool) -> None:
        super().clone(source, target, writable=writable)
        if writable:
            (name,) = (name for name in os.listdir(f"{target}/store") if name.endswith("-directory"))
            run("mount", "--bind", f"{os.path.dirname(target)}/store/{name}", f"{target}/store/{name}")

    def unmount(self, target: str) -> None:
        for inner in reversed(mounts_below(Path(target))):
            if inner != target:
                run("umount", inner)
        super().unmount(target)


class WritableAnyway(KernelMounts):
    """Read-only overlays and clones that are not."""

    def overlay(self, target: str, *, source: str, lower: Sequence[str], upper: Upper | None) -> None:
        if upper is None:
            upper = Upper(f"{target}-upper", f"{target}-work")
            os.mkdir(upper.upper)
            os.mkdir(upper.work)
        super().overlay(target, source=source, lower=lower, upper=upper)

    def clone(self, source: str, target: str, *, writable: bool) -> None:
        super().clone(source, target, writable=True)


@pytest.mark.parametrize(
    ("mounts", "broken", "words", "reader", "writer"),
    [
        pytest.param(
            Options("redirect_dir=nofollow", "metacopy=off"),
            {*VIEW, *WRITABLE},
            {"listing": "lacks large, written"},
            Presentation.HARDLINK,
            Presentation.HARDLINK,
            id="redirects are not followed",
        ),
        pytest.param(
            Options("redirect_dir=on", "metacopy=off"),
            {"stub_content", "read_only", *WRITABLE},
            {"chmod_apart": "copies the file"},
            Presentation.HARDLINK,
            Presentation.HARDLINK,
            id="stubs of files are not followed",
        ),
        pytest.param(
            Options("redirect_dir=on", "metacopy=off", writable_only=True),
            {"chmod_apart", "write_apart"},
            {"chmod_apart": "copies the file"},
            Presentation.REDIRECT,
            Presentation.HARDLINK,
            id="a chmod copies the file",
        ),
        pytest.param(
            NoOverlay(),
            {*VIEW, *WRITABLE, *PLAIN, "store_layer"},
            {"listing": "no overlayfs", "overlay_writable": "no overlayfs"},
            Presentation.HARDLINK,
            None,
            id="there is no overlayfs",
        ),
        pytest.param(
            NoClone(),
            {*VIEW, *WRITABLE},
            {"listing": "no copies of mounts"},
            Presentation.HARDLINK,
            Presentation.HARDLINK,
            id="mounts cannot be copied",
        ),
        pytest.param(
            WholeRoot(),
            {*VIEW, *WRITABLE},
            {"listing": "also shows"},
            Presentation.HARDLINK,
            Presentation.HARDLINK,
            id="the view shows more than the closure",
        ),
        pytest.param(
            WritableAnyway(),
            {"read_only", "overlay_read_only"},
            {"read_only": "a new store path is not refused"},
            Presentation.HARDLINK,
            Presentation.HARDLINK,
            id="a read-only view takes writes",
        ),
        pytest.param(
            Leaking(),
            {*WRITABLE},
            {"chmod_apart": "a write reached the store", "write_apart": "a write reached the store"},
            Presentation.REDIRECT,
            Presentation.HARDLINK,
            id="writes reach the store",
        ),
    ],
)
def test_what_does_not_hold_is_found_said_and_avoided(
    scratch: Path,
    store: Path,
    mounts: Mounts,
    broken: set[str],
    words: dict[str, str],
    reader: Presentation,
    writer: Presentation | None,
) -> None:
    result = probe(scratch / "probe", store, mounts)
    assert failing(result) == broken
    for name, word in words.items():
        assert word in getattr(result, name).detail
    assert choose(result, Wish(writable=False)).presentation is reader
    assert writable_choice(result) is writer
    assert left(scratch) == []


def writable_choice(result: ProbeResult) -> Presentation | None:
    try:
        return choose(result, Wish(writable=True)).presentation
    except PresentationUnavailable:
        return None


def test_a_store_that_cannot_be_a_layer_is_found(scratch: Path, store: Path) -> None:
    result = probe(scratch / "probe", store, NoOverlay(of=str(store)))
    assert failing(result) == {"store_layer"}
    assert choose(result, Wish(writable=False)).presentation is Presentation.HARDLINK


def kernel_without(function: str) -> Callable[..., int]:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented", function)

    return refuse


@pytest.mark.parametrize(
    ("function", "broken"),
    [
        ("open_tree_at", {"detached_copy"}),
        ("idmap_mount", IDMAP),
        ("fsopen", {*VIEW, *WRITABLE, *PLAIN, "store_layer", "layer_options", "idmap_sized"}),
        ("open_tree", {*VIEW, *WRITABLE, *IDMAP, "detached_copy"}),
    ],
)
def test_a_system_call_that_is_missing_is_found(
    scratch: Path, store: Path, monkeypatch: pytest.MonkeyPatch, function: str, broken: set[str]
) -> None:
    monkeypatch.setattr(syscalls, function, kernel_without(function))
    result = probe(scratch / "probe", store, KernelMounts())
    assert failing(result) == broken
    for name in broken:
        assert "Function not implemented" in getattr(result, name).detail


def test_a_kernel_before_6_7_shows_views_all_the_same(
    scratch: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = syscalls.fsconfig_string

    def before_6_7(context: int, key: str, value: str) -> None:
        if key == "lowerdir+":
            raise OSError(errno.EINVAL, "Invalid argument", key)
        real(context, key, value)

    monkeypatch.setattr(syscalls, "fsconfig_string", before_6_7)
    assert failing(probe(scratch / "probe", store, KernelMounts())) == {"layer_options"}


def test_missing_loop_devices_are_found(scratch: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_image: int, *, name: str, scratch: str) -> AbstractContextManager[str]:
        raise OSError(errno.ENODEV, "No such device", "/dev/loop-control")

    monkeypatch.setattr(loop, "attached", nothing)
    result = probe(scratch / "probe", store, KernelMounts())
    assert failing(result) == {"loop", "idmap_sized"}
    assert result.loop.detail == "No such device (/dev/loop-control)"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'Operation not permitted' >&2; exit 1", "no user namespace: Operation not permitted"),
        ("exec sleep 60", "no user namespace within"),
    ],
)
def test_a_node_without_user_namespaces_is_found(
    scratch: Path, store: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    python = scratch / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(probe_module, "_NAMESPACE_DEADLINE", 0.5)
    result = probe(scratch / "probe", store, KernelMounts())
    assert failing(result) == IDMAP
    assert words in result.idmap.detail


def test_a_file_system_without_trusted_attributes_has_no_views(
    scratch: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    result = probe(scratch / "probe", store, KernelMounts())
    assert failing(result) == {*VIEW, *WRITABLE}
    assert "Operation not supported" in result.listing.detail


# However it ends


class Interrupted(BaseException):
    """Such as KeyboardInterrupt."""


def test_a_probe_that_is_interrupted_in_any_mount_leaves_nothing(scratch: Path, store: Path) -> None:
    steps = Stepped(lambda _number, _name: None)
    probe(scratch / "probe", store, SteppedMounts(steps))
    assert steps.calls.count("overlay") == 5
    mounting = [number for number, name in enumerate(steps.calls, 1) if name in {"overlay", "clone"}]
    for step in mounting:

        def interrupt(number: int, _: str, step: int = step) -> None:
            if number == step:
                raise Interrupted

        for before, after in ((interrupt, nothing), (nothing, interrupt)):
            with pytest.raises(Interrupted):
                probe(scratch / "probe", store, SteppedMounts(Stepped(before, after)))
            assert left(scratch) == []


def nothing(_number: int, _name: str) -> None:
    pass


KILLED = """
import os, signal, sys
from pathlib import Path
from cknix_csi.volumes.probe import probe
from tests.kernel.steps import Stepped, SteppedMounts

def die(number, name):
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

probe(Path(sys.argv[1]), Path(sys.argv[2]), SteppedMounts(Stepped(lambda number, name: None, die)))
"""


def test_what_a_killed_probe_left_is_removed_by_the_next(scratch: Path, store: Path) -> None:
    steps = Stepped(nothing)
    probe(scratch / "probe", store, SteppedMounts(steps))
    for step in (number for number, name in enumerate(steps.calls, 1) if name in {"overlay", "clone"}):
        command = (sys.executable, "-c", KILLED, str(scratch / "probe"), str(store), str(step))
        killed = subprocess.run(command, cwd=REPOSITORY, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert mounts_below(scratch)
        assert failing(probe(scratch / "probe", store, KernelMounts())) == set()
        assert left(scratch) == []


def test_two_probes_in_one_directory_do_not_disturb_each_other(scratch: Path, store: Path) -> None:
    (scratch / "probe").mkdir()
    other = ProcessLock(str(scratch / "probe"))
    assert other.take()
    with pytest.raises(DataRootTaken, match="another probe"):
        probe(scratch / "probe", store, KernelMounts())
    other.release()
    assert failing(probe(scratch / "probe", store, KernelMounts())) == set()
