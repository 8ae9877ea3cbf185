"""What a volume shows."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from cknix_csi.api.errors import Invalid
from cknix_csi.volumes import syscalls
from cknix_csi.volumes.failures import StoreDamaged
from cknix_csi.volumes.volumes import Volumes
from tests.kernel.node import Node, metadata, require_shows, run


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
async def test_a_volume_equals_the_store_and_lists_its_own_closure_only(node: Node, writable: bool) -> None:
    volume = await node.publish(node.shapes, writable=writable)
    closure = await node.store.query(node.shapes)
    require_shows(volume, node.store, [info.path for info in closure.paths])


async def test_a_store_path_outside_the_closure_cannot_be_reached_by_its_name(node: Node) -> None:
    volume = await node.publish(node.shapes)
    for name in os.listdir(node.store.store_dir):
        inside = any(name == info.path.basename for info in (await node.store.query(node.shapes)).paths)
        assert os.path.lexists(volume / "store" / name) == inside


async def test_the_volume_is_laid_out_as_a_nix_client_expects(node: Node) -> None:
    volume = await node.publish(node.shapes)
    assert sorted(os.listdir(volume)) == ["store", "var"]
    assert os.readlink(volume / "var/result") == str(node.shapes)
    assert os.readlink(volume / "var/nix/gcroots/result") == str(node.shapes)
    assert os.readlink(volume / "var/nix/gcroots/profiles") == "/nix/var/nix/profiles"
    assert sorted(os.listdir(volume / "var/nix")) == ["db", "gcroots", "profiles", "temproots"]
    closure = await node.store.query(node.shapes)
    assert (volume / "var/nix/db/db.sqlite").read_text() == "".join(f"{info.path}\n" for info in closure.paths)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
async def test_a_view_is_the_same_under_any_umask_and_whenever_it_is_built(node: Node, umask: int) -> None:
    await node.publish(node.shapes)
    expected = metadata(node.data / "views" / node.shapes.basename / "meta", content=True)
    await node.unpublish()
    before = os.umask(umask)
    try:
        await node.publish(node.shapes)
    finally:
        os.umask(before)
    assert metadata(node.data / "views" / node.shapes.basename / "meta", content=True) == expected


async def test_a_view_is_the_same_where_directories_inherit_an_acl(node: Node) -> None:
    await node.publish(node.shapes)
    expected = metadata(node.data / "views" / node.shapes.basename / "meta", content=True)
    await node.unpublish()
    # What acl(5) calls a default ACL, as linux/posix_acl_xattr.h has it: rwx for the owner, nothing for anyone else.
    entries = ((0x01, 7), (0x04, 0), (0x20, 0))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, rights, 0xFFFFFFFF) for tag, rights in entries)
    os.setxattr(node.data / "views", "system.posix_acl_default", acl)
    await node.publish(node.shapes)
    assert metadata(node.data / "views" / node.shapes.basename / "meta", content=True) == expected


async def test_reading_reaches_the_stores_own_inodes(node: Node) -> None:
    read_only = await node.publish(node.shapes)
    writable = await node.publish(node.shapes, "b", writable=True)
    library = next(path for path in os.listdir(read_only / "store") if path.endswith("library-1.0"))
    original = (node.store.store_dir / library / "lib/big").stat().st_ino
    assert (read_only / "store" / library / "lib/big").stat().st_ino == original
    assert (writable / "store" / library / "lib/big").stat().st_ino == original


async def test_nobody_else_can_walk_to_the_overlay_that_lists_the_whole_store(node: Node) -> None:
    await node.publish(node.shapes)
    assert (node.data / "views").stat().st_mode & 0o077 == 0
    volume = node.pods / "a"
    assert run("findmnt", "--noheadings", "--output", "FSROOT", "--mountpoint", volume).strip() == "/nix"


async def test_the_mount_is_nosuid_and_nodev(node: Node) -> None:
    for name, writable in (("a", False), ("b", True)):
        volume = await node.publish(node.shapes, name, writable=writable)
        options = run("findmnt", "--noheadings", "--output", "VFS-OPTIONS", "--mountpoint", volume).strip().split(",")
        assert {"nosuid", "nodev", "rw" if writable else "ro"} <= set(options)


async def test_a_registered_path_that_is_gone_from_the_store_is_reported_by_name(node: Node) -> None:
    path, _ = node.store.add("never-made")
    root = node.store.add("needs-it", [path])[0]
    (node.store.store_dir / root.basename).mkdir()
    with pytest.raises(StoreDamaged, match=rf"{path}.*repair"):
        await node.publish(root)
    assert await node.left() == []


async def test_the_options_of_older_kernels_make_the_same_volume(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    real = syscalls.fsconfig_string

    def before_6_7(context: int, key: str, value: str) -> None:
        if key == "lowerdir+":
            raise OSError(22, "Invalid argument", key)
        real(context, key, value)

    monkeypatch.setattr(syscalls, "fsconfig_string", before_6_7)
    closure = await node.store.query(node.shapes)
    for name, writable in (("a", False), ("b", True)):
        volume = await node.publish(node.shapes, name, writable=writable)
        require_shows(volume, node.store, [info.path for info in closure.paths])
        await node.unpublish(name)
    assert await node.left() == []


async def test_a_closure_with_the_longest_name_is_a_volume_like_any_other(node: Node) -> None:
    path, at = node.store.add("y" * 211)
    at.mkdir()
    for name, writable in (("a", False), ("b", True)):
        volume = await node.publish(path, name, writable=writable)
        require_shows(volume, node.store, [path])
        published = node.volumes.published(volume)
        assert published is not None
        assert (published.closure_id, published.writable) == (path.basename, writable)
    await node.unpublish("a")
    await node.unpublish("b")
    assert await node.left() == []


@pytest.mark.parametrize("name", ["with space", "comma,", "colon:", "back\\slash", "l" * 129])
def test_a_data_root_that_cannot_stand_in_mount_options_is_refused(node: Node, name: str) -> None:
    with pytest.raises(Invalid, match="data root"):
        Volumes(Path("/") / name, node.store)
