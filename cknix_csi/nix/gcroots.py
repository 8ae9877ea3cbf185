"""Garbage-collector roots: symbolic links below the store's ``gcroots`` directory.

Nix keeps whatever a link there points at (Nix manual, "Garbage Collector Roots").  A link may be made before its target
exists: a path is thus protected from the moment it becomes valid.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.nix.collector import CollectionRuns, outlast_in_thread, tell_collector
from cknix_csi.nix.durable import make_directory, sync_directory
from cknix_csi.nix.store import Store

_NEW = ".new"


class GcRoots:
    """The roots of one owner, below ``gcroots/cknix/<owner>``.  Synchronous and cheap: call it from a thread.

    A name is one or more plain file names joined by ``/``.  Only one process may own a directory of roots at a time.
    """

    def __init__(self, store: Store, owner: str, *, durable: bool = True, outlasting: bool = False) -> None:
        """*durable*: a root is on the disk when :meth:`add` returns; not so for those a power cut leaves no need of.

        *outlasting*: :meth:`add` of a new root waits for a collection that may be about to delete what it is for.
        """
        self._store = store
        self._durable = durable
        self._outlasting = outlasting
        self._directory = store.gcroots / owner
        # remove() takes away empty directories under the feet of an add() in another thread.
        self._lock = threading.Lock()
        self.removed = 0
        """How many roots :meth:`remove` has found and taken away so far: what they kept may be garbage since."""

    def add(self, name: str, path: StorePath) -> None:
        """Root *path* under *name*, replacing what was there.

        When this returns, the root holds also against a collection that began before; but for one that is about to
        delete *path* together with others, unless this object is *outlasting*.  *path* may be gone already: look it up
        afterwards.  Raises OSError, and CollectionRuns when a wait is too long: then there is no root.
        """
        new = self._link_to(self._link(name), path)
        try:
            tell_collector(self._store, path)
            if new and self._outlasting:
                outlast_in_thread(self._store, path)
        except CollectionRuns:
            if new:
                self.remove(name)  # the next add is to wait again
            raise

    async def added(self, name: str, path: StorePath) -> None:
        """:meth:`add`, in a thread of its own: it may have to wait for an administrator's collector."""
        thread = ThreadPoolExecutor(1, "cknix-root")
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self.add, name, path)
        finally:
            thread.shutdown(wait=False)

    def has(self, name: str, path: StorePath) -> bool:
        """True when *path* is rooted under *name*."""
        try:
            return os.readlink(self._link(name)) == str(path)
        except FileNotFoundError:
            return False

    def _link_to(self, link: Path, path: StorePath) -> bool:
        """False when it was there already."""
        with self._lock:
            try:
                if os.readlink(link) == str(path):
                    return False
            except FileNotFoundError:
                pass
            if self._durable:
                make_directory(link.parent)
            else:
                link.parent.mkdir(parents=True, exist_ok=True)
            beside = link.with_name(_NEW)
            beside.unlink(missing_ok=True)
            beside.symlink_to(str(path))
            beside.replace(link)
            if self._durable:
                sync_directory(link.parent)
            return True

    def remove(self, name: str) -> None:
        """Drop the root *name*, and directories that are empty without it.  No root of that name is no error."""
        link = self._link(name)
        with self._lock:
            with suppress(FileNotFoundError):
                link.unlink()
                self.removed += 1
            # Left by a crash within add(); Nix takes it for a root like any other.
            link.with_name(_NEW).unlink(missing_ok=True)
            for parent in link.parents:
                if parent == self._directory:
                    break
                try:
                    parent.rmdir()
                except OSError:
                    break

    def list(self) -> dict[str, StorePath]:
        """All roots by name.  Links that are no store paths are not ours and are left out."""
        found = {}
        with self._lock:
            for directory, directories, names in os.walk(self._directory):
                # A link is listed with the directories where a directory of the same store path exists on this machine.
                for name in (*names, *directories):
                    link = Path(directory) / name
                    if name.startswith(".") or not link.is_symlink():
                        continue
                    try:
                        found[str(link.relative_to(self._directory))] = StorePath.parse(os.readlink(link))
                    except InvalidStorePath:
                        continue
        return found

    def _link(self, name: str) -> Path:
        parts = name.split("/")
        if any(not part or part.startswith(".") or "\0" in part for part in parts):
            raise ValueError(f"{name!r} is not a name for a GC root")
        return self._directory.joinpath(*parts)
