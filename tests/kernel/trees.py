"""Random store objects, and independent eyes on trees of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import strategies as st

from cknix_csi.api.closure import Closure
from cknix_csi.api.storepath import StorePath
from tests.kernel.node import metadata, run
from tests.kernel.store import FakeStore, seal


@dataclass(frozen=True)
class File:
    """A regular file: *data* after *hole* bytes of nothing, and *tail* bytes of nothing after it."""

    data: bytes
    hole: int = 0
    tail: int = 0
    executable: bool = False


@dataclass(frozen=True)
class Again:
    """A further name of an earlier file of the same store path, as an optimised store has them."""

    which: int


@dataclass(frozen=True)
class Link:
    target: bytes


Entry = File | Again | Link | dict[bytes, "Entry"]

_odd_names = st.sampled_from(
    [
        b" ",
        b"a b",
        b"'",
        b'"',
        b"\n",
        b"a\nb",
        b"\\",
        b"\xff\xfe",
        b"\xc3\x28",
        b"-rf",
        b"~",
        b"*",
        b"\t",
        b"x" * 255,
        b"#",
    ]
)
_any_names = st.binary(min_size=1, max_size=20).filter(
    lambda name: not {0, 47} & set(name) and name not in {b".", b".."}
)
names = st.one_of(_odd_names, _any_names)
files = st.builds(
    File,
    data=st.binary(max_size=200) | st.just(b"z" * 7_000),
    hole=st.sampled_from([0, 0, 0, 0, 4096, 4096, 4096, 1 << 20, (1 << 20) + 3]),
    tail=st.sampled_from([0, 0, 0, 0, 5, 5, 1 << 21]),
    executable=st.booleans(),
)
links = st.builds(
    Link, st.sampled_from([b"..", b".", b"loop", b"/nix/store/none", b"\xff", b"a b", b"../" * 300 + b"x"])
)
leaves = st.one_of(files, links, st.builds(Again, st.integers(0, 20)))
directories = st.recursive(
    st.dictionaries(names, leaves, max_size=4),
    lambda inner: st.dictionaries(names, leaves | inner, max_size=4),
    max_leaves=12,
)
closures = st.lists(st.one_of(directories, files, links), min_size=1, max_size=5)


def make_closure(store: FakeStore, entries: Sequence[Entry]) -> StorePath:
    """Store paths that are *entries*; the first refers to all and is returned."""
    paths = [store.add(f"path-{number}")[0] for number in range(1, len(entries))]
    root, _ = store.add("path-0", paths)
    for path, entry in zip([root, *paths], entries, strict=True):
        at = os.fsencode(store.store_dir / path.basename)
        _make(at, entry, [])
        seal(Path(os.fsdecode(at)))
    return root


def make_object(at: bytes, entry: Entry) -> None:
    """Make *entry* at the path *at*, which is free."""
    _make(at, entry, [])


def _make(at: bytes, entry: Entry, made: list[bytes]) -> None:
    if isinstance(entry, Again) and made:
        os.link(made[entry.which % len(made)], at)
        return
    if isinstance(entry, Again):
        entry = File(b"the first of its name")
    if isinstance(entry, File):
        with open(at, "xb") as file:
            file.seek(entry.hole)
            file.write(entry.data)
            file.truncate(entry.hole + len(entry.data) + entry.tail)
        os.chmod(at, 0o755 if entry.executable else 0o644)
        made.append(at)
    elif isinstance(entry, Link):
        os.symlink(entry.target, at)
    else:
        os.mkdir(at)
        for name, inner in entry.items():
            _make(at + b"/" + name, inner, made)


def contents(directory: Path) -> list[str]:
    """What find says of all in *directory* itself and below, with digests of all files."""
    lines = metadata(directory)
    digests = run("find", directory, "-type", "f", "-exec", "sha256sum", "--zero", "{}", "+")
    return lines + sorted(digests.replace(str(directory), "").split("\0"))


def require_equal(made: Path, store: Path, closure: Closure) -> None:
    """Directory *made* holds the paths of *closure* and nothing else, as they are in *store*, and what Nix wants."""
    assert set(os.listdir(made)) == {".links", *(info.path.basename for info in closure.paths)}
    assert os.listdir(made / ".links") == []
    for info in closure.paths:
        assert contents(made / info.path.basename) == contents(store / info.path.basename)


def inodes(directory: Path, *, kind: str = "f") -> dict[str, str]:
    """Path to inode of everything of that type in and below *directory*."""
    lines = run("find", directory, "-type", kind, "-printf", r"%P\t%i\0").split("\0")
    return dict(line.rsplit("\t", 1) for line in lines if line)


def families(directory: Path, closure: Closure) -> set[frozenset[str]]:
    """Which files below *directory* are one inode, for all inodes with several names there."""
    found: dict[str, set[str]] = {}
    for info in closure.paths:
        for path, inode in inodes(directory / info.path.basename).items():
            found.setdefault(inode, set()).add(f"{info.path.basename}/{path}")
    return {frozenset(names) for names in found.values() if len(names) > 1}


def count(directory: Path, closure: Closure, kind: str) -> int:
    """How many entries of that type the closure has, by find."""
    return sum(len(inodes(directory / info.path.basename, kind=kind)) for info in closure.paths)


def blocks(directory: Path) -> int:
    """Bytes on the disk of all regular files below *directory*, each inode once."""
    found = {}
    for top, _, names in os.walk(os.fsencode(directory)):
        for name in names:
            entry = os.lstat(os.path.join(top, name))
            if stat.S_ISREG(entry.st_mode):
                found[entry.st_ino] = entry.st_blocks * 512
    return sum(found.values())


@contextmanager
def btrfs(scratch: Path) -> Iterator[Path]:
    """A file system with reflinks, mounted; skips the test where the kernel has none."""
    if "\tbtrfs\n" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no btrfs")
    image, at = scratch / "btrfs.img", scratch / "btrfs"
    at.mkdir()
    with open(image, "xb") as file:
        file.truncate(128 << 20)
    run("mkfs.btrfs", "--quiet", "--metadata", "single", "--data", "single", image)
    run("mount", "-o", "loop", image, at)
    try:
        yield at
    finally:
        run("umount", at)
