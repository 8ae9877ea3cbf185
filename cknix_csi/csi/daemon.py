"""The node daemon: its parts put together, started and stopped in the order that kubelet needs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cknix_csi.api.errors import CknixError, Invalid, Problem
from cknix_csi.api.limits import SizePolicy
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.identity import Identity
from cknix_csi.csi.node import Node
from cknix_csi.csi.pods import PodEvents, Pods
from cknix_csi.csi.presence import LOOK_SECONDS, Kept, keep, until
from cknix_csi.csi.publisher import Publisher, Volumes
from cknix_csi.csi.readiness import Readiness, Step
from cknix_csi.csi.records import Records
from cknix_csi.csi.registration import Registration
from cknix_csi.csi.remembered import RememberedResults
from cknix_csi.csi.resolve import Expressions, Resolver
from cknix_csi.csi.room import NO_MATTER, Room
from cknix_csi.csi.server import Served, serve
from cknix_csi.csi.stats import Measures
from cknix_csi.csi.storepaths import StorePathRule
from cknix_csi.metrics.ports import NodeMetrics
from cknix_csi.settings import DRIVER_NAME
from cknix_csi.volumes.ledger import Ledger

log = logging.getLogger(__name__)

# CSI spec, "NodeGetInfo": more must not be sent.
MAX_NODE_ID = 256

Keeping = Callable[[], Coroutine[Any, Any, None]]
"""Runs until it is cancelled."""


class NodeVolumes(Volumes, Measures, Protocol):
    """All that a node daemon asks of volumes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDependencies:
    """What a node daemon is made of.  Raises :class:`Invalid` when a value cannot work."""

    node_id: str
    """The Kubernetes node's name."""
    system: str
    """The node's Nix system."""
    endpoint: Path
    """The CSI socket, at the same path for this process and for kubelet."""
    registration: Path | None
    """The socket in kubelet's plugins_registry directory; None: there is no kubelet."""
    volumes: NodeVolumes
    closures: ClosureService
    expressions: Expressions | None
    """Its watch is run by the caller; None: there is no Kubernetes."""
    budget: float
    """Seconds an RPC may wait before it answers "in progress"."""
    remembered: RememberedResults | None = None
    """Last known results of Expressions; None: nothing is remembered from one process to the next."""
    sizes: SizePolicy = field(default_factory=SizePolicy)
    """How much writable volumes may hold."""
    store_paths: StorePathRule = field(default_factory=StorePathRule)
    """Which store paths pods may name."""
    pods: Pods | None = None
    """Its watch is run by the caller; None: there is no Kubernetes."""
    events: PodEvents | None = None
    """Their sending is run by the caller; None: nobody is told."""
    ledger: Ledger | None = None
    """What is published where; None: nobody takes notes."""
    metrics: NodeMetrics = field(default_factory=NodeMetrics)
    """Told of every call and what it has led to."""
    readiness: Readiness = field(default_factory=Readiness)
    """Told how far this daemon has come."""
    room: Room = NO_MATTER
    """Told when a mount finds the node's disk full."""
    in_order: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once what an earlier daemon left is in order: before, nothing tells what is garbage."""
    grace: float = 20.0
    """Seconds that calls get to finish when the daemon stops."""
    look: float = LOOK_SECONDS
    """Seconds between two looks whether the sockets are still there."""

    def __post_init__(self) -> None:
        size = len(self.node_id.encode())
        if not 0 < size <= MAX_NODE_ID:
            remedy = f"set it to the node's name (1 to {MAX_NODE_ID} bytes)"
            raise Invalid([Problem("environment variable KUBE_NODE_NAME", f"is {size} bytes long; {remedy}")])


async def run_node(node: NodeDependencies, stop: asyncio.Event) -> None:
    """Serve until *stop* is set.  Raises what :func:`serving` raises."""
    async with serving(node) as keeping:
        await until(stop, keeping())


@asynccontextmanager
async def serving(node: NodeDependencies) -> AsyncIterator[Keeping]:
    """The node daemon runs inside this block; kubelet can publish volumes when it is entered.

    Gives what is to run inside, so that kubelet can do so as long, whatever happens to the sockets or to kubelet.

    First what an earlier daemon left is put in order, then the CSI socket appears, and last the one that makes kubelet
    look.  In reverse at the end; volumes that are mounted stay as they are.  Raises :class:`SocketUnavailable`.
    """
    # First, since it takes the data root: what another daemon holds there must not be touched.
    await node.volumes.reconcile()
    await node.closures.start()
    publisher = Publisher(
        volumes=node.volumes,
        closures=node.closures,
        resolver=Resolver(node.system, node.expressions, node.remembered),
        budget=node.budget,
        sizes=node.sizes,
        pods=node.pods,
        events=node.events,
        records=Records(node.ledger),
        room=node.room,
        store_paths=node.store_paths,
        metrics=node.metrics,
    )
    service = Node(node_id=node.node_id, system=node.system, publisher=publisher, measures=node.volumes)
    try:
        async with AsyncExitStack() as kept:
            await _take_stock(node)
            if node.remembered is not None:
                await kept.enter_async_context(node.remembered.kept())
            node.readiness.reach(Step.RECONCILED)
            identity, observe = Identity(node.readiness.check), node.metrics.rpc
            async with serve([identity, service], node.endpoint, grace=node.grace, observe=observe) as served:
                node.readiness.reach(Step.SERVED)
                try:
                    async with _registered(node, served) as keeping:
                        yield keeping
                finally:
                    node.readiness.leave(Step.SERVED)
                    publisher.drain()
    finally:
        try:
            await publisher.close()
            await node.closures.close()
        finally:
            if node.ledger is not None:
                await node.ledger.close()


async def _take_stock(node: NodeDependencies) -> None:
    """Open the ledger and bring it to agree with the mount table; then all is in order."""
    if node.ledger is not None:
        await node.ledger.open()
        try:
            corrections = node.ledger.reconcile(await asyncio.to_thread(node.volumes.publications))
        except CknixError as error:  # volumes need no ledger
            log.warning("the ledger was not compared with the mount table: %s", error)
        else:
            if words := corrections.words():
                log.info("the ledger did not agree with the mount table: %s", words)
    node.in_order.set()


@asynccontextmanager
async def _registered(node: NodeDependencies, served: Served) -> AsyncIterator[Keeping]:
    readiness = node.readiness
    reached, left = partial(readiness.reach, Step.SERVED), partial(readiness.leave, Step.SERVED)
    csi = Kept(socket=served, lost=left, served=reached, found=reached)
    if node.registration is None:
        yield partial(keep, [csi], seconds=node.look)
        return
    reached, left = partial(readiness.reach, Step.REGISTERED), partial(readiness.leave, Step.REGISTERED)
    registration = Registration(driver=DRIVER_NAME, endpoint=node.endpoint, taken=reached, refused=left)
    async with serve([registration], node.registration, grace=node.grace) as offered:

        async def keeping() -> None:
            async with asyncio.TaskGroup() as tasks:
                # In this order: kubelet calls the first as soon as it sees the second.
                sockets = [csi, Kept(socket=offered, lost=left, found=registration.offer)]
                tasks.create_task(keep(sockets, seconds=node.look))
                tasks.create_task(registration.offering(offered.show_again))

        yield keeping
