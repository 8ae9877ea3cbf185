"""What each role shows to Prometheus and to kubelet's probes, wired."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

from cknix_csi.api.errors import CknixError
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.situations import Situation
from cknix_csi.csi.housekeeping import CollectableStore
from cknix_csi.csi.measured import MeasuredStore
from cknix_csi.csi.readiness import Readiness, Step
from cknix_csi.metrics.calls import CallCounts
from cknix_csi.metrics.controller import CacheCounts, ControllerCounts
from cknix_csi.metrics.exposition import CollectionCounts, Exposition
from cknix_csi.metrics.node import Holdings, NodeCounts, Notes
from cknix_csi.metrics.pages import lives
from cknix_csi.metrics.web import answering
from cknix_csi.volumes.ledger import Ledger
from cknix_csi.volumes.volumes import Inventory, Volumes


class NodeMonitoring:
    """Of the node daemon."""

    def __init__(self, data_root: Path, volumes: Volumes, ledger: Ledger) -> None:
        self.exposition = Exposition("node", data_root)
        self.metrics = NodeCounts(self.exposition)
        self.collections = CollectionCounts(self.exposition.registry)
        self.readiness = Readiness(check=volumes.check)
        self.metrics.show_holdings(lambda: _holdings(volumes.inventory()))
        self.metrics.show_ledger(lambda: Notes(*ledger.count(), written=ledger.is_written))

    def measured(self, store: CollectableStore) -> CollectableStore:
        """*store*, whose collections are counted."""
        return MeasuredStore(store, self.collections)

    def served(self, address: tuple[str, int] | None) -> AbstractAsyncContextManager[None]:
        """See :func:`_served`."""
        return _served(address, self.exposition, self.readiness)


class ProvisionerMonitoring:
    """Of the provisioner, which has no disk."""

    def __init__(self) -> None:
        self.exposition = Exposition("provisioner", None)
        self.calls = CallCounts(self.exposition.registry)
        self.readiness = Readiness([Step.SERVED])

    def served(self, address: tuple[str, int] | None) -> AbstractAsyncContextManager[None]:
        """See :func:`_served`."""
        return _served(address, self.exposition, self.readiness)


class ControllerMonitoring:
    """Of the controller."""

    def __init__(self, data_root: Path) -> None:
        self.exposition = Exposition("controller", data_root)
        self.metrics = ControllerCounts(self.exposition)
        self.cache = CacheCounts(self.exposition)
        self.collections = CollectionCounts(self.exposition.registry)

    def measured(self, store: CollectableStore) -> CollectableStore:
        """*store*, whose collections are counted."""
        return MeasuredStore(store, self.collections)


@asynccontextmanager
async def _served(address: tuple[str, int] | None, exposition: Exposition, readiness: Readiness) -> AsyncIterator[None]:
    """Answer metrics and health at *address* (host, port) during the block, if there is one.

    Raises CknixError when nobody can listen there.
    """
    pages = {"/metrics": exposition.page, "/livez": lives, "/readyz": readiness.page}
    async with AsyncExitStack() as kept:
        try:
            await kept.enter_async_context(answering(address, pages))
        except OSError as error:
            raise CknixError(
                f"cannot listen where CKNIX_METRICS_LISTEN says: {error.strerror}; set another address, or off",
                Situation.SOCKET_UNAVAILABLE,
            ) from error
        yield


def _holdings(found: Inventory) -> Holdings:
    volumes = {
        (presentation.value, writable): found.mounted.get((presentation, writable), 0)
        for presentation in Presentation
        for writable in (False, True)
    }
    return Holdings(volumes, found.trees.get(Presentation.REDIRECT, 0), found.trees.get(Presentation.HARDLINK, 0))
