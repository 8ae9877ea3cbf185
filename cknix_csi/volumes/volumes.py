"""Publishing and unpublishing closures as mounted directories.

Nothing is remembered that the kernel or a directory can tell: what is published is what the mount table shows with
our source or below our data root, a view or farm that exists was whole once (and is looked at when this process meets
it, or it had no user), and every operation looks, compares and changes what is missing.  So each may be repeated,
interrupted at any point (then :meth:`Volumes.reconcile` or the caller's retry finishes), and carried on by the next
process.

Order is what makes that safe.  A closure's GC root is taken before the closure is queried and released after its view
and farm are gone; those are built before they are mounted and unmounted before they are thrown away; what a volume has
of its own is thrown away after its last mount.  Locks are taken in the order volume, target, closure.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cknix_csi.api.errors import CknixError, Conflict, Invalid, Problem
from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.storepath import StorePath
from cknix_csi.finishing import finish, in_thread
from cknix_csi.volumes import target as targets
from cknix_csi.volumes.abilities import Abilities, Prober
from cknix_csi.volumes.choose import Choice, Wish
from cknix_csi.volumes.closures import Closures
from cknix_csi.volumes.copies import Copies, CopyCost
from cknix_csi.volumes.copytree import CopyEngine
from cknix_csi.volumes.failures import DataRootTaken, NodeUnusable, NotUndone, ViewDamaged, explained
from cknix_csi.volumes.farm import Farms
from cknix_csi.volumes.linking import LinkEngine
from cknix_csi.volumes.locks import KeyedLocks, ProcessLock
from cknix_csi.volumes.mountinfo import Mount, MountTableUnreadable
from cknix_csi.volumes.mounts import KernelMounts, Mounts
from cknix_csi.volumes.place import Place
from cknix_csi.volumes.private import PrivateLayers, volume_key
from cknix_csi.volumes.probe import probe
from cknix_csi.volumes.published import SHOWN, Publication, Published, Shown
from cknix_csi.volumes.reconcile import Reconciliation
from cknix_csi.volumes.report import ReconcileReport
from cknix_csi.volumes.sized import KernelSizedStorage, SizedStorage
from cknix_csi.volumes.trash import Trash
from cknix_csi.volumes.trees import Trees
from cknix_csi.volumes.usage import FRESH_SECONDS, Measured, VolumeUsage
from cknix_csi.volumes.view import Var, Views, closure_key
from cknix_csi.volumes.warm import COLD, Fate, UnusedTrees, Warm

__all__ = ["Made", "Measured", "Publication", "PublishRequest", "Volumes"]

log = logging.getLogger(__name__)

_LONGEST_ROOT = 128
"""Bytes; the paths of upper layers are mount options of at most 255."""
_DELETION_SECONDS = 60.0
_CLAIM_SECONDS = 1.0
"""Programs that a killed process was about to start hold its lock until they have started."""
_CLAIM_POLL_SECONDS = 0.02
_ROOT_SYNTAX = frozenset('\\:, \t\n"')


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """The closure of *root* at *target*."""

    volume_id: str
    target: Path
    root: StorePath
    writable: bool
    limit: Limit | None = None
    """Of what a writable volume may hold; None: as much as the disk has."""
    presentation: Presentation | None = None
    """What the volume is to be made of; None: whatever suits this node and the pod."""
    host_users: bool = True
    """False for a pod of a user namespace of its own, whose runtime id-maps the volume."""
    maximum: int | None = None
    """Bytes that a private copy may take, whether it is written to or not; None: as many as the disk has."""

    @property
    def wish(self) -> Wish:
        """What decides how the volume is made."""
        return wish(writable=self.writable, limit=self.limit, asked=self.presentation, host_users=self.host_users)


def wish(*, writable: bool, limit: Limit | None, asked: Presentation | None, host_users: bool) -> Wish:
    """What a request of these words needs of a node, whatever its closure."""
    size = limit.bytes if limit is not None and limit.medium is Medium.DISK else None
    return Wish(writable=writable, host_users=host_users, asked=asked, size_limit=size)


@dataclass(frozen=True, slots=True)
class Made:
    """What a publish has made of its volume."""

    presentation: Presentation
    reason: str
    """Why that: one sentence without its end."""
    cost: CopyCost | None = None
    """Of a private copy."""

    @property
    def ordinary(self) -> bool:
        """True for what volumes are made of where nothing speaks against it."""
        return self.presentation is Presentation.REDIRECT


@dataclass(frozen=True, slots=True)
class Inventory:
    """How many there are."""

    mounted: Mapping[tuple[Presentation, bool], int]
    """Volumes in pods, by what they are and whether they are writable."""
    trees: Mapping[Presentation, int]
    """Shared trees on disk, in use or kept, by what they are."""


@dataclass(slots=True)
class _Attempt:
    """A publish under way, and what it has begun: that, and nothing else, is undone when it fails."""

    request: PublishRequest
    path: str
    """The target as the mount table names it."""
    private: str
    """The directory for what is the volume's own."""
    began: bool = False
    made_target: bool = False
    made_private: bool = False
    mounted: bool = False
    choice: Choice | None = None
    pinned: bool = False
    """Its closure is held for being copied."""
    copy: str = ""
    """The directory that holds the private copy, if there is one."""
    cost: CopyCost | None = None

    @property
    def closure_id(self) -> str:
        return self.request.root.basename

    @property
    def limit(self) -> Limit | None:
        return self.request.limit.whole() if self.request.limit and self.request.writable else None


@dataclass(slots=True)
class _Detached:
    """What an unpublish has unmounted and must look after: shared closures, and directories of the volume's own."""

    closures: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)


class Volumes:
    """All volumes of one node.  One process at a time may work on a data root; the first operation reconciles."""

    def __init__(
        self,
        data_root: Path,
        closures: Closures,
        mounts: Mounts | None = None,
        *,
        sized: SizedStorage | None = None,
        prober: Prober = probe,
        keep_warm: Warm = COLD,
        measured_for: float = FRESH_SECONDS,
    ) -> None:
        """*data_root* exists, on a file system that overlayfs takes as upper layer, and is one mount.

        *mounts* and *sized*: the kernel's, when not given.  *prober* says what works on this node.  *keep_warm*: for
        how long, and of how many closures, view, farm and GC root outlive the last user.  *measured_for*: seconds for
        which :meth:`measure` says again what it has found.
        Raises :class:`Invalid` for a path that cannot stand in mount options.
        """
        root = os.path.realpath(data_root)
        if len(os.fsencode(root)) > _LONGEST_ROOT or _ROOT_SYNTAX.intersection(root):
            rule = f"must have at most {_LONGEST_ROOT} bytes and no space, quote, comma, colon or backslash"
            raise Invalid([Problem("data root", f"{root!r} {rule}")])
        self._root = root
        self._closures = closures
        self._mounts: Mounts = KernelMounts() if mounts is None else mounts
        store_dir = closures.store_dir.resolve()
        self._trash = Trash(f"{root}/trash")
        sized = KernelSizedStorage(self._mounts) if sized is None else sized
        self._abilities = Abilities(Path(root, "probe"), store_dir, self._mounts, prober)
        place, var = Place(root, self._mounts), Var()
        self._views = Views(f"{root}/views", store_dir, self._trash)
        self._farms = Farms(f"{root}/farms", store_dir, self._trash, LinkEngine(), var, ours=place.holds)
        self._private = PrivateLayers(f"{root}/volumes", self._trash, self._mounts, sized)
        self._copies = Copies(f"{root}/volumes", place, store_dir, CopyEngine, var, emptied=self.emptied)
        trees: tuple[Trees, ...] = (self._views, self._farms)
        self._published = Published(trees, self._private, self._copies, sized)
        self._locks = KeyedLocks()
        self._unused = UnusedTrees(trees, closures, self._mounts, trash=self._trash, locks=self._locks, keep=keep_warm)
        self._reconciliation = Reconciliation(
            trees=trees,
            private=self._private,
            published=self._published,
            closures=closures,
            mounts=self._mounts,
            locks=self._locks,
            unused=self._unused,
        )
        self._usage = VolumeUsage(
            root,
            trees=trees,
            private=self._private,
            published=self._published,
            closures=closures,
            mounts=self._mounts,
            sized=sized,
            locks=self._locks,
            fresh=measured_for,
        )
        self._claim = ProcessLock(f"{root}/views")
        self._reconciled = False
        self._met: set[tuple[Presentation, str]] = set()
        """Views and farms that this process has built, or found whole while a mount showed them.

        Others may have lost some of what was written to them: they are not synced, and a power cut leaves no mount.
        """

    async def require(self, wanted: Wish) -> None:
        """Raises PresentationUnavailable when no volume can be made like that here, and as :meth:`reconcile` does."""
        await self._ready()
        await in_thread(self._abilities.choose, wanted)

    async def publish(self, request: PublishRequest) -> Made | None:
        """Mount the closure of ``request.root`` at ``request.target``, nosuid and nodev; returns what was made.

        Does nothing when exactly that is there, and returns None.  On failure and cancellation nothing is left.  Raises
        Conflict for another volume or a foreign mount there, TargetUnusable for anything but an empty directory in an
        existing one, PresentationUnavailable, Invalid for a private copy above its maximum, LimitReached for one above
        its limit, what the store raises for a path that is not valid, StoreDamaged,
        ViewDamaged, OutOfSpace, MountFailed, VolumeFailed, MountTableUnreadable, DataRootTaken, and NotUndone
        (transient) when something is left after all.
        """
        await self._ready()
        path = targets.resolve(request.target)
        attempt = _Attempt(request, path, self._private.path(request.volume_id, request.target))
        keys = (volume_key(request.volume_id), f"target {path}")
        if request.presentation is Presentation.COPY:
            async with self._locks.hold(*keys):
                await self._publish_copy(attempt)
        else:
            async with self._locks.hold(*keys, closure_key(attempt.closure_id)):
                await self._publish_shared(attempt)
        if attempt.choice is None:
            return None
        return Made(attempt.choice.presentation, attempt.choice.reason, attempt.cost)

    def copying(self, volume_id: str, target: Path) -> str | None:
        """How far the private copy of the volume at *target* has come; None while none is being made."""
        return self._copies.words(self._private.path(volume_id, target))

    async def unpublish(self, volume_id: str, target: Path) -> None:
        """Unmount all at and inside *target*, remove it, and drop what nobody uses any more.  Nothing there is fine.

        A privileged pod can leave mounts of its own inside; they are unmounted and what they show is left alone.
        Raises Conflict when only foreign mounts are there, TargetUnusable when it is not an empty directory,
        MountFailed (also while a process is inside), VolumeFailed, MountTableUnreadable, DataRootTaken; a retry goes on
        where it stopped.
        """
        await self._ready()
        path = targets.resolve(target)
        detached = _Detached(private={self._private.path(volume_id, target)})
        async with self._locks.hold(volume_key(volume_id), f"target {path}"):
            try:
                await finish(asyncio.to_thread(self._detach, path, detached))
            finally:
                self._unused.remember(detached.closures)
            async with self._locks.hold(*map(closure_key, sorted(detached.closures))):
                await finish(self._clear(path, detached))
            await self._unused.retry()
        self._trash.empty()

    def published(self, target: Path) -> Publication | None:
        """What of ours is on top at *target*, from the mount table.

        Raises MountTableUnreadable, TargetUnusable, VolumeFailed.
        """
        path = targets.resolve(target)
        if not self._mounts.mounted(path):  # all that a publish needs to know, whatever else is mounted
            return None
        table = self._mounts.table()
        stack = table.at(path)
        return self._published.publication(stack[-1], table) if stack else None

    def publications(self) -> dict[str, Shown]:
        """What of ours is mounted where, by target as the mount table names it, from one reading of that.

        Raises MountTableUnreadable.
        """
        return self._published.everywhere(self._mounts.table())

    def inventory(self) -> Inventory:
        """What there is, counted: from one reading of the mount table and of directories.  Blocks.

        Raises MountTableUnreadable, OSError.
        """
        mounted = Counter((shown.presentation, shown.writable) for shown in self.publications().values())
        return Inventory(
            mounted,
            {trees.presentation: sum(1 for _ in trees.ids()) for trees in (self._views, self._farms)},
        )

    def check(self) -> None:
        """Raises NodeUnusable when nothing can be mounted here, whatever it is.  Blocks."""
        try:
            if self._claim.is_moot():
                raise NodeUnusable(
                    f"the data root {self._root} is another directory than it was when this process started; "
                    "restart the node daemon"
                )
            if os.statvfs(self._root).f_flag & os.ST_RDONLY:
                raise NodeUnusable(
                    f"the file system of the data root {self._root} has become read-only: see the node's kernel log"
                )
            self._mounts.table()
        except (OSError, MountTableUnreadable) as error:
            raise NodeUnusable(str(error)) from error

    async def measure(self, volume_id: str, target: Path) -> Measured:
        """What the volume at *target* uses, and whether it is well; see :mod:`.usage`.

        Raises NotFound when no volume is there, or another; MountTableUnreadable, VolumeFailed.
        """
        return await self._usage.measure(volume_id, target)

    async def reconcile(self) -> ReconcileReport:
        """Bring directories, mounts and GC roots to agree: adopt what is mounted, remove what is provably nobody's.

        Safe at any time, and done by the first operation if not before.  What fails is in the report and is tried again
        next time.  Raises MountTableUnreadable, DataRootTaken, VolumeFailed before anything is touched.
        """
        async with self._locks.hold("reconcile"):
            return await self._reconcile()

    async def hold_mounted(self) -> None:
        """Take the GC roots of mounted closures that somebody has removed: before garbage is collected.

        Raises what :meth:`reconcile` raises, and what taking a root raises.
        """
        await self._ready()
        if taken := await self._reconciliation.hold_mounted():
            log.warning("took the GC roots of mounted closures that somebody had removed: %s", ", ".join(taken))

    async def forget_unused(self) -> list[str]:
        """Drop all that is kept for no user: views, farms and GC roots; returns their closures' ids.

        What cannot be dropped is logged and tried again by later operations.  Raises what :meth:`reconcile` raises.
        """
        await self._ready()
        gone = await self._unused.drop_all()
        self._trash.empty()
        return gone

    async def emptied(self) -> None:
        """Return when what was thrown away is deleted, so that its space is free, or after a minute."""
        await self._trash.emptied(_DELETION_SECONDS)

    async def throw_away(self, choose: Callable[[Callable[[str], None]], object]) -> None:
        """Run *choose* in a thread with a function that moves a path of this data root to the trash, then empty that.

        No mount may use the paths.  Raises VolumeFailed.
        """
        await self._ready()
        await finish(asyncio.to_thread(choose, self._trash.take))
        self._trash.empty()

    async def close(self) -> None:
        """Let go of the data root; deletions in the background get a moment.  Volumes stay mounted."""
        await self._usage.close()
        await self._unused.close()
        self._trash.empty()  # what a cancelled task has only moved there
        await self._trash.close()
        self._claim.release()
        self._reconciled = False
        self._met.clear()

    # Publish, step by step

    async def _publish_shared(self, attempt: _Attempt) -> None:
        """Publish what others of the closure share; its lock must be held."""
        try:
            if not await in_thread(self._attach_known, attempt):
                await self._prepare(attempt)
                await in_thread(self._attach, attempt)
        except BaseException as error:
            await finish(self._undo(attempt, error))
            raise
        if attempt.choice is not None:
            self._unused.forget(attempt.closure_id)  # it has a user

    async def _publish_copy(self, attempt: _Attempt) -> None:
        """Publish a private copy.  That takes long, so others may do as they like with the closure meanwhile."""
        try:
            if await in_thread(self._attach_known, attempt):
                return
            await self._copy(attempt)
            await in_thread(self._attach, attempt)
            await finish(self._leave_closure(attempt))
        except BaseException as error:
            await finish(self._undo_copy(attempt, error))
            raise

    async def _leave_closure(self, attempt: _Attempt) -> None:
        """It is copied, and the copy needs it no more."""
        async with self._locks.hold(closure_key(attempt.closure_id)):
            self._unpin(attempt)
            if not self._unused.is_warm(attempt.closure_id):
                await self._unused.try_to_retire(attempt.closure_id)

    async def _undo_copy(self, attempt: _Attempt, error: BaseException) -> None:
        async with self._locks.hold(closure_key(attempt.closure_id)):
            self._unpin(attempt)
            await self._undo(attempt, error)

    def _unpin(self, attempt: _Attempt) -> None:
        if attempt.pinned:
            attempt.pinned = False
            self._unused.unpin(attempt.closure_id)

    def _attach_known(self, attempt: _Attempt) -> bool:
        """True when the volume is there, or could be mounted from what is trusted; else that must be prepared."""
        if self._mounts.mounted(attempt.path):
            self._require_same(attempt)
            return True
        targets.check(attempt.path)
        attempt.choice = self._abilities.choose(attempt.request.wish)
        attempt.began = True
        trees = self._trees(attempt.choice)
        if trees is None or not trees.trusts(attempt.closure_id):
            return False
        self._attach(attempt)
        return True

    def _trees(self, choice: Choice) -> Trees | None:
        """The shared trees that the choice is about; None for a private copy."""
        match choice.presentation:
            case Presentation.REDIRECT:
                return self._views
            case Presentation.HARDLINK:
                return self._farms
            case Presentation.COPY:
                return None

    async def _prepare(self, attempt: _Attempt) -> None:
        """From whatever there is to what can be mounted, with the GC root taken before anything is looked at."""
        assert attempt.choice is not None
        root = attempt.request.root
        await self._hold(root)
        trees = self._trees(attempt.choice)
        assert trees is not None
        if not (trees.exists(root.basename) and await in_thread(self._found_whole, trees, root.basename)):
            await trees.build(await finish(self._closures.query(root)), self._closures.write_state)
        self._met.add((trees.presentation, root.basename))

    async def _hold(self, root: StorePath) -> None:
        with explained(f"take the GC root of {root.basename}"):
            await finish(self._closures.hold(root.basename, root))

    def _found_whole(self, trees: Trees, closure_id: str) -> bool:
        """True when the one of *trees* that exists is whole; one that is not and has no user is thrown away.

        Raises ViewDamaged when it has users, and StoreDamaged.
        """
        if (trees.presentation, closure_id) not in self._met and self._unused.discard(trees, closure_id):
            log.info("a %s of %s that another process left without a user is built anew", trees.noun, closure_id)
            return False
        if (flaw := trees.flaw(closure_id)) is None:
            return True
        if not self._unused.discard(trees, closure_id):
            raise ViewDamaged(
                f"the {trees.noun} of {closure_id} on this node is damaged: {flaw}; the pods that use it keep it, and "
                f"no other can until they have gone from this node: then it is built anew"
            )
        log.warning("the %s of %s was damaged and is built anew: %s", trees.noun, closure_id, flaw)
        return False

    async def _copy(self, attempt: _Attempt) -> None:
        root = attempt.request.root
        self._unused.pin(root.basename)
        attempt.pinned = True
        async with self._locks.hold(closure_key(root.basename)):
            await self._hold(root)
        closure = await finish(self._closures.query(root))
        await in_thread(self._private.discard, attempt.private)  # a crash left it
        async with self._copies.begin(attempt.private, closure) as under_way:
            reflinks = (await in_thread(self._abilities.found)).reflink.ok
            maximum = attempt.request.maximum
            await self._copies.require_room(under_way, attempt.limit, maximum, reflinks=reflinks)
            attempt.made_private = True
            upper = await in_thread(self._private.make, attempt.private, attempt.limit)
            attempt.copy = os.path.dirname(upper.upper)
            attempt.cost = await self._copies.build(under_way, attempt.copy, self._closures.write_state, attempt.limit)

    def _attach(self, attempt: _Attempt) -> None:
        """From what exists to the mounted target."""
        assert attempt.choice is not None
        choice, writable = attempt.choice, attempt.request.writable
        attempt.made_target = targets.create(attempt.path)
        trees = self._trees(choice)
        if trees is None:
            origin = self._copies.origin(attempt.copy, attempt.closure_id)
        elif not choice.overlay:
            origin = self._farms.origin(attempt.closure_id)
        else:
            origin = self._overlay(attempt, trees) + SHOWN
        self._mounts.clone(origin, attempt.path, writable=writable)
        attempt.mounted = True
        if writable and choice.overlay:
            self._mounts.unmount(self._private.mountpoint(attempt.private))

    def _overlay(self, attempt: _Attempt, trees: Trees) -> str:
        """Where the overlay is mounted that the target gets a clone of."""
        closure_id = attempt.closure_id
        source, lower = trees.source(closure_id), trees.layers(closure_id)
        if attempt.request.writable:
            origin = self._private.mountpoint(attempt.private)
            self._private.discard(attempt.private)  # a crash left it
            attempt.made_private = True
            upper = self._private.make(attempt.private, attempt.limit)
            self._mounts.overlay(origin, source=source, lower=lower, upper=upper)
            return origin
        origin = trees.mountpoint(closure_id)
        if not self._mounts.mounted(origin):
            self._mounts.overlay(origin, source=source, lower=lower, upper=None)
        elif not trees.is_shown(closure_id):
            raise Conflict(f"{origin} is covered by a foreign mount; unmount it on the node")
        return origin

    async def _undo(self, attempt: _Attempt, error: BaseException) -> None:
        """Remove what *attempt* began, in reverse.  Raises NotUndone, unless the caller was cancelled."""
        if not attempt.began:
            return
        try:
            await asyncio.to_thread(self._undo_attach, attempt)
            await self._unused.retire(attempt.closure_id)
        except Exception as failure:
            log.exception("publish of %s at %s failed and could not be undone", attempt.closure_id, attempt.path)
            self._unused.remember({attempt.closure_id})
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
        """Unmount the target and what a pod mounted inside; *detached* receives what was there."""
        if self._mounts.mounted(path):
            table = self._mounts.table()
            stack = table.at(path)
            ours = [it for mount in stack if (it := self._published.publication(mount, table))]
            if not ours:
                what = _described(stack[-1]) if stack else "a mount"
                raise Conflict(f"{path} holds {what}, which this driver did not mount; unmount it on the node")
            detached.closures.update(it.closure_id for it in ours if it.presentation is not Presentation.COPY)
            detached.private.update(own for mount in stack if (own := self._published.private(mount, table)))
            for mount in table.inside_out(stack[0]):
                self._mounts.unmount_one(mount)
            self._mounts.unmount(path)  # what has come since
        for private in detached.private:
            self._mounts.unmount(self._private.mountpoint(private))

    async def _clear(self, path: str, detached: _Detached) -> None:
        """Remove what has lost its last mount, and the target.  The locks of the closures must be held."""
        for closure_id, fate in (await asyncio.to_thread(self._clear_directories, path, detached)).items():
            await self._unused.settle(closure_id, fate)

    def _clear_directories(self, path: str, detached: _Detached) -> dict[str, Fate]:
        """All of :meth:`_clear` but the GC roots; returns what became of each closure."""
        table = self._mounts.table() if detached.closures else None
        for private in sorted(detached.private):
            self._private.discard(private, table)
        fates = {
            closure_id: self._unused.part(closure_id, table, keep=True) for closure_id in sorted(detached.closures)
        }
        targets.remove(path)
        return fates

    # What is mounted

    def _require_same(self, attempt: _Attempt) -> None:
        """Raise Conflict unless what is mounted at the target is what *attempt* wants there."""
        table = self._mounts.table()
        stack = table.at(attempt.path)
        at = f"target path {attempt.path!r}"
        found = self._published.publication(stack[-1], table) if stack else None
        if found is None:
            what = _described(stack[-1]) if stack else "a mount"
            raise Conflict(
                f"{at} holds {what}, which this driver did not mount; it is left alone: unmount it on the node"
            )
        request = attempt.request
        presentation = request.presentation or found.presentation
        wanted = Publication(attempt.closure_id, request.writable, attempt.limit, presentation)
        if found != wanted:
            raise Conflict(f"{at} already holds {found}, not {wanted}; unpublish it first")
        if self._published.private(stack[-1], table) not in {None, attempt.private}:
            raise Conflict(f"{at} already holds another volume of {found}; unpublish it first")

    # Start

    async def _ready(self) -> None:
        if not self._reconciled:
            async with self._locks.hold("reconcile"):
                if not self._reconciled:
                    await self._reconcile()

    async def _reconcile(self) -> ReconcileReport:
        await asyncio.to_thread(self._take_data_root)
        report = await self._reconciliation.run()
        try:
            await in_thread(self._abilities.found)
        except CknixError as error:  # a full disk must not keep anybody from unpublishing
            log.warning("what this node can do is not known yet: %s", error)
        self._trash.retry()
        self._reconciled = True
        return report

    def _take_data_root(self) -> None:
        """Make our directories and lock them against other processes."""
        with explained(f"prepare the data root {self._root}"):
            for name in ("views", "farms", "volumes", "trash"):
                os.makedirs(f"{self._root}/{name}", 0o700, exist_ok=True)
            deadline = time.monotonic() + _CLAIM_SECONDS
            while not (taken := self._claim.take()) and time.monotonic() < deadline:
                time.sleep(_CLAIM_POLL_SECONDS)
        if not taken:
            raise DataRootTaken(
                f"another cknix-csi process works on the data root {self._root}; give this one another, or end that one"
            )


def _described(mount: Mount) -> str:
    return f"a {mount.fstype} mount of {mount.source!r}"
