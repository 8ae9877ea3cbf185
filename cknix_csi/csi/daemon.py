"""The node daemon: its parts put together, started and stopped in the order that kubelet needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.identity import Identity
from cknix_csi.csi.node import Node
from cknix_csi.csi.publisher import Publisher, Volumes
from cknix_csi.csi.registration import Registration
from cknix_csi.csi.resolve import Expressions, Resolver
from cknix_csi.csi.server import serve
from cknix_csi.settings import DRIVER_NAME

# CSI spec, "NodeGetInfo": more must not be sent.
MAX_NODE_ID = 256


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
    volumes: Volumes
    closures: ClosureService
    expressions: Expressions | None
    """Its watch is run by the caller; None: there is no Kubernetes."""
    budget: float
    """Seconds an RPC may wait before it answers "in progress"."""
    grace: float = 20.0
    """Seconds that calls get to finish when the daemon stops."""

    def __post_init__(self) -> None:
        size = len(self.node_id.encode())
        if not 0 < size <= MAX_NODE_ID:
            remedy = f"set it to the node's name (1 to {MAX_NODE_ID} bytes)"
            raise Invalid([Problem("environment variable KUBE_NODE_NAME", f"is {size} bytes long; {remedy}")])


async def run_node(node: NodeDependencies, stop: asyncio.Event) -> None:
    """Serve until *stop* is set.

    Raises :class:`RegistrationRefused` when kubelet does not take the driver, and what :func:`serving` raises.
    """
    async with serving(node) as registration:
        if registration is None:
            await stop.wait()
            return
        waits = {asyncio.create_task(stop.wait()), asyncio.create_task(registration.refused())}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


@asynccontextmanager
async def serving(node: NodeDependencies) -> AsyncIterator[Registration | None]:
    """The node daemon runs inside this block; kubelet can publish volumes when it is entered.

    First what an earlier daemon left is put in order, then the CSI socket appears, and last the one that makes kubelet
    look.  In reverse at the end; volumes that are mounted stay as they are.  Raises :class:`SocketUnavailable`.
    """
    # First, since it takes the data root: what another daemon holds there must not be touched.
    await node.volumes.reconcile()
    await node.closures.start()
    publisher = Publisher(
        volumes=node.volumes,
        closures=node.closures,
        resolver=Resolver(node.system, node.expressions),
        budget=node.budget,
    )
    service = Node(node_id=node.node_id, system=node.system, publisher=publisher)
    try:
        async with serve([Identity(), service], node.endpoint, grace=node.grace):
            try:
                async with _registered(node) as registration:
                    yield registration
            finally:
                publisher.drain()
    finally:
        await publisher.close()
        await node.closures.close()


@asynccontextmanager
async def _registered(node: NodeDependencies) -> AsyncIterator[Registration | None]:
    if node.registration is None:
        yield None
        return
    registration = Registration(driver=DRIVER_NAME, endpoint=node.endpoint)
    async with serve([registration], node.registration, grace=node.grace):
        yield registration
