"""The node daemon's neighbours, as far as no kernel, no Nix and no API server is needed to show what csi does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cknix_csi.api.errors import CknixError, NotFound
from cknix_csi.api.expression import PENDING, Observed
from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes.volumes import Publication, PublishRequest

SYSTEM = "x86_64-linux"
HELLO = StorePath.parse("/nix/store/" + "1" * 32 + "-hello-2.12")
OTHER = StorePath.parse("/nix/store/" + "2" * 32 + "-other-1.0")


class FakeVolumes:
    """Mounts in a dictionary.  ``open`` gates publish; ``failure`` is raised by it once."""

    def __init__(self) -> None:
        self.mounted: dict[Path, Publication] = {}
        self.calls: list[str] = []
        self.open = asyncio.Event()
        self.open.set()
        self.entered = asyncio.Event()
        self.failure: BaseException | None = None
        self.reconciling = asyncio.Event()
        self.reconciling.set()

    async def publish(self, request: PublishRequest) -> None:
        self.calls.append(f"publish {request.volume_id}")
        self.entered.set()
        try:
            await self.open.wait()
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
        except BaseException:
            await asyncio.sleep(0)  # undoing takes time, and is awaited
            self.calls.append(f"undone {request.volume_id}")
            raise
        self.mounted[request.target] = Publication(request.root.basename, request.writable)

    async def unpublish(self, volume_id: str, target: Path) -> None:
        self.calls.append(f"unpublish {volume_id}")
        self.mounted.pop(target, None)

    def published(self, target: Path) -> Publication | None:
        return self.mounted.get(target)

    async def reconcile(self) -> object:
        self.calls.append("reconcile")
        await self.reconciling.wait()
        return None


class FakeFetcher:
    """A store in a set.  ``open`` gates fetch; ``failure`` is raised by every fetch while it is set."""

    def __init__(self, *valid: StorePath) -> None:
        self.valid = set(valid)
        self.held: set[StorePath] = set()
        self.fetched: list[StorePath] = []
        self.held_while_fetching: list[bool] = []
        self.open = asyncio.Event()
        self.open.set()
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.failure: CknixError | None = None
        self.progress = Progress(3, 17, ("python3-3.12",))

    async def is_valid(self, path: StorePath) -> bool:
        return path in self.valid

    async def fetch(self, path: StorePath, progress: Callable[[Progress], None]) -> None:
        self.fetched.append(path)
        self.held_while_fetching.append(path in self.held)
        progress(self.progress)
        self.started.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.failure is not None:
            raise self.failure
        self.valid.add(path)

    async def hold(self, path: StorePath) -> None:
        self.held.add(path)

    async def release(self, path: StorePath) -> None:
        self.held.discard(path)

    async def release_all(self) -> None:
        self.held.clear()


@dataclass
class FakeExpressions:
    """Expressions in a dictionary; :meth:`put` wakes those who wait for a change."""

    known: dict[tuple[str, str], Observed] = field(default_factory=dict)
    failure: CknixError | None = None
    silent: bool = False
    waiters: int = 0
    _condition: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def put(self, observed: Observed) -> None:
        async with self._condition:
            self.known[observed.namespace, observed.name] = observed
            self._condition.notify_all()

    async def delete(self, namespace: str, name: str) -> None:
        async with self._condition:
            del self.known[namespace, name]
            self._condition.notify_all()

    async def get(self, namespace: str, name: str) -> Observed:
        if self.silent:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        try:
            return self.known[namespace, name]
        except KeyError:
            raise NotFound(f"{namespace}/{name}") from None

    async def changed(self, seen: Observed) -> Observed:
        key = (seen.namespace, seen.name)
        async with self._condition:
            self.waiters += 1
            self._condition.notify_all()
            try:
                await self._condition.wait_for(lambda: self.known.get(key) != seen)
            finally:
                self.waiters -= 1
        if key not in self.known:
            raise NotFound(str(seen))
        return self.known[key]

    async def watched(self) -> None:
        """Wait until somebody waits for a change."""
        async with self._condition:
            await self._condition.wait_for(lambda: self.waiters > 0)


def expression(
    *,
    phase: str = PENDING,
    results: dict[str, StorePath] | None = None,
    generation: int = 1,
    observed_generation: int | None = None,
    message: str = "",
) -> Observed:
    """Expression default/hello in the given state."""
    return Observed(
        namespace="default",
        name="hello",
        uid="u-1",
        generation=generation,
        observed_generation=generation if observed_generation is None else observed_generation,
        phase=phase,
        message=message,
        results=results or {},
        ready=bool(results),
    )
