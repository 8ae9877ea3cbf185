"""A node daemon as a process: ``python -m bench.daemon DATA_ROOT STORE_ROOT SOCKET``, and the client that measures it.

The daemon is made of the same parts as ``cknix-csi run``'s: the real node service on a unix socket, and a store that is
never asked to fetch.  It prints one line of JSON when it serves, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from grpclib.client import Channel

from cknix_csi.api.attributes import STORE_PATH
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.daemon import NodeDependencies, serving
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.fetcher import StoreFetcher
from cknix_csi.nix.nix import Nix, NixOptions
from cknix_csi.nix.store import Store
from cknix_csi.nix.substituters import CacheEndpoint
from cknix_csi.proto.csi_grpc import NodeStub
from cknix_csi.proto.csi_pb2 import NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability
from cknix_csi.volumes.ledger import FILE, Ledger
from cknix_csi.volumes.volumes import Volumes

_START_SECONDS = 60.0


async def main(data_root: Path, store_root: Path, socket: Path) -> None:
    """The daemon's side."""
    store = Store.chroot(store_root)
    volumes = Volumes(data_root, StoreClosures(store))
    began = time.perf_counter()
    await volumes.reconcile()
    reconciled = time.perf_counter() - began
    node = NodeDependencies(
        node_id="bench",
        system="x86_64-linux",
        endpoint=socket,
        registration=None,
        volumes=volumes,
        closures=ClosureService(
            StoreFetcher(Nix(store, NixOptions(home=data_root / "home")), _no_caches, "bench-fetches")
        ),
        expressions=None,
        budget=60.0,
        ledger=Ledger(data_root / FILE),
    )
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    try:
        async with serving(node):
            print(json.dumps({"reconciled": reconciled}), flush=True)
            await ended.wait()
    finally:
        await volumes.close()


async def _no_caches() -> tuple[CacheEndpoint, ...]:
    return ()


@dataclass(slots=True)
class Daemon:
    """The client's side of a running daemon."""

    reconciled: float
    """Seconds its start-up reconciliation took."""
    _pid: int
    _stub: NodeStub
    _capability: VolumeCapability

    async def publish(self, volume_id: str, target: Path, root: StorePath, *, writable: bool = False) -> float:
        """Seconds until the answer, as kubelet would see them."""
        request = NodePublishVolumeRequest(
            volume_id=volume_id,
            target_path=str(target),
            volume_capability=self._capability,
            readonly=not writable,
            volume_context={STORE_PATH: str(root)},
        )
        began = time.perf_counter()
        await self._stub.NodePublishVolume(request)
        return time.perf_counter() - began

    async def unpublish(self, volume_id: str, target: Path) -> float:
        request = NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(target))
        began = time.perf_counter()
        await self._stub.NodeUnpublishVolume(request)
        return time.perf_counter() - began

    def memory(self) -> int:
        """Bytes of the process that are resident."""
        with open(f"/proc/{self._pid}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


@asynccontextmanager
async def running(data_root: Path, store: Store) -> AsyncIterator[Daemon]:
    """A daemon on *data_root*; volumes that are mounted at the end stay so."""
    assert store.root is not None
    (data_root / "csi").mkdir(parents=True, exist_ok=True)
    directory = os.open(data_root / "csi", os.O_RDONLY | os.O_DIRECTORY)
    # By descriptor: a socket's path has at most 107 bytes (unix(7)).
    socket = Path(f"/proc/{os.getpid()}/fd/{directory}/csi.sock")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.daemon", str(data_root), str(store.root), str(socket)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline()
        if not line:
            raise RuntimeError("the daemon ended before it served; see its messages above")
        channel = Channel(path=str(socket))
        try:
            capability = VolumeCapability(
                mount=VolumeCapability.MountVolume(),
                access_mode=VolumeCapability.AccessMode(mode=VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
            )
            yield Daemon(json.loads(line)["reconciled"], process.pid, NodeStub(channel), capability)
        finally:
            channel.close()
    finally:
        process.stdin.close()
        await process.wait()
        os.close(directory)


if __name__ == "__main__":
    asyncio.run(main(*(Path(argument) for argument in sys.argv[1:])))
