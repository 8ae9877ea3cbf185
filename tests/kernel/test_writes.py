"""What can be written where."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.node import Node, metadata, run

WRITES: dict[str, Callable[[Path, Path], object]] = {
    "open for writing": lambda file, _: os.open(file, os.O_WRONLY),
    "open for appending": lambda file, _: os.open(file, os.O_WRONLY | os.O_APPEND),
    "truncate": lambda file, _: os.truncate(file, 0),
    "create": lambda _, directory: os.open(directory / "new", os.O_CREAT | os.O_WRONLY),
    "mkdir": lambda _, directory: os.mkdir(directory / "new"),
    "mknod": lambda _, directory: os.mknod(directory / "new"),
    "symlink": lambda _, directory: os.symlink("x", directory / "new"),
    "link": lambda file, directory: os.link(file, directory / "new"),
    "rename": lambda file, directory: os.rename(file, directory / "new"),
    "unlink": lambda file, _: os.unlink(file),
    "rmdir": lambda _, directory: os.rmdir(directory),
    "chmod": lambda file, _: os.chmod(file, 0o777),
    "chown": lambda file, _: os.chown(file, 1, 1),
    "utime": lambda file, _: os.utime(file),
    "setxattr": lambda file, _: os.setxattr(file, "trusted.x", b"y"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_a_read_only_volume_refuses_to(node: Node, write: Callable[[Path, Path], object]) -> None:
    volume = await node.publish(node.shapes)
    root = volume / "store" / node.shapes.basename
    for file, directory in (
        (root / "bin/hello", root / "bin"),
        (volume / "var/nix/db/db.sqlite", volume / "var/nix/db"),
    ):
        with pytest.raises(OSError) as refused:
            write(file, directory)
        assert refused.value.errno == errno.EROFS


async def test_a_read_only_volume_refuses_new_store_paths_and_stubs_too(node: Node) -> None:
    volume = await node.publish(node.shapes)
    script = next(path for path in (volume / "store").iterdir() if path.name.endswith("run.sh"))
    for write in WRITES["mkdir"], WRITES["chmod"], WRITES["unlink"], WRITES["open for writing"]:
        with pytest.raises(OSError) as refused:
            write(script, volume / "store")
        assert refused.value.errno == errno.EROFS


@pytest.mark.parametrize("options", ["remount,rw", "remount,bind,rw"])
async def test_a_privileged_remount_does_not_make_a_read_only_volume_writable(node: Node, options: str) -> None:
    before = metadata(node.store.store_dir, content=True)
    volume = await node.publish(node.shapes)
    run("mount", "-o", options, volume, check=False)
    for path in (volume / "store" / node.shapes.basename / "bin/hello", volume / "var/nix/db/db.sqlite"):
        with pytest.raises(OSError) as refused:
            path.open("w")
        assert refused.value.errno == errno.EROFS
    assert metadata(node.store.store_dir, content=True) == before


async def test_a_writable_volume_keeps_every_write_to_itself(node: Node) -> None:
    before = metadata(node.store.store_dir, content=True)
    read_only = await node.publish(node.shapes)
    other = await node.publish(node.shapes, "other", writable=True)
    expected = metadata(other, content=True)
    assert metadata(read_only, content=True) == expected

    volume = await node.publish(node.shapes, "mine", writable=True)
    (volume / "store/00000000000000000000000000000000-new").mkdir()
    (volume / "store/00000000000000000000000000000000-new/file").write_text("made in the pod")
    (volume / "anywhere").write_text("under /nix")
    (volume / "var/nix/db/db.sqlite").write_text("rewritten")
    for path in sorted((volume / "store").iterdir()):
        os.chown(path, 1234, 1234, follow_symlinks=False)
        os.utime(path, follow_symlinks=False)
    for directory, _, files in os.walk(volume / "store"):
        os.chmod(directory, 0o777)
        for file in (os.path.join(directory, name) for name in files):
            if not os.path.islink(file):
                os.chmod(file, 0o666)
                with open(file, "r+b") as opened:
                    opened.write(b"XXXX")
    run("rm", "--recursive", volume / "store" / node.shapes.basename)
    run("mv", next((volume / "store").glob("*-library-1.0")), volume / "store/moved")

    assert metadata(node.store.store_dir, content=True) == before
    assert metadata(read_only, content=True) == expected
    assert metadata(other, content=True) == expected
    assert (volume / "store/moved/lib/big").read_bytes()[:4] == b"XXXX"


async def test_chmod_of_a_big_file_writes_its_metadata_only(node: Node) -> None:
    volume = await node.publish(node.shapes, writable=True)
    big = next((volume / "store").glob("*-library-1.0")) / "lib/big"
    os.chmod(big, 0o755)
    upper = next((node.data / "volumes").glob("*/*/upper"))
    copied = next(upper.glob("nix/store/*/lib/big"))
    assert copied.stat().st_size == 3 << 20
    assert copied.stat().st_blocks * 512 <= 4096
    assert big.stat().st_mode & 0o777 == 0o755
    assert big.read_bytes() == next(node.store.store_dir.glob("*-library-1.0/lib/big")).read_bytes()


async def test_what_was_written_is_gone_when_the_volume_is_published_again(node: Node) -> None:
    volume = await node.publish(node.shapes, writable=True)
    (volume / "store/mine").mkdir()
    await node.unpublish()
    await node.publish(node.shapes, writable=True)
    assert not (volume / "store/mine").exists()


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
async def test_what_a_pod_mounts_inside_its_volume_appears_in_no_other(node: Node, writable: bool) -> None:
    run("mount", "--bind", node.scratch, node.scratch)
    run("mount", "--make-shared", node.scratch)
    mine = await node.publish(node.shapes, "mine", writable=writable)
    other = await node.publish(node.shapes, "other", writable=writable)
    run("mount", "-t", "tmpfs", "cknix-test", mine / "store/.links")
    (mine / "store/.links/here").touch()
    assert os.listdir(other / "store/.links") == []
    assert [str(mine / "store/.links")] == run("findmnt", "-rno", "TARGET", "-S", "cknix-test").split()
    run("umount", mine / "store/.links")
