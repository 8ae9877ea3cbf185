"""A node daemon in this process, on its own sockets, and clients for it."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from grpclib.client import Channel

from cknix_csi.api.limits import SizePolicy
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.daemon import NodeDependencies, run_node
from cknix_csi.csi.readiness import Readiness
from cknix_csi.nix.cache.signing import generate_key
from cknix_csi.proto.csi_grpc import IdentityStub, NodeStub
from cknix_csi.proto.csi_pb2 import NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability
from tests import nixes
from tests.api import rbac
from tests.api.server import Server
from tests.cluster.harness.scratch import scratch_base
from tests.nix.cache_process import cache_process
from tests.nixes import remove
from tests.node.fakes import HELLO, SYSTEM, FakeEvents, FakeExpressions, FakeFetcher, FakePods, FakeVolumes
from tests.node.hatchery import Hatchery
from tests.node.whole import Cluster, Source, WholeNode

LIMIT = 10.0
"""Seconds after which a state that was waited for counts as not reached."""


class NodeUnderTest:
    """Neighbours that a test controls, and the daemon between them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.endpoint = directory / "csi.sock"
        self.registration = directory / "reg.sock"
        self.volumes = FakeVolumes()
        self.fetcher = FakeFetcher(HELLO)
        self.expressions = FakeExpressions()
        self.pods = FakePods()
        self.events = FakeEvents()
        self.stop = asyncio.Event()
        self.budget = 30.0
        self.sizes = SizePolicy()
        self.grace = LIMIT
        self.readiness = Readiness()
        self.target = directory / "pods/1/mount"
        self.daemon: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """The daemon serves; at the end it is stopped as by SIGTERM, and must end without error."""
        async with self.started() as daemon:
            await exists(self.registration)
            yield daemon
        await daemon

    @asynccontextmanager
    async def started(self) -> AsyncIterator[asyncio.Task[None]]:
        """The daemon's task, which may fail."""
        dependencies = NodeDependencies(
            node_id="node-1",
            system=SYSTEM,
            endpoint=self.endpoint,
            registration=self.registration,
            volumes=self.volumes,
            closures=ClosureService(self.fetcher),
            expressions=self.expressions,
            budget=self.budget,
            sizes=self.sizes,
            pods=self.pods,
            events=self.events,
            grace=self.grace,
            readiness=self.readiness,
            look=0.02,
        )
        daemon = asyncio.create_task(run_node(dependencies, self.stop))
        try:
            yield daemon
        finally:
            self.stop.set()
            await asyncio.wait({daemon}, timeout=2 * LIMIT)
            assert daemon.done()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[NodeStub]:
        async with Channel(path=str(self.endpoint)) as channel:
            yield NodeStub(channel)

    @asynccontextmanager
    async def identity(self) -> AsyncIterator[IdentityStub]:
        async with Channel(path=str(self.endpoint)) as channel:
            yield IdentityStub(channel)

    def publish_request(self, **attributes: str) -> NodePublishVolumeRequest:
        """A read-only volume v1 at :attr:`target`, of HELLO unless *attributes* say otherwise."""
        return NodePublishVolumeRequest(
            volume_id="v1",
            target_path=str(self.target),
            readonly=True,
            volume_capability=VolumeCapability(
                mount=VolumeCapability.MountVolume(),
                access_mode=VolumeCapability.AccessMode(
                    mode=VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER,
                ),
            ),
            volume_context=attributes or {"storePath": str(HELLO)},
        )

    def unpublish_request(self) -> NodeUnpublishVolumeRequest:
        return NodeUnpublishVolumeRequest(volume_id="v1", target_path=str(self.target))


async def exists(path: Path) -> None:
    """Wait until there is something at *path*."""
    async with asyncio.timeout(LIMIT):
        while not path.exists():
            await asyncio.sleep(0.002)


async def gone(path: Path) -> None:
    """Wait until there is nothing at *path*."""
    async with asyncio.timeout(LIMIT):
        while path.exists():
            await asyncio.sleep(0.002)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory whose path is short enough for sockets in it."""
    directory = Path(tempfile.mkdtemp(prefix="cknix-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
async def node(scratch: Path) -> NodeUnderTest:
    return NodeUnderTest(scratch)


@pytest.fixture(scope="session")
def whole_scratch() -> Iterator[Path]:
    """A directory on a disk's file system (an overlay cannot be the upper layer of another), with a short path."""
    if os.geteuid() != 0:
        pytest.skip("the whole node daemon mounts file systems: run as root")
    directory = Path(tempfile.mkdtemp(prefix="cknix-node-", dir=scratch_base())).resolve()
    yield directory
    remove(directory)


@pytest.fixture(scope="session")
def source(whole_scratch: Path) -> Source:
    """What the cluster's cache serves."""
    return Source.build(nixes.nix("trixie"), whole_scratch / "source")


@pytest.fixture(scope="session")
def surroundings(whole_scratch: Path, source: Source) -> Iterator[Cluster]:
    """A real API server with the rights of yaml/, and the cache."""
    key = generate_key("cknix-cache-1")
    directory = whole_scratch / "api"
    directory.mkdir()
    server = Server(directory)
    try:
        server.start()
        rbac.install(server)
        with cache_process(source.env.root, key) as served:
            cluster = Cluster(server, served.port, key)
            yield cluster
            cluster.close()
    finally:
        server.stop()


@pytest.fixture
async def cluster(surroundings: Cluster) -> AsyncIterator[Cluster]:
    """Everything outside of the node, in order."""
    await surroundings.use_cache()
    yield surroundings
    surroundings.reopen()
    surroundings.evict()


@pytest.fixture(scope="session")
def hatchery() -> Iterator[Hatchery]:
    hatchery = Hatchery()
    yield hatchery
    hatchery.close()


NewNode = Callable[[str], AbstractContextManager[WholeNode]]


@pytest.fixture(scope="session")
def new_node(whole_scratch: Path, surroundings: Cluster, hatchery: Hatchery) -> NewNode:
    """Makes nodes, each with the Nix of a Debian suite, and takes them away whatever has become of them."""

    @contextmanager
    def make(suite: str) -> Iterator[WholeNode]:
        directory = Path(tempfile.mkdtemp(prefix="n", dir=whole_scratch))
        node = WholeNode(directory, nixes.nix(suite), surroundings.kubeconfig, hatchery)
        try:
            yield node
            node.require_responsive()
        finally:
            print(node.log())  # shown when a test fails
            node.destroy()

    return make


@pytest.fixture
async def whole(new_node: NewNode, cluster: Cluster) -> AsyncIterator[WholeNode]:
    """A new node; the test starts its daemon.  Whatever the test did: unpublishing leaves nothing."""
    with new_node("trixie") as node:
        yield node
        cluster.reopen()
        await node.unpublish_all()


@pytest.fixture(params=nixes.selected(), ids=nixes.name_of)
async def any_nix(request: pytest.FixtureRequest, new_node: NewNode, cluster: Cluster) -> AsyncIterator[WholeNode]:
    """As ``whole``, once with each supported Nix."""
    with new_node(request.param.name) as node:
        yield node
        cluster.reopen()
        await node.unpublish_all()
