"""What a pod that means harm tries from inside its volume, as root with all capabilities in its own mount namespace.

What a privileged pod can do to its node without any volume is not ours; what it can do by way of the volume is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.errors import CknixError
from cknix_csi.volumes.mounts import KernelMounts
from tests.kernel.conftest import CLONE_NEWNS, MS_REC_PRIVATE
from tests.kernel.kinds import KINDS, require_same
from tests.kernel.node import Node, metadata, mount_ids, mounts_below, require_shows, run
from tests.kernel.steps import Stepped, SteppedMounts
from tests.kernel.store import fill_small

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER = 0x10000000
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
AT_HANDLE_FID = 0x200
MOUNT_ATTR_RDONLY = 1
NR_FSCONFIG, NR_FSPICK, NR_MOUNT_SETATTR = 431, 433, 442
FSPICK_NO_AUTOMOUNT, FSCONFIG_SET_FLAG, FSCONFIG_CMD_RECONFIGURE = 4, 0, 7
FIFREEZE, FITHAW, EXT4_IOC_SHUTDOWN = 0xC0045877, 0xC0045878, 0x8004587D

OVERLAYS = {name: KINDS[name] for name in ("view", "farm")}
"""Read-only volumes of pods that may be privileged."""
overlays = pytest.mark.parametrize("arguments", OVERLAYS.values(), ids=OVERLAYS.keys())
writables = pytest.mark.parametrize(
    "arguments", [KINDS["writable view"], KINDS["writable farm"]], ids=["writable view", "writable farm"]
)


def call(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def answer(attempt: Callable[[], object]) -> str:
    """What the kernel answers: the name of an error, or "done"."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0].replace("ENOTSUP", "EOPNOTSUPP")  # one number, two names
    return "done"


def in_pod(work: Callable[[], object], *namespaces: int) -> str:
    """What *work* comes to in a process with a mount namespace (and those) of its own; "" when it returns nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"broken"
        try:
            call(LIBC.unshare(CLONE_NEWNS | sum(namespaces)))
            call(LIBC.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None))
            said = str(work() or "").encode()
        except BaseException as error:
            said = repr(error).encode()
        os.write(writing, said)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said.decode()


# Remounts


def set_attributes(volume: Path) -> None:
    """mount_setattr(2): not read-only any more, this mount and all below it."""
    cleared = (ctypes.c_uint64 * 4)(0, MOUNT_ATTR_RDONLY, 0, 0)
    call(LIBC.syscall(NR_MOUNT_SETATTR, AT_FDCWD, os.fsencode(volume), AT_RECURSIVE, cleared, ctypes.sizeof(cleared)))


def reconfigure(volume: Path) -> None:
    """fspick(2): the file system itself, not the mount."""
    context = call(LIBC.syscall(NR_FSPICK, AT_FDCWD, os.fsencode(volume), FSPICK_NO_AUTOMOUNT))
    try:
        call(LIBC.syscall(NR_FSCONFIG, context, FSCONFIG_SET_FLAG, b"rw", None, 0))
        call(LIBC.syscall(NR_FSCONFIG, context, FSCONFIG_CMD_RECONFIGURE, None, None, 0))
    finally:
        os.close(context)


def mount_option(*options: str) -> Callable[[Path], object]:
    return lambda volume: [run("mount", "-o", option, volume, check=False) for option in options]


def bind_elsewhere(volume: Path) -> None:
    """A mount of its own of the same directory, and that made writable."""
    other = volume.parent / "elsewhere"
    other.mkdir()
    run("mount", "--bind", volume, other)
    run("mount", "-o", "remount,bind,rw", other, check=False)


REMOUNTS: dict[str, Callable[[Path], object]] = {
    "remount,rw": mount_option("remount,rw"),
    "remount,bind,rw": mount_option("remount,bind,rw"),
    "both": mount_option("remount,bind,rw", "remount,rw"),
    "mount_setattr": set_attributes,
    "fspick": reconfigure,
    "bind elsewhere": bind_elsewhere,
}


@overlays
@pytest.mark.parametrize("remount", REMOUNTS.values(), ids=REMOUNTS.keys())
async def test_no_remount_makes_a_read_only_volume_writable(
    node: Node, arguments: dict[str, Any], remount: Callable[[Path], object]
) -> None:
    before = metadata(node.store.store_dir / node.small.basename, content=True)
    volume, other = await node.publish(node.small, **arguments), await node.publish(node.small, "other", **arguments)

    def attack() -> str:
        answer(lambda: remount(volume))
        places = (volume, volume.parent / "elsewhere")
        files = [place / "store" / node.small.basename / "bin/hello" for place in places]
        return " ".join(answer(lambda: os.truncate(file, 0)) for file in files if file.exists())  # noqa: B023

    assert set(in_pod(attack).split()) == {"EROFS"}
    assert answer(lambda: os.truncate(other / "store" / node.small.basename / "bin/hello", 0)) == "EROFS"
    assert metadata(node.store.store_dir / node.small.basename, content=True) == before
    if (node.pods / "elsewhere").exists():
        (node.pods / "elsewhere").rmdir()
    for name in ("a", "other"):
        await node.unpublish(name)
    assert await node.left() == []


# Handles


class Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("handle", ctypes.c_ubyte * 128))


def handle_of(path: Path, flags: int = 0) -> Handle:
    """What open_by_handle_at(2) opens *path* by: an inode's number and generation, which can also be guessed."""
    found = Handle(bytes=128)
    call(LIBC.name_to_handle_at(AT_FDCWD, os.fsencode(path), ctypes.byref(found), ctypes.byref(ctypes.c_int()), flags))
    return found


def open_by_handle(volume: Path, handle: Handle) -> int:
    directory = os.open(volume, os.O_RDONLY)
    return call(LIBC.open_by_handle_at(directory, ctypes.byref(handle), os.O_RDONLY))


async def test_the_handle_of_a_foreign_store_path_opens_it_where_one_may(node: Node) -> None:
    """So that the refusals of the next tests are refusals of what works."""
    secret = next(node.store.store_dir.glob("*-secret-of-somebody-else")) / "bin/hello"
    opened = open_by_handle(node.store.store_dir, handle_of(secret))
    assert os.read(opened, 100) == b"secret-of-somebody-else"
    os.close(opened)


@pytest.mark.parametrize("kind", ["view", "farm", "writable view", "writable farm"])
async def test_no_handle_opens_what_is_not_in_the_closure(node: Node, kind: str) -> None:
    volume = await node.publish(node.small, **KINDS[kind])
    secret = next(node.store.store_dir.glob("*-secret-of-somebody-else"))
    for path in (secret, secret / "bin/hello", node.store.store_dir):
        handle = handle_of(path)
        for place in (volume, volume / "store" / node.small.basename / "bin/hello"):
            said = in_pod(lambda: answer(lambda: open_by_handle(place, handle)))  # noqa: B023
            assert said == "ESTALE", (path, place)


async def test_no_handle_leads_from_a_volume_to_the_rest_of_its_overlay(node: Node) -> None:
    """Above the directory that pods see, the overlay of a view lists the whole store."""
    volume = await node.publish(node.small)
    overlay = node.data / "views" / node.small.basename / "m"
    secret = next(path for path in overlay.iterdir() if path.name.endswith("-secret-of-somebody-else"))
    for path in (secret, secret / "bin/hello", overlay):
        handle = handle_of(path, AT_HANDLE_FID)
        assert in_pod(lambda: answer(lambda: open_by_handle(volume, handle))) == "ESTALE", path  # noqa: B023
    assert in_pod(lambda: answer(lambda: os.listdir(volume / "../.." / secret.name))) == "ENOENT"


@pytest.mark.parametrize("kind", ["farm without overlay", "copy"])
async def test_no_handle_opens_anything_for_a_pod_of_a_user_namespace(node: Node, kind: str) -> None:
    """These show a directory of the node's own disk, and only such pods get them unasked."""
    volume = await node.publish(node.small, **(KINDS[kind] | {"host_users": False}))
    handle = handle_of(next(node.store.store_dir.glob("*-secret-of-somebody-else")) / "bin/hello")
    assert in_pod(lambda: answer(lambda: open_by_handle(volume, handle)), CLONE_NEWUSER) in {"EPERM", "ESTALE"}


# What overlayfs keeps for itself


@writables
async def test_forged_attributes_of_overlayfs_reach_nothing(node: Node, arguments: dict[str, Any]) -> None:
    secret = next(node.store.store_dir.glob("*-secret-of-somebody-else"))
    volume = await node.publish(node.small, **arguments)

    def attack() -> str:
        (volume / "store/stolen").mkdir()
        (volume / "store/stolen-file").touch()
        os.truncate(volume / "store/stolen-file", 100)
        (volume / "store" / node.small.basename / "stolen").mkdir()
        answers = {
            answer(lambda: os.setxattr(at, f"trusted.overlay.{name}", value))  # noqa: B023
            for name, value in (("redirect", f"/{secret.name}".encode()), ("metacopy", b""), ("origin", b"\0" * 20))
            for at in (volume / "store/stolen", volume / "store" / node.small.basename / "stolen")
        }
        for name, value in (("redirect", f"/{secret.name}/bin/hello".encode()), ("metacopy", b"")):
            answers.add(answer(lambda: os.setxattr(volume / "store/stolen-file", f"trusted.overlay.{name}", value)))  # noqa: B023
        return " ".join(sorted(answers))

    assert set(in_pod(attack).split()) <= {"done", "EPERM", "EOPNOTSUPP"}
    upper = next((node.data / "volumes").glob("*/*/upper"))
    assert [name for name in os.listxattr(upper / "nix/store/stolen") if name == "trusted.overlay.redirect"] == []
    # A fresh look, which reads all attributes again: the kernel remembers what it has read for a mounted overlay.
    layers = run("findmnt", "--noheadings", "--output", "FS-OPTIONS", "--mountpoint", volume).split(",")
    lower = [layer.partition("=")[2] for layer in layers if layer.startswith("lowerdir")]
    fresh = node.scratch / "fresh"
    fresh.mkdir()
    if arguments == KINDS["writable view"]:  # what the forgery would do if it were one
        os.mkdir(upper / "nix/store/real")
        os.setxattr(upper / "nix/store/real", "trusted.overlay.redirect", f"/{secret.name}".encode())
    KernelMounts().overlay(str(fresh), source="cknix-test", lower=[str(upper), *lower], upper=None)
    for place in (volume / "store", fresh / "nix/store"):
        assert os.listdir(place / "stolen") == []
        assert os.listdir(place / node.small.basename / "stolen") == []
        assert (place / "stolen-file").read_bytes() == b"\0" * 100
        assert not os.path.lexists(place / secret.name)
    if arguments == KINDS["writable view"]:
        assert (fresh / "nix/store/real/bin/hello").read_text() == "secret-of-somebody-else"
    run("umount", fresh)


@writables
async def test_whiteouts_and_devices_made_by_hand_do_nothing(node: Node, arguments: dict[str, Any]) -> None:
    volume = await node.publish(node.small, **arguments)
    other = await node.publish(node.small, "other", **arguments)
    disk = os.stat(node.scratch).st_dev

    def attack() -> str:
        os.mknod(volume / "store/disk", stat.S_IFBLK | 0o666, disk)
        answers = [answer(lambda: os.open(volume / "store/disk", os.O_RDONLY))]
        answers.append(answer(lambda: os.mknod(volume / "store/whiteout", stat.S_IFCHR | 0o666, 0)))
        return " ".join(answers)

    assert in_pod(attack).split() == ["EACCES", "EPERM"]
    require_shows(other, node.store, [node.small])


# The file system below


@pytest.mark.parametrize("kind", ["view", "farm", "writable view", "writable farm"])
async def test_a_volume_is_no_handle_on_the_file_system_of_the_node(scratch: Path, kind: str) -> None:
    """Nobody can freeze it or shut it down by a descriptor of what the volume shows."""
    disk = scratch / "disk"
    disk.mkdir()
    run("truncate", "--size", "40M", scratch / "disk.img")
    run("mkfs.ext4", "-q", scratch / "disk.img")
    run("mount", "-o", "loop", scratch / "disk.img", disk)
    node = Node(disk)
    root = fill_small(node.store, "small-1.0")
    volume = await node.publish(root, **KINDS[kind])

    def attack() -> str:
        answers = set()
        for path in (volume, volume / "store", volume / "store" / root.basename / "bin/hello"):
            opened = os.open(path, os.O_RDONLY)
            answers.add(answer(lambda: fcntl.ioctl(opened, FIFREEZE, 0)))  # noqa: B023
            answer(lambda: fcntl.ioctl(opened, FITHAW, 0))  # noqa: B023
            answers.add(answer(lambda: fcntl.ioctl(opened, EXT4_IOC_SHUTDOWN, b"\2\0\0\0")))  # noqa: B023
        return " ".join(sorted(answers))

    assert set(in_pod(attack).split()) <= {"EOPNOTSUPP", "ENOTTY", "EPERM"}
    (disk / "still").write_text("works")
    await node.unpublish()
    assert await node.left() == [f"mount {disk}"]
    run("umount", disk)


# The target


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS.keys())
async def test_a_link_that_is_planted_in_the_last_moment_is_not_followed(node: Node, arguments: dict[str, Any]) -> None:
    elsewhere = node.scratch / "elsewhere"
    elsewhere.mkdir()
    target = node.pods / "a"

    def plant(_: int, name: str) -> None:
        if name == "clone" and not target.is_symlink():
            target.rmdir()
            target.symlink_to(elsewhere)

    await node.restart(mounts=SteppedMounts(Stepped(plant)))
    with pytest.raises(CknixError):
        await node.publish(node.small, **arguments)
    assert mount_ids(elsewhere) == []
    assert os.readlink(target) == str(elsewhere)
    target.unlink()
    await node.restart()
    await node.publish(node.small, **arguments)
    await node.unpublish()
    elsewhere.rmdir()
    assert await node.left() == []


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS.keys())
async def test_a_pod_that_unmounts_its_volume_in_its_namespace_takes_it_from_itself_alone(
    node: Node, arguments: dict[str, Any]
) -> None:
    volume, other = await node.publish(node.small, **arguments), await node.publish(node.small, "other", **arguments)
    before = mount_ids(volume)

    def attack() -> str:
        run("umount", volume)
        return " ".join(os.listdir(volume)) or "empty"

    assert in_pod(attack) == "empty"
    assert mount_ids(volume) == before
    closure = await node.store.query(node.small)
    for shown in (volume, other):
        require_shows(shown, node.store, [info.path for info in closure.paths])
    for name in ("a", "other"):
        await node.unpublish(name)
    assert await node.left() == []


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS.keys())
async def test_a_volume_that_a_pod_unmounted_on_the_node_too_is_mounted_again_or_released(
    node: Node, arguments: dict[str, Any]
) -> None:
    """``mountPropagation: Bidirectional`` takes the unmount out of the pod."""
    other = await node.publish(node.small, "other", **arguments)
    for again in (True, False):
        run("umount", await node.publish(node.small, **arguments))
        if again:
            require_shows(await node.publish(node.small, **arguments), node.store, [node.small])
        await node.unpublish()
        assert os.listdir(node.pods) == ["other"]
        require_shows(other, node.store, [node.small])
    await node.unpublish("other")
    assert await node.left() == []


async def test_a_pod_that_covers_its_volume_with_another_ones_gets_no_more_by_it(node: Node) -> None:
    """A bind over the target, from a pod whose mounts the node sees: the target's stack goes, the other stays."""
    other = await node.publish(node.shapes, "other")
    target = await node.publish(node.small, writable=True)
    run("mount", "--bind", other, target)
    with pytest.raises(CknixError):
        await node.publish(node.small, writable=True)
    await node.unpublish()
    assert mounts_below(target) == []
    closure = await node.store.query(node.shapes)
    require_same(other, node.store.store_dir, closure)
    await node.unpublish("other")
    assert await node.left() == []


# A process that stays


@pytest.mark.parametrize("kind", ["view", "writable view", "farm", "writable farm"])
async def test_a_process_that_kept_a_descriptor_of_its_volume_reaches_nothing_later(node: Node, kind: str) -> None:
    """It hides from kubelet, and waits for what comes into the volume's place."""
    volume = await node.publish(node.small, **KINDS[kind])
    kept = os.open(volume / "store", os.O_PATH)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    os.close(kept)
    try:
        with pytest.raises(CknixError, match="something still uses it"):
            await node.unpublish()
        require_shows(volume, node.store, [node.small])  # whole, until it is free
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    await node.unpublish()
    assert await node.left() == []
