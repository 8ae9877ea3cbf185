"""A store without Nix: directories, files and links of all shapes, canonical as Nix leaves them, and its closures."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from cknix_csi.api.closure import Closure, PathInfo
from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath

BASE32 = "0123456789abcdfghijklmnpqrsvwxyz"


class FakeStore:
    """Implements ``Closures``: references are a file per path, GC roots are links, the database is a list of paths."""

    def __init__(self, root: Path) -> None:
        self._root = root
        for name in ("store", "references", "roots"):
            (root / name).mkdir(parents=True, exist_ok=True)

    @property
    def store_dir(self) -> Path:
        return self._root / "store"

    def roots(self) -> set[str]:
        return set(os.listdir(self._root / "roots"))

    def add(self, name: str, references: Iterable[StorePath] = ()) -> tuple[StorePath, Path]:
        """A new store path (its object is for the caller to make, then :meth:`seal`)."""
        digest = hashlib.sha256(name.encode()).digest()
        path = StorePath("".join(BASE32[byte % 32] for byte in digest), name)
        (self._root / "references" / path.basename).write_text("".join(f"{ref}\n" for ref in references))
        return path, self.store_dir / path.basename

    async def hold(self, closure_id: str, root: StorePath) -> None:
        link = self._root / "roots" / closure_id
        if not link.is_symlink():
            link.symlink_to(str(root))

    async def release(self, closure_id: str) -> None:
        (self._root / "roots" / closure_id).unlink(missing_ok=True)

    async def held(self) -> dict[str, StorePath]:
        return {name: StorePath.parse(os.readlink(self._root / "roots" / name)) for name in self.roots()}

    async def query(self, root: StorePath) -> Closure:
        found: dict[StorePath, PathInfo] = {}
        pending = [root]
        while pending:
            path = pending.pop()
            if path in found:
                continue
            try:
                lines = (self._root / "references" / path.basename).read_text().splitlines()
            except FileNotFoundError:
                raise CknixError(f"{path} is not valid", Situation.PATH_NOT_VALID) from None
            references = tuple(sorted(StorePath.parse(line) for line in lines))
            found[path] = PathInfo(path, "sha256:" + "0" * 64, 1, references)
            pending.extend(references)
        return Closure(root, tuple(found[path] for path in sorted(found)))

    async def write_state(self, closure: Closure, directory: Path) -> None:
        database = directory / "nix/var/nix/db/db.sqlite"
        database.parent.mkdir(parents=True, exist_ok=True)
        database.write_text("".join(f"{info.path}\n" for info in closure.paths))


def seal(path: Path) -> None:
    """Modes and times as Nix makes them: 0444 or 0555, one second after the epoch."""
    for directory, _, files in os.walk(os.fsencode(path), topdown=False):
        for name in files:
            _seal_one(os.path.join(directory, name))
        _seal_one(directory)
    if path.is_symlink() or path.is_file():
        _seal_one(os.fsencode(path))


def _seal_one(path: bytes) -> None:
    found = os.lstat(path)
    if stat.S_ISDIR(found.st_mode):
        os.chmod(path, 0o555)
    elif stat.S_ISREG(found.st_mode):
        os.chmod(path, 0o555 if found.st_mode & stat.S_IXUSR else 0o444)
    os.utime(path, ns=(10**9, 10**9), follow_symlinks=False)


def fill_of_all_shapes(store: FakeStore) -> StorePath:
    """A closure with a directory, files and links at the top level, odd names, odd sizes; returns its root."""
    library, at = store.add("library-1.0")
    (at / "lib/deep/er").mkdir(parents=True)
    (at / "empty").mkdir()
    (at / "lib/big").write_bytes(os.urandom(3 << 20))
    with open(at / "lib/sparse", "wb") as sparse:
        sparse.truncate(64 << 20)
    (at / "lib/nothing").touch()
    os.link(at / "lib/big", at / "lib/hardlinked")
    (at / "lib/deep/er/a name with spaces, 'quotes' and\nnewline").write_text("odd")
    with open(os.fsencode(at / "lib") + b"/not-utf8-\xff\xfe", "wb") as odd:
        odd.write(b"bytes")
    (at / ("n" * 255)).write_text("long")
    (at / "loop").symlink_to("loop")
    seal(at)

    script, at = store.add("run.sh")
    at.write_text("#!/bin/sh\necho hello\n")
    at.chmod(0o755)
    seal(at)
    big, at = store.add("source.tar")
    at.write_bytes(os.urandom((1 << 20) + 17))
    seal(at)
    empty, at = store.add("empty-file")
    at.touch()
    seal(at)
    bare, at = store.add("empty-directory")
    at.mkdir()
    seal(at)
    link, at = store.add("link", [library])
    at.symlink_to(f"{library}/lib")
    seal(at)
    dangling, at = store.add("dangling")
    at.symlink_to("nowhere/at all")
    seal(at)
    long_name, at = store.add("x" * 211)
    at.mkdir()
    (at / "file").write_text("in the longest name")
    seal(at)

    root, at = store.add("root-1.0", [library, script, big, empty, bare, link, dangling, long_name])
    (at / "bin").mkdir(parents=True)
    (at / "bin/hello").write_text("#!/bin/sh\necho hello\n")
    (at / "bin/hello").chmod(0o755)
    (at / "bin/run").symlink_to(str(script))
    seal(at)
    return root


def fill_small(store: FakeStore, name: str, references: Iterable[StorePath] = ()) -> StorePath:
    """A closure of a directory with one file, and *references*; returns its root."""
    root, at = store.add(name, references)
    (at / "bin").mkdir(parents=True)
    (at / "bin/hello").write_text(name)
    seal(at)
    return root
