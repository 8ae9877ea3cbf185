"""Views and farms that have lost their last user: dropped at once, or kept for a while in case a user comes again.

A pod that is replaced again and again would have its view built each time.  Kept is what somebody outside still wants,
as an Expression wants its results, and only until nobody does any more.  A kept ("warm") view keeps its GC root too,
but nothing in the kernel: its overlay is unmounted, since mounting it again takes 50 µs while a mounted one holds the
inodes of all that its pods have looked at, and since what is mounted must mean what is used.  Which views are warm is
known to this process alone.  The next one drops them at start: a power cut may have come between.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cknix_csi.api.errors import CknixError, Conflict
from cknix_csi.finishing import finish
from cknix_csi.volumes.closures import Closures
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.locks import KeyedLocks
from cknix_csi.volumes.mountinfo import MountTable
from cknix_csi.volumes.mounts import Mounts
from cknix_csi.volumes.trash import Trash
from cknix_csi.volumes.trees import Trees
from cknix_csi.volumes.view import closure_key

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""Between two looks at whether what is warm is still wanted."""


def _anything(_: str) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Warm:
    """How many views without a user are kept, and each for how many seconds."""

    count: int = 16
    seconds: float = 600.0
    wanted: Callable[[str], bool] = _anything
    """Whether a closure, by its id, may be kept; asked again and again, in any thread."""


COLD = Warm(count=0, seconds=0.0)
"""No view is kept."""


class Fate(enum.Enum):
    """What became of a view that was to go."""

    USED = "a mount shows it"
    WARM = "kept"
    GONE = "thrown away"


class UnusedTrees:
    """Drops views and farms, or keeps them as *keep* says; their users are looked for in the mount table each time.

    A closure is held as long as it has any of *trees*.
    """

    def __init__(
        self, trees: Sequence[Trees], closures: Closures, mounts: Mounts, *, trash: Trash, locks: KeyedLocks, keep: Warm
    ) -> None:
        self._trees = trees
        self._closures = closures
        self._mounts = mounts
        self._trash = trash
        self._locks = locks
        self._keep = keep
        self._unretired: set[str] = set()
        """Closures that have lost a user since they were last looked at; an operation that failed leaves some here."""
        self._warm: dict[str, float] = {}
        """Until when each is kept, by the loop's clock; oldest first."""
        self._expiry: asyncio.Task[None] | None = None
        self._pinned: Counter[str] = Counter()

    def pin(self, closure_id: str) -> None:
        """Until as many calls of :meth:`unpin`, its GC root stays though no tree is there: it is being copied."""
        self._pinned[closure_id] += 1

    def unpin(self, closure_id: str) -> None:
        """End one :meth:`pin`; :meth:`retire` may release the root now."""
        self._pinned[closure_id] -= 1
        self._pinned += Counter()

    def pinned(self) -> set[str]:
        """What is being copied."""
        return set(self._pinned)

    def remember(self, closure_ids: Iterable[str]) -> None:
        """These have lost a user: they are looked at by :meth:`retry` until somebody calls :meth:`forget`."""
        self._unretired.update(closure_ids)

    def forget(self, closure_id: str) -> None:
        """It has a user again."""
        self._unretired.discard(closure_id)
        self._warm.pop(closure_id, None)

    def is_warm(self, closure_id: str) -> bool:
        return closure_id in self._warm

    def part(self, closure_id: str, table: MountTable | None = None, *, keep: bool) -> Fate:
        """Unmount the shared overlays of what has no user, and throw it away unless it is to be kept.

        *table*: the mount table, when it was read after the user's last unmount.  :meth:`settle` must follow, and the
        closure's lock be held until then.  Raises Conflict when something foreign uses the view or farm, MountFailed,
        VolumeFailed, MountTableUnreadable.
        """
        table = self._mounts.table() if table is None else table
        used = any(trees.in_use(closure_id, table) for trees in self._trees)
        keep = keep and self._keep.count > 0 and self._keep.wanted(closure_id)
        if not used and keep and any(trees.exists(closure_id) for trees in self._trees):
            for trees in self._trees:
                self._mounts.unmount(trees.mountpoint(closure_id))
                trees.distrust(closure_id)
            return Fate.WARM
        for trees in self._trees:
            self.discard(trees, closure_id, table)
        return Fate.USED if used else Fate.GONE

    def discard(self, trees: Trees, closure_id: str, table: MountTable | None = None) -> bool:
        """Throw away the one of *trees*, unless a mount shows it; True when there is none (any more).

        Otherwise like :meth:`part`.
        """
        if trees.in_use(closure_id, self._mounts.table() if table is None else table):
            return False
        self._mounts.unmount(trees.mountpoint(closure_id))
        if trees.exists(closure_id):
            path = trees.path(closure_id)
            if users := self._mounts.table().using(path, "/" + "/".join(path.split("/")[-2:])):
                raise Conflict(
                    f"the {trees.noun} of {closure_id} is still used by the mount at {users[0].target}; unmount that"
                )
            trees.discard(closure_id)
        return True

    async def settle(self, closure_id: str, fate: Fate) -> None:
        """Release the GC root of a closure that is gone, or see to it that a kept one goes in time."""
        if fate is Fate.GONE and closure_id not in self._pinned:
            with explained(f"release the GC root of {closure_id}"):
                await self._closures.release(closure_id)
        self.forget(closure_id)
        if fate is Fate.WARM:
            self._warm[closure_id] = asyncio.get_running_loop().time() + self._keep.seconds
            if self._expiry is None or self._expiry.done():
                self._expiry = asyncio.create_task(self._expire(), name="cknix warm closures")

    async def retire(self, closure_id: str) -> bool:
        """Drop view and GC root of a closure that has no user; True when both are gone.  Its lock must be held.

        Raises what :meth:`part` and the store raise; :meth:`retry` then tries again.
        """
        self._unretired.add(closure_id)
        fate = await asyncio.to_thread(self.part, closure_id, keep=False)
        await self.settle(closure_id, fate)
        return fate is Fate.GONE and closure_id not in self._pinned

    async def try_to_retire(self, closure_id: str) -> bool:
        """:meth:`retire`; a failure is logged."""
        try:
            return await finish(self.retire(closure_id))
        except (CknixError, OSError) as error:
            self._warm.pop(closure_id, None)  # no longer by the clock, but with the next operation
            log.warning("still cannot drop %s: %s", closure_id, error)
            return False

    async def retry(self) -> None:
        """Drop what is warm beyond the number that is kept, and try again what earlier operations could not drop.

        Whoever is at work on a closure looks after it himself.
        """
        surplus = list(self._warm)[: max(0, len(self._warm) - self._keep.count)]
        await self._drop_idle({*surplus, *self._unretired})

    async def drop_all(self) -> list[str]:
        """Drop every view and farm that has no user and that nobody is at work on; returns those that are gone."""
        return await self._drop_idle({*self._warm, *self._unretired})

    async def close(self) -> None:
        """Keep nothing in mind any longer; the next start drops what is warm."""
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.wait({self._expiry})
        self._warm.clear()

    async def _drop_idle(self, closure_ids: Iterable[str]) -> list[str]:
        idle = (closure_id for closure_id in sorted(closure_ids) if not self._locks.taken(closure_key(closure_id)))
        return [closure_id for closure_id in idle if await self._drop(closure_id)]

    async def _drop(self, closure_id: str) -> bool:
        async with self._locks.hold(closure_key(closure_id)):
            if closure_id not in self._warm and closure_id not in self._unretired:
                return False
            return await self.try_to_retire(closure_id)

    async def _expire(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._warm:
            await asyncio.sleep(max(0.0, min(_LOOK_SECONDS, min(self._warm.values()) - clock())))
            ended = [
                closure_id
                for closure_id, until in self._warm.items()
                if until <= clock() or not self._keep.wanted(closure_id)
            ]
            for closure_id in ended:
                await self._drop(closure_id)
            if ended:
                self._trash.empty()
