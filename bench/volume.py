"""The driver's own volumes, as the benchmark drives them, with the time of each step of a publish."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.room import Room, remove
from cknix_csi.api.closure import Closure
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.store import Store
from cknix_csi.volumes.mounts import KernelMounts, Upper
from cknix_csi.volumes.volumes import PublishRequest, Volumes


def volume_id(number: object) -> str:
    """As long as kubelet's ids of inline volumes are."""
    return f"csi-{hashlib.sha256(str(number).encode()).hexdigest()}"


@dataclass(slots=True)
class Stages:
    """Seconds by step, added up."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began


class TimedClosures(StoreClosures):
    """A store's closures that tell how long each step takes."""

    def __init__(self, store: Store, stages: Stages) -> None:
        super().__init__(store)
        self._stages = stages

    async def hold(self, closure_id: str, root: StorePath) -> None:
        with self._stages.timed("GC root"):
            await super().hold(closure_id, root)

    async def query(self, root: StorePath) -> Closure:
        with self._stages.timed("closure query"):
            return await super().query(root)

    async def write_state(self, closure: Closure, directory: Path) -> None:
        with self._stages.timed("database"):
            await super().write_state(closure, directory)


class TimedMounts(KernelMounts):
    """The kernel's mounts, timed."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def overlay(self, target: str, *, source: str, lower: Sequence[str], upper: Upper | None) -> None:
        with self._stages.timed("mounts"):
            super().overlay(target, source=source, lower=lower, upper=upper)

    def clone(self, source: str, target: str, *, writable: bool) -> None:
        with self._stages.timed("mounts"):
            super().clone(source, target, writable=writable)


@dataclass(slots=True)
class Node:
    """Volumes on a data root of their own, and pods beside it."""

    path: Path
    volumes: Volumes
    stages: Stages

    @property
    def data(self) -> Path:
        return self.path / "data"

    def target(self, pod: object) -> Path:
        """Where kubelet wants the volume of *pod*; its parent is made."""
        parent = self.path / f"pods/{pod}"
        parent.mkdir(parents=True, exist_ok=True)
        return parent / "mount"

    async def publish(self, pod: object, root: StorePath, *, writable: bool = False) -> float:
        """Seconds it took."""
        request = PublishRequest(volume_id(pod), self.target(pod), root, writable)
        began = time.perf_counter()
        await self.volumes.publish(request)
        return time.perf_counter() - began

    async def unpublish(self, pod: object) -> float:
        target = self.target(pod)
        began = time.perf_counter()
        await self.volumes.unpublish(volume_id(pod), target)
        return time.perf_counter() - began


@asynccontextmanager
async def node(room: Room, store: Store) -> AsyncIterator[Node]:
    """A node that knows no closure yet.  The caller has unpublished everything when the block ends."""
    path = room.scratch / f"node-{uuid.uuid4().hex}"
    (path / "data").mkdir(parents=True)
    stages = Stages()
    volumes = Volumes(path / "data", TimedClosures(store, stages), TimedMounts(stages))
    try:
        await volumes.reconcile()
        yield Node(path, volumes, stages)
    finally:
        await volumes.close()
        remove(path)


async def first_publishes(room: Room, store: Store, root: StorePath, count: int) -> tuple[list[float], list[Stages]]:
    """*count* publishes by nodes that have the closure in the store and no view of it, after one to warm up.

    None is unpublished before all are measured.
    """
    seconds: list[float] = []
    stages: list[Stages] = []
    async with AsyncExitStack() as published:
        for _ in range(count + 1):
            fresh = await published.enter_async_context(node(room, store))
            await _publish_first(room, fresh, root, seconds, stages)
            published.push_async_callback(fresh.unpublish, "first")
    return seconds[1:], stages[1:]


async def republishes(room: Room, store: Store, root: StorePath, count: int) -> list[float]:
    """As :func:`first_publishes`, each right after the view of the one before has been deleted.

    ext4 passes over inodes for minutes after it has freed them, one by one, for each that it gives out
    (``recently_deleted`` in fs/ext4/ialloc.c).
    """
    seconds: list[float] = []
    for _ in range(count):
        async with node(room, store) as fresh:
            await _publish_first(room, fresh, root, seconds, [])
            await fresh.unpublish("first")
    return seconds


async def _publish_first(room: Room, fresh: Node, root: StorePath, seconds: list[float], stages: list[Stages]) -> None:
    room.settle()  # or the publish waits for what was written or deleted before it
    began = time.process_time()
    seconds.append(await fresh.publish("first", root))
    fresh.stages.seconds["CPU"] = time.process_time() - began
    stages.append(fresh.stages)


async def further_publishes(
    on: Node, root: StorePath, count: int, *, writable: bool
) -> tuple[list[float], list[float]]:
    """Publishes and unpublishes of *count* pods, of a closure that is published already."""
    pods = [f"{'writable' if writable else 'read-only'}-{number}" for number in range(count)]
    published = [await on.publish(pod, root, writable=writable) for pod in pods]
    return published, [await on.unpublish(pod) for pod in pods]
