"""kubelet's part in registration, from what its pluginmanager does (pkg/kubelet/pluginmanager).

Its plugin watcher gives a socket a new identity each time it appears in the directory and forgets one that is removed;
a socket that is renamed away it does not notice.  Its reconciler registers what it has not asked yet under that
identity.  A plugin counts as asked *before* its handler is called: a driver that the CSI handler then refuses, because
it cannot write Node and CSINode, is told so once and never asked again.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from grpclib.client import Channel
from grpclib.exceptions import GRPCError, StreamTerminatedError

from cknix_csi.proto.csi_grpc import NodeStub
from cknix_csi.proto.csi_pb2 import NodeGetInfoRequest
from cknix_csi.proto.pluginregistration_grpc import RegistrationStub
from cknix_csi.proto.pluginregistration_pb2 import InfoRequest, RegistrationStatus

# inotify(7)
_MOVED_TO, _CREATE, _DELETE = 0x80, 0x100, 0x200
_EVENT = struct.Struct("iIII")
_RECONCILE_SECONDS = 0.02  # kubelet's is 1
_UNREACHABLE = (OSError, GRPCError, StreamTerminatedError, TimeoutError)


class PluginManager:
    """Of a kubelet whose plugins_registry is *directory*; :attr:`refusal` is why it refuses drivers, if it does."""

    def __init__(self, directory: Path) -> None:
        self.refusal = ""
        self.drivers: dict[str, str] = {}
        """Endpoints by the names of drivers that pods can use now."""
        self.asked = 0
        """How often a driver's handler was called."""
        self.appeared: list[str] = []
        """Names in the directory, in the order they came; those that begin with a dot, kubelet ignores."""
        self._directory = directory
        self._identities = itertools.count(1)
        self._desired: dict[Path, int] = {}
        self._actual: dict[Path, tuple[int, str]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[PluginManager]:
        libc = ctypes.CDLL(None, use_errno=True)
        watch: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert watch >= 0
        assert libc.inotify_add_watch(watch, os.fsencode(self._directory), _MOVED_TO | _CREATE | _DELETE) >= 0
        for path in self._directory.iterdir():
            self._see(path, _CREATE)
        loop = asyncio.get_running_loop()
        loop.add_reader(watch, self._read, watch)
        reconciling = asyncio.create_task(self._reconcile())
        try:
            yield self
            assert not reconciling.done(), reconciling.exception()
        finally:
            reconciling.cancel()
            await asyncio.wait({reconciling})
            loop.remove_reader(watch)
            os.close(watch)

    def _read(self, watch: int) -> None:
        events = os.read(watch, 65536)
        while events:
            _, mask, _, size = _EVENT.unpack_from(events)
            name = events[_EVENT.size : _EVENT.size + size].rstrip(b"\0")
            self._see(self._directory / os.fsdecode(name), mask)
            events = events[_EVENT.size + size :]

    def _see(self, path: Path, mask: int) -> None:
        if mask & _DELETE:
            self._desired.pop(path, None)
        elif not path.name.startswith("."):
            self.appeared.append(path.name)
            if path.is_socket() and path.name.endswith("reg.sock"):
                self._desired[path] = next(self._identities)

    async def _reconcile(self) -> None:
        while True:
            for path, (identity, name) in list(self._actual.items()):
                if self._desired.get(path) != identity:
                    del self._actual[path]
                    self.drivers.pop(name, None)
            for path, identity in list(self._desired.items()):
                if path not in self._actual:
                    with suppress(*_UNREACHABLE):  # tried again
                        await self._register(path, identity)
            await asyncio.sleep(_RECONCILE_SECONDS)

    async def _register(self, path: Path, identity: int) -> None:
        async with Channel(path=str(path)) as channel:
            plugin = RegistrationStub(channel)
            info = await plugin.GetInfo(InfoRequest(), timeout=1)
            self._actual[path] = (identity, info.name)
            self.asked += 1
            refusal = self.refusal
            try:
                async with Channel(path=info.endpoint) as driver:
                    await NodeStub(driver).NodeGetInfo(NodeGetInfoRequest(), timeout=1)
            except _UNREACHABLE as error:
                refusal = f"NodeGetInfo: {error!r}"
            if not refusal:
                self.drivers[info.name] = info.endpoint
            status = RegistrationStatus(plugin_registered=not refusal, error=refusal)
            await plugin.NotifyRegistrationStatus(status, timeout=5)
