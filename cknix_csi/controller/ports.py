"""What the controller needs of the rest of the program, as small protocols: the real ones are in ``nix``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from cknix_csi.api.closure import Closure
from cknix_csi.api.expression import Data
from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import StorePath
from cknix_csi.kube.api import Api
from cknix_csi.kube.lease import Timing
from cknix_csi.metrics.pages import Page
from cknix_csi.metrics.ports import ControllerMetrics
from cknix_csi.nix.cache.signing import KeyPair
from cknix_csi.nix.nix import Evaluation
from cknix_csi.settings import ANY


class Nix(Protocol):
    """Evaluation and builds.  Cancelling a call ends its processes before the cancellation goes on."""

    async def evaluate(self, data: Data, system: str) -> Evaluation:
        """Raises ``EvaluationFailed`` or ``DeadlineExceeded``."""

    async def build(self, evaluation: Evaluation, *, progress: Callable[[Progress], None]) -> None:
        """Makes the result valid.  Raises ``BuildFailed`` or ``DeadlineExceeded``."""

    async def substitute(self, path: StorePath) -> None:
        """Makes *path* valid without building anything.  Raises ``BuildFailed`` when no substituter has it."""


class Closures(Protocol):
    """The store's database."""

    async def is_valid(self, path: StorePath) -> bool:
        """Whether *path* is in the store."""

    async def query(self, root: StorePath) -> Closure:
        """Raises ``PathNotValid``."""


class Roots(Protocol):
    """GC roots by name; synchronous, called in a thread."""

    def add(self, name: str, path: StorePath) -> None: ...

    def remove(self, name: str) -> None:
        """No root of that name is no error."""

    def list(self) -> dict[str, StorePath]: ...


@dataclass(frozen=True, slots=True)
class Options:
    """How the controller works."""

    namespace: str
    """Where the driver is installed: its Secret and ConfigMap live there."""
    cache_url: str
    """What nodes are told to fetch from."""
    node: str
    """Name of the node this controller runs on."""
    systems: tuple[str, ...]
    """Systems this controller can build for; the first is its own."""
    max_builds: int
    retry_first: float = 5.0
    """Seconds before the first retry after a failure of the infrastructure; then growing, jittered."""
    retry_cap: float = 300.0
    health: tuple[str, int] | None = (ANY, 8081)  # in a pod's own network namespace
    """Host and port of ``/livez`` and ``/metrics``."""
    check_seconds: float = 3600.0
    """How often the store is looked at for results that it has lost."""
    lease: Timing = field(default_factory=Timing)
    """How two controllers take turns."""


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Everything :func:`cknix_csi.controller.app.run_controller` is given."""

    api: Api
    nix: Nix
    closures: Closures
    roots: Roots
    serve_cache: Callable[[KeyPair], Coroutine[Any, Any, None]]
    """Serves the store, signed with the key, until cancelled."""
    generate_key: Callable[[str], KeyPair]
    options: Options
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    metrics: ControllerMetrics = field(default_factory=ControllerMetrics)
    """Told of the work."""
    metrics_page: Page | None = None
    """What ``/metrics`` gives; None: there is none."""
