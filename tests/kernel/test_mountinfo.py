"""The mount table, against the kernel and against its documentation."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cknix_csi.volumes.mountinfo import MountTable, MountTableUnreadable, escape, parse_line, read_mount_table, unescape
from tests.cluster.harness.scratch import scratch_base
from tests.kernel.node import run

file_names = st.binary(min_size=1, max_size=60).filter(lambda name: b"/" not in name and b"\0" not in name)
texts = st.binary(max_size=60).filter(lambda text: b"\0" not in text).map(os.fsdecode)
words = st.text("abz09:=_-", min_size=1, max_size=12)

LINE = b"36 35 98:0 /mnt1 /mnt2 rw,noatime shared:1 master:2 - overlay "
LINE += rb"cknix:x\040y rw,upperdir=/a\054b,lowerdir+=/c,volatile"


@given(texts)
def test_unescaping_undoes_what_the_kernel_escapes(text: str) -> None:
    escaped = escape(text)
    assert not set(b" \t\n") & set(escaped)
    assert unescape(escaped) == text


@given(st.lists(words, max_size=3), texts, texts)
def test_a_line_is_parsed_whatever_its_optional_fields_and_names(optional: list[str], target: str, source: str) -> None:
    tags = "".join(f"{word} " for word in optional if word != "-").encode()
    line = b"1 2 0:3 /r " + escape(target) + b" ro,nosuid " + tags + b"- tmpfs " + escape(source) + b" rw"
    mount = parse_line(line)
    assert (mount.target, mount.source) == (target, source)
    assert mount.options == ("ro", "nosuid")
    assert " ".join(mount.propagation).encode() == tags.strip()


def test_the_example_of_the_manual_page_is_understood() -> None:
    mount = parse_line(LINE)
    assert (mount.id, mount.parent, mount.root, mount.target) == (36, 35, "/mnt1", "/mnt2")
    assert mount.propagation == ("shared:1", "master:2")
    assert (mount.fstype, mount.source) == ("overlay", "cknix:x y")
    assert mount.super_option("upperdir") == "/a,b"
    assert mount.super_option("lowerdir+") == "/c"
    assert mount.super_option("workdir") is None


@pytest.mark.parametrize("raw", [b"", b"36 35 98:0 / / rw - ext4 /dev/sda", b"nonsense\n", LINE[:40] + b"\n"])
def test_a_table_that_is_not_whole_is_unreadable_rather_than_empty(raw: bytes) -> None:
    with pytest.raises(MountTableUnreadable):
        list(MountTable(raw).all())


def test_a_table_that_cannot_be_opened_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(MountTableUnreadable, match="nothing is touched"):
        read_mount_table(tmp_path / "none")


def test_stacked_mounts_are_named_from_the_bottom_up_in_whatever_order_the_kernel_lists_them() -> None:
    lines = {name: b"%d %d 0:1 / /t rw - tmpfs %s rw\n" % ids for name, ids in STACK.items()}
    for order in (("low", "mid", "top"), ("top", "mid", "low"), ("mid", "top", "low")):
        table = MountTable(b"".join(lines[name] for name in order))
        assert [mount.source for mount in table.at("/t")] == ["low", "mid", "top"]


STACK = {"low": (5, 1, b"low"), "mid": (9, 5, b"mid"), "top": (7, 9, b"top")}


def test_a_source_that_looks_like_a_path_is_not_taken_for_a_target() -> None:
    table = MountTable(b"5 1 0:1 /t /u rw - tmpfs /t rw,x=/t\n")
    assert table.at("/t") == []
    assert [mount.target for mount in table.sourced("/t")] == ["/u"]
    assert [mount.target for mount in table.sourced_like("/")] == ["/u"]
    assert list(table.sourced_like("/u")) == []


def test_using_is_by_path_component_root_and_layer() -> None:
    lines = {
        b"on": b"/ /d/volumes/v rw - tmpfs on rw",
        b"below": b"/ /d/volumes/v/m rw - tmpfs below rw",
        b"bind": b"/other/volumes/v/upper /x rw - ext4 bind rw",
        b"layer": b"/nix /y rw - overlay layer rw,upperdir=/d/volumes/v/upper",
        b"beside": b"/ /d/volumes/vv rw - tmpfs beside rw",
        b"elsewhere": b"/ /e/volumes/v rw - tmpfs elsewhere rw",
    }
    table = MountTable(b"".join(b"5 1 0:1 " + line + b"\n" for line in lines.values()))
    assert [mount.source for mount in table.using("/d/volumes/v", "/volumes/v")] == ["on", "below", "bind", "layer"]


@given(name=file_names)
@settings(max_examples=40, deadline=None)
def test_a_mount_is_found_by_any_name_the_kernel_allows(name: bytes) -> None:
    if name in {b".", b".."}:
        return
    with tempfile.TemporaryDirectory(prefix="cknix-kernel-", dir=scratch_base()) as directory:
        target = os.fsdecode(os.path.join(os.fsencode(directory), name))
        os.mkdir(target)
        run("mount", "-t", "tmpfs", "cknix-test", target)
        try:
            table = read_mount_table()
            assert [mount.fstype for mount in table.at(target)] == ["tmpfs"]
            assert target in [mount.target for mount in table.all()]
        finally:
            run("umount", target)
