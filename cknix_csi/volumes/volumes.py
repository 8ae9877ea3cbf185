"""Publishing and unpublishing closures as mounted directories.

Nothing is remembered that the kernel or a directory can tell: what is published is what the mount table shows with
our source, a view that exists is whole, and every operation looks, compares and changes what is missing.  So each may
be repeated, interrupted at any point (then :meth:`Volumes.reconcile` or the caller's retry finishes), and carried on by
the next process.

Order is what makes that safe.  A closure's GC root is taken before the closure is queried and released after its view
is gone; a view is built before it is mounted and unmounted before it is thrown away; a volume's written data is thrown
away after its last mount.  Locks are taken in the order volume, target, closure.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cknix_csi.api.errors import CknixError, Conflict, Invalid, Problem
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.volumes import target as targets
from cknix_csi.volumes.closures import Closures
from cknix_csi.volumes.failures import DataRootTaken, NotUndone, explained
from cknix_csi.volumes.locks import KeyedLocks, finish
from cknix_csi.volumes.mountinfo import Mount, MountTable
from cknix_csi.volumes.mounts import KernelMounts, Mounts
from cknix_csi.volumes.private import PrivateLayers, safe_name
from cknix_csi.volumes.report import ReconcileReport
from cknix_csi.volumes.trash import Trash
from cknix_csi.volumes.view import Views

log = logging.getLogger(__name__)

SOURCE = "cknix:"
"""What every mount of this driver shows as its source in the mount table, followed by the closure's id."""
_SHOWN = "/nix"
"""The directory of an overlay that enters a pod; its root would list the whole store."""
_LONGEST_ROOT = 128
"""Bytes; the paths of upper layers are mount options of at most 255."""
_ROOT_SYNTAX = frozenset('\\:, \t\n"')


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """The closure of *root* at *target*."""

    volume_id: str
    target: Path
    root: StorePath
    writable: bool


@dataclass(frozen=True, slots=True)
class Publication:
    """What is mounted at a target."""

    closure_id: str
    writable: bool

    def __str__(self) -> str:
        return f"{self.closure_id} ({'writable' if self.writable else 'read-only'})"


@dataclass(slots=True)
class _Attempt:
    """A publish under way, and what it has begun: that, and nothing else, is undone when it fails."""

    request: PublishRequest
    path: str
    """The target as the mount table names it."""
    private: str
    """The directory for what is written."""
    began: bool = False
    made_target: bool = False
    made_private: bool = False
    mounted: bool = False

    @property
    def closure_id(self) -> str:
        return self.request.root.basename


@dataclass(slots=True)
class _Detached:
    """What an unpublish has unmounted and must look after: closures, and directories of written data."""

    closures: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)


class Volumes:
    """All volumes of one node.  One process at a time may work on a data root; the first operation reconciles."""

    def __init__(self, data_root: Path, closures: Closures, mounts: Mounts | None = None) -> None:
        """*data_root* exists, on a file system that overlayfs takes as upper layer, and is one mount.

        Raises :class:`Invalid` for a path that cannot stand in mount options.
        """
        root = os.path.realpath(data_root)
        if len(os.fsencode(root)) > _LONGEST_ROOT or _ROOT_SYNTAX.intersection(root):
            rule = f"must have at most {_LONGEST_ROOT} bytes and no space, quote, comma, colon or backslash"
            raise Invalid([Problem("data root", f"{root!r} {rule}")])
        self._root = root
        self._closures = closures
        self._mounts: Mounts = KernelMounts() if mounts is None else mounts
        self._trash = Trash(f"{root}/trash")
        self._views = Views(f"{root}/views", closures.store_dir.resolve(), self._trash)
        self._private = PrivateLayers(f"{root}/volumes", self._trash, self._mounts)
        self._locks = KeyedLocks()
        self._unretired: set[str] = set()
        """Closures that have lost a user since they were last looked at; an operation that failed leaves some here."""
        self._claim: int | None = None
        self._reconciled = False

    async def publish(self, request: PublishRequest) -> None:
        """Mount the closure of ``request.root`` at ``request.target``, nosuid and nodev.

        Does nothing when exactly that is there.  On failure and cancellation nothing is left.  Raises Conflict for
        another volume or a foreign mount there, TargetUnusable for anything but an empty directory in an existing one,
        what the store raises for a path that is not valid, StoreDamaged, OutOfSpace, MountFailed, VolumeFailed,
        MountTableUnreadable, DataRootTaken, and NotUndone (transient) when something is left after all.
        """
        await self._ready()
        path = targets.resolve(request.target)
        attempt = _Attempt(request, path, self._private.path(request.volume_id, request.target))
        keys = (_volume_key(request.volume_id), f"target {path}", f"closure {attempt.closure_id}")
        async with self._locks.hold(*keys):
            try:
                if await finish(asyncio.to_thread(self._attach_known, attempt)):
                    return
                await self._make_view(request.root)
                await finish(asyncio.to_thread(self._attach, attempt))
            except BaseException as error:
                await finish(self._undo(attempt, error))
                raise
            self._unretired.discard(attempt.closure_id)

    async def unpublish(self, volume_id: str, target: Path) -> None:
        """Unmount all at *target*, remove it, and drop what nobody uses any more.  Nothing there is fine.

        Raises Conflict when only foreign mounts are there, TargetUnusable when it is not an empty directory,
        MountFailed, VolumeFailed, MountTableUnreadable, DataRootTaken; a retry goes on where it stopped.
        """
        await self._ready()
        path = targets.resolve(target)
        detached = _Detached(private={self._private.path(volume_id, target)})
        async with self._locks.hold(_volume_key(volume_id), f"target {path}"):
            try:
                await finish(asyncio.to_thread(self._detach, path, detached))
            finally:
                self._unretired |= detached.closures
            async with self._locks.hold(*(f"closure {closure_id}" for closure_id in sorted(detached.closures))):
                await finish(self._clear(path, detached))
            await self._retire_leftovers()
        self._trash.empty()

    def published(self, target: Path) -> Publication | None:
        """What of ours is on top at *target*, from the mount table.  Raises MountTableUnreadable, TargetUnusable."""
        stack = self._mounts.table().at(targets.resolve(target))
        return self._publication(stack[-1]) if stack else None

    async def reconcile(self) -> ReconcileReport:
        """Bring directories, mounts and GC roots to agree: adopt what is mounted, remove what is provably nobody's.

        Safe at any time, and done by the first operation if not before.  What fails is in the report and is tried again
        next time.  Raises MountTableUnreadable, DataRootTaken, VolumeFailed before anything is touched.
        """
        async with self._locks.hold("reconcile"):
            return await self._reconcile()

    async def _reconcile(self) -> ReconcileReport:
        await asyncio.to_thread(self._take_data_root)
        report = ReconcileReport()
        await asyncio.to_thread(self._mounts.table)  # unreadable: raise before anything is touched
        async with self._reported(report, "half-built views"):
            for building in await asyncio.to_thread(lambda: list(self._views.abandoned())):
                await finish(asyncio.to_thread(self._views.abandon, building))
                report.half_built += 1
        async with self._reported(report, "the data of writable volumes"):
            await self._reconcile_private(report)
        async with self._reported(report, "the list of GC roots"):
            await self._reconcile_closures(report)
        self._trash.retry()
        self._reconciled = True
        for line in report.words():
            log.info("reconcile: %s", line)
        for problem in report.problems:
            log.warning("reconcile: %s", problem)
        return report

    async def throw_away(self, choose: Callable[[Callable[[str], None]], object]) -> None:
        """Run *choose* in a thread with a function that moves a path of this data root to the trash, then empty that.

        No mount may use the paths.  Raises VolumeFailed.
        """
        await self._ready()
        await finish(asyncio.to_thread(choose, self._trash.take))
        self._trash.empty()

    async def close(self) -> None:
        """Wait for deletions in the background and let go of the data root.  Volumes stay mounted."""
        await self._trash.close()
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None
        self._reconciled = False

    # Publish, step by step

    def _attach_known(self, attempt: _Attempt) -> bool:
        """True when the volume is there, or could be mounted from a view that exists; False when that must be built."""
        if self._mounts.mounted(attempt.path):
            self._require_same(attempt)
            return True
        targets.check(attempt.path)
        attempt.began = True
        if not self._views.exists(attempt.closure_id):
            return False
        self._attach(attempt)
        return True

    async def _make_view(self, root: StorePath) -> None:
        closure_id = root.basename
        with explained(f"take the GC root of {closure_id}"):
            await finish(self._closures.hold(closure_id, root))
        closure = await finish(self._closures.query(root))
        building = self._views.reserve()
        try:
            await finish(asyncio.to_thread(self._views.begin, building, closure))
            with explained(f"write the database of {closure_id}"):
                await finish(self._closures.write_state(closure, Path(building, "meta")))
            await finish(asyncio.to_thread(self._views.complete, building, closure_id))
        except BaseException:
            await finish(asyncio.to_thread(self._views.abandon, building))
            raise

    def _attach(self, attempt: _Attempt) -> None:
        """From a view that exists to the mounted target."""
        source = SOURCE + attempt.closure_id
        lower = self._views.layers(attempt.closure_id)
        attempt.made_target = targets.create(attempt.path)
        if attempt.request.writable:
            origin = self._private.mountpoint(attempt.private)
            self._private.discard(attempt.private)  # a crash left it
            attempt.made_private = True
            upper = self._private.make(attempt.private)
            self._mounts.overlay(origin, source=source, lower=lower, upper=upper)
        else:
            origin = self._views.mountpoint(attempt.closure_id)
            if not self._mounts.mounted(origin):
                self._mounts.overlay(origin, source=source, lower=lower, upper=None)
            elif not self._views.is_shown(attempt.closure_id):
                raise Conflict(f"{origin} is covered by a foreign mount; unmount it on the node")
        self._mounts.clone(origin + _SHOWN, attempt.path, writable=attempt.request.writable)
        attempt.mounted = True
        if attempt.request.writable:
            self._mounts.unmount(origin)

    async def _undo(self, attempt: _Attempt, error: BaseException) -> None:
        """Remove what *attempt* began, in reverse.  Raises NotUndone, unless the caller was cancelled."""
        if not attempt.began:
            return
        try:
            await asyncio.to_thread(self._undo_attach, attempt)
            await self._retire(attempt.closure_id)
        except Exception as failure:
            log.exception("publish of %s at %s failed and could not be undone", attempt.closure_id, attempt.path)
            self._unretired.add(attempt.closure_id)
            if isinstance(error, Exception):
                raise NotUndone(f"{error}; then undoing it failed: {failure}") from error
        finally:
            self._trash.empty()

    def _undo_attach(self, attempt: _Attempt) -> None:
        if attempt.mounted:
            self._mounts.unmount(attempt.path)
        if attempt.made_target:
            targets.remove(attempt.path)
        if attempt.made_private:
            self._mounts.unmount(self._private.mountpoint(attempt.private))
            self._private.discard(attempt.private)

    # Unpublish, step by step

    def _detach(self, path: str, detached: _Detached) -> None:
        """Unmount the target; *detached* receives what was there."""
        if self._mounts.mounted(path):
            stack = self._mounts.table().at(path)
            ours = [publication for mount in stack if (publication := self._publication(mount))]
            if not ours:
                what = _described(stack[-1]) if stack else "a mount"
                raise Conflict(f"{path} holds {what}, which this driver did not mount; unmount it on the node")
            detached.closures.update(publication.closure_id for publication in ours)
            detached.private.update(owner for mount in stack if (owner := self._private.owner(mount)))
            self._mounts.unmount(path)
        for private in detached.private:
            self._mounts.unmount(self._private.mountpoint(private))

    async def _clear(self, path: str, detached: _Detached) -> None:
        """Remove what has lost its last mount, and the target.  The locks of the closures must be held."""
        for closure_id in await asyncio.to_thread(self._clear_directories, path, detached):
            await self._closures.release(closure_id)
        self._unretired -= detached.closures

    def _clear_directories(self, path: str, detached: _Detached) -> list[str]:
        """All of :meth:`_clear` but the GC roots; returns the closures that need none any more."""
        table = self._mounts.table() if detached.closures else None
        for private in sorted(detached.private):
            self._private.discard(private, table)
        gone = [closure_id for closure_id in sorted(detached.closures) if self._drop_view(closure_id, table)]
        targets.remove(path)
        return gone

    async def _retire(self, closure_id: str) -> bool:
        """Drop view and GC root of a closure that has no user; True when they are gone.  Its lock must be held."""
        self._unretired.add(closure_id)
        if gone := await asyncio.to_thread(self._drop_view, closure_id):
            await self._closures.release(closure_id)
        self._unretired.discard(closure_id)
        return gone

    def _drop_view(self, closure_id: str, table: MountTable | None = None) -> bool:
        """Unmount the shared overlay and throw the view away, unless a mount shows the closure (then False)."""
        if self._in_use(closure_id, self._mounts.table() if table is None else table):
            return False
        self._mounts.unmount(self._views.mountpoint(closure_id))
        if users := self._mounts.table().using(self._views.path(closure_id), f"/views/{closure_id}"):
            raise Conflict(f"the view of {closure_id} is still used by the mount at {users[0].target}; unmount that")
        self._views.discard(closure_id)
        return True

    async def _retire_leftovers(self) -> None:
        """Try again what earlier operations could not drop; whoever is at work on a closure looks after it himself."""
        for closure_id in sorted(self._unretired):
            if self._locks.taken(f"closure {closure_id}"):
                continue
            try:
                async with self._locks.hold(f"closure {closure_id}"):
                    await finish(self._retire(closure_id))
            except CknixError as error:
                log.warning("still cannot drop %s: %s", closure_id, error)

    # What is mounted

    def _closure_of(self, mount: Mount) -> str | None:
        """The closure that *mount* shows, None for a foreign mount; another data root's are foreign too."""
        if mount.fstype != "overlay" or not mount.source.startswith(SOURCE) or not self._views.may_own(mount):
            return None
        try:
            return StorePath.from_basename(mount.source.removeprefix(SOURCE)).basename
        except InvalidStorePath:
            return None

    def _publication(self, mount: Mount) -> Publication | None:
        """What a pod sees by *mount*; None for a foreign one."""
        if (closure_id := self._closure_of(mount)) is None or mount.root != _SHOWN:
            return None
        writable = mount.super_option("upperdir") is not None and "rw" in mount.options
        return Publication(closure_id, writable)

    def _require_same(self, attempt: _Attempt) -> None:
        """Raise Conflict unless what is mounted at the target is what *attempt* wants there."""
        stack = self._mounts.table().at(attempt.path)
        at = f"target path {attempt.path!r}"
        wanted = Publication(attempt.closure_id, attempt.request.writable)
        found = self._publication(stack[-1]) if stack else None
        if found is None:
            what = _described(stack[-1]) if stack else "a mount"
            raise Conflict(
                f"{at} holds {what}, which this driver did not mount; it is left alone: unmount it on the node"
            )
        if found != wanted:
            raise Conflict(f"{at} already holds {found}, not {wanted}; unpublish it first")
        if self._private.owner(stack[-1]) not in {None, attempt.private}:
            raise Conflict(f"{at} already holds another volume of {found}; unpublish it first")

    def _in_use(self, closure_id: str, table: MountTable) -> bool:
        """True when a mount shows the closure, in a pod or on its way there."""
        shared = self._views.mountpoint(closure_id)
        mounts = table.sourced(SOURCE + closure_id)
        return any(mount.target != shared and self._closure_of(mount) for mount in mounts)

    # Start

    async def _ready(self) -> None:
        if not self._reconciled:
            async with self._locks.hold("reconcile"):
                if not self._reconciled:
                    await self._reconcile()

    def _take_data_root(self) -> None:
        """Make our directories and lock them against other processes; the lock ends with this process."""
        if self._claim is not None:
            return
        with explained(f"prepare the data root {self._root}"):
            for name in ("views", "volumes", "trash"):
                os.makedirs(f"{self._root}/{name}", 0o700, exist_ok=True)
            descriptor = os.open(f"{self._root}/views", os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise DataRootTaken(
                f"another cknix-csi process works on the data root {self._root}; give this one another, or end that one"
            ) from error
        self._claim = descriptor

    @asynccontextmanager
    async def _reported(self, report: ReconcileReport, what: str) -> AsyncIterator[None]:
        """A failure of the block goes into the report: one bad thing must not keep the rest from being put right."""
        try:
            yield
        except (CknixError, OSError) as error:
            report.problems.append(f"{what}: {error}")

    async def _reconcile_private(self, report: ReconcileReport) -> None:
        for volume in await asyncio.to_thread(self._private.volumes):
            key = f"volume {os.path.basename(volume)}"
            if self._locks.taken(key):
                continue
            async with self._locks.hold(key):
                await finish(asyncio.to_thread(self._reconcile_volume, volume, report))

    def _reconcile_volume(self, volume: str, report: ReconcileReport) -> None:
        for private in self._private.targets(volume):
            try:
                self._mounts.unmount(self._private.mountpoint(private))  # hidden: no pod sees it
                used = any(self._private.owner(mount) == private for mount in self._mounts.table().sourced_like(SOURCE))
                if not used and self._private.discard(private):
                    report.volumes_removed.append(private)
            except (CknixError, OSError) as error:
                report.problems.append(f"{private}: {error}")
        self._private.prune(volume)

    async def _reconcile_closures(self, report: ReconcileReport) -> None:
        held = {name for name, root in (await self._closures.held()).items() if name == root.basename}
        table = await asyncio.to_thread(self._mounts.table)
        mounted = {closure_id for mount in table.sourced_like(SOURCE) if (closure_id := self._closure_of(mount))}
        views = set(await asyncio.to_thread(lambda: list(self._views.ids())))
        for closure_id in sorted(views | mounted | held):
            if self._locks.taken(f"closure {closure_id}"):
                continue
            async with self._locks.hold(f"closure {closure_id}"), self._reported(report, closure_id):
                if await finish(self._retire(closure_id)):
                    (report.views_removed if closure_id in views else report.roots_released).append(closure_id)
                    continue
                report.adopted.append(closure_id)
                if closure_id not in held:  # somebody removed it: whoever uses the volume must not lose its files
                    await finish(self._closures.hold(closure_id, StorePath.from_basename(closure_id)))
                    report.roots_taken.append(closure_id)


def _volume_key(volume_id: str) -> str:
    return f"volume {safe_name(volume_id)}"


def _described(mount: Mount) -> str:
    return f"a {mount.fstype} mount of {mount.source!r}"
