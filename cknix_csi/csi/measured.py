"""Parts of a role that tell how long they took and how they ended, whatever is inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.closures import Fetcher
from cknix_csi.csi.housekeeping import CollectableStore
from cknix_csi.metrics.ports import Closure, CollectionMetrics, NodeMetrics
from cknix_csi.metrics.timing import timed
from cknix_csi.nix.collection import Collected, Space
from cknix_csi.nix.wants import Wants


@dataclass(slots=True)
class Publishing:
    """What a publish has found so far."""

    closure: Closure = "unknown"

    def is_mounted(self) -> None:
        """There is nothing to do."""
        self.closure = "mounted"

    def is_missing(self) -> None:
        """The closure, or a part of it, has to be fetched."""
        self.closure = "new"

    def is_here(self) -> None:
        """The closure is on this node, whether since now or not."""
        if self.closure == "unknown":
            self.closure = "known"


@contextmanager
def one_publish(metrics: NodeMetrics) -> Iterator[Publishing]:
    """The block is one publish."""
    found = Publishing()
    with timed(lambda outcome, seconds: metrics.publish(outcome, found.closure, seconds)):
        yield found


class MeasuredFetcher:
    """A :class:`Fetcher` that is *inner*."""

    def __init__(self, inner: Fetcher, metrics: NodeMetrics) -> None:
        self._inner = inner
        self._metrics = metrics
        self.is_valid = inner.is_valid
        self.hold = inner.hold
        self.release = inner.release
        self.release_all = inner.release_all

    async def fetch(self, path: StorePath, progress: Callable[[Progress], None]) -> None:
        with timed(self._metrics.fetch):
            await self._inner.fetch(path, progress)


class MeasuredStore:
    """A :class:`CollectableStore` that is *inner*."""

    def __init__(self, inner: CollectableStore, metrics: CollectionMetrics) -> None:
        self._inner = inner
        self._metrics = metrics

    async def space(self) -> Space:
        return await self._inner.space()

    async def collect(self, want: int, order: Sequence[StorePath], wants: Callable[[], Wants]) -> Collected:
        collected = Collected(0, 0, ())

        def tell(outcome: str, seconds: float) -> None:
            self._metrics.collection(outcome, seconds, collected.bytes_freed, collected.paths)

        with timed(tell):
            collected = await self._inner.collect(want, order, wants)
        return collected
