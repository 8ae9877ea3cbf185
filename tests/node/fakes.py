"""The node daemon's neighbours, as far as no kernel, no Nix and no API server is needed to show what csi does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cknix_csi.api.attributes import PodInfo
from cknix_csi.api.errors import CknixError, NotFound
from cknix_csi.api.expression import PENDING, Observed
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.progress import Progress
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes.choose import PresentationUnavailable, Wish
from cknix_csi.volumes.copies import CopyCost
from cknix_csi.volumes.farm import FarmReport
from cknix_csi.volumes.usage import Amount, Measured
from cknix_csi.volumes.volumes import Made, Publication, PublishRequest

SYSTEM = "x86_64-linux"
HELLO = StorePath.parse("/nix/store/" + "1" * 32 + "-hello-2.12")
OTHER = StorePath.parse("/nix/store/" + "2" * 32 + "-other-1.0")


class FakeVolumes:
    """Mounts in a dictionary.  ``open`` gates publish; each of ``failures`` is raised by it once, in their order."""

    def __init__(self) -> None:
        self.mounted: dict[Path, Publication] = {}
        self.calls: list[str] = []
        self.requests: list[PublishRequest] = []
        self.open = asyncio.Event()
        self.open.set()
        self.entered = asyncio.Event()
        self.unmounting = asyncio.Event()
        """Gates unpublish."""
        self.unmounting.set()
        self.failures: list[BaseException] = []
        self.copied: str | None = None
        """What :meth:`copying` says of any volume."""
        self.reconciling = asyncio.Event()
        self.reconciling.set()
        self.measured = Measured(Amount(total=300, used=200, available=100), None)

    @property
    def failure(self) -> BaseException | None:
        """The next publish raises it, and no other."""
        return self.failures[0] if self.failures else None

    @failure.setter
    def failure(self, failure: BaseException) -> None:
        self.failures = [failure]

    async def require(self, wanted: Wish) -> None:
        if wanted.writable and not wanted.host_users and wanted.asked is not Presentation.COPY:
            raise PresentationUnavailable("not this way", Situation.PRESENTATION_IMPOSSIBLE)

    async def publish(self, request: PublishRequest) -> Made | None:
        self.calls.append(f"publish {request.volume_id}")
        self.requests.append(request)
        self.entered.set()
        try:
            await self.open.wait()
            if self.failures:
                raise self.failures.pop(0)
        except BaseException:
            await asyncio.sleep(0)  # undoing takes time, and is awaited
            self.calls.append(f"undone {request.volume_id}")
            raise
        limit = request.limit.whole() if request.limit else None
        made = request.presentation or Presentation.REDIRECT
        self.mounted[request.target] = Publication(request.root.basename, request.writable, limit, made)
        cost = CopyCost(FarmReport(copied=12, bytes_copied=3456), 0.25)
        return Made(made, "a reason", cost if made is Presentation.COPY else None)

    def copying(self, volume_id: str, target: Path) -> str | None:
        return self.copied

    async def unpublish(self, volume_id: str, target: Path) -> None:
        self.calls.append(f"unpublish {volume_id}")
        await self.unmounting.wait()
        self.mounted.pop(target, None)

    def published(self, target: Path) -> Publication | None:
        return self.mounted.get(target)

    def publications(self) -> dict[str, Publication]:
        return {str(target): publication for target, publication in self.mounted.items()}

    async def measure(self, volume_id: str, target: Path) -> Measured:
        if target not in self.mounted:
            raise NotFound(f"{volume_id} at {target}")
        return self.measured

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


class FakePods:
    """Pods by name: whether they use the host's users, or what asking for them raises.  ``silent`` never answers."""

    def __init__(self) -> None:
        self.known: dict[str, bool | CknixError] = {}
        self.asked: list[PodInfo] = []
        self.silent = False
        self.ended: set[str] = set()
        """The uids of pods that are being deleted; see :meth:`end`."""
        self._tell: Callable[[str], None] = lambda uid: None

    def end(self, uid: str) -> None:
        """Somebody deletes the pod."""
        self.ended.add(uid)
        self._tell(uid)

    def ending(self, pod: PodInfo) -> bool:
        return pod.uid in self.ended

    def on_ending(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    async def host_users(self, pod: PodInfo) -> bool:
        self.asked.append(pod)
        if self.silent:
            await asyncio.Event().wait()
        answer = self.known.get(pod.name, NotFound(pod.name))
        if isinstance(answer, CknixError):
            raise answer
        return answer


class FakeEvents:
    """Events in a list: the pod's name, reason and message."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, str, str]] = []

    def post(self, pod: PodInfo, reason: str, message: str) -> None:
        self.posted.append((pod.name, reason, message))


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
