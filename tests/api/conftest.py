"""A real API server for the session; for each test a namespace and, on demand, a controller process."""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cknix_csi.api.expression import API_VERSION, KIND
from cknix_csi.kube.api import MERGE_PATCH, NOT_FOUND, ApiError, Json, core, expressions, list_all
from cknix_csi.kube.client import KubernetesApi
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.store import Store
from tests.api import operator, rbac
from tests.api.fakenix import World
from tests.api.server import DRIVER_NAMESPACE, Server

WAIT_SECONDS = 40.0

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """etcd and kube-apiserver with our CRD and rights."""
    directory = Path(tempfile.mkdtemp(prefix="cknix-api-"))
    server = Server(directory)
    try:
        server.start()
        rbac.install(server)
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)


@asynccontextmanager
async def connected(kubeconfig: Path) -> AsyncIterator[KubernetesApi]:
    """The program's own client, as the user of *kubeconfig*."""
    from kubernetes_asyncio import config
    from kubernetes_asyncio.client import ApiClient, Configuration

    configuration = Configuration()
    await config.load_kube_config(config_file=str(kubeconfig), client_configuration=configuration)
    async with ApiClient(configuration) as client:
        yield KubernetesApi(client)


@pytest_asyncio.fixture
async def api(server: Server) -> AsyncIterator[KubernetesApi]:
    """The API server, asked by the administrator."""
    async with connected(server.kubeconfig("admin")) as client:
        yield client


@pytest_asyncio.fixture
async def node_api(server: Server) -> AsyncIterator[KubernetesApi]:
    """The API server, asked with the rights of the node daemon."""
    async with connected(server.kubeconfig("node", rbac.token(server, rbac.NODE))) as client:
        yield client


class Expressions:
    """What a test does with Expressions of one namespace."""

    def __init__(self, server: Server, api: KubernetesApi, namespace: str) -> None:
        self.server = server
        self.api = api
        self.namespace = namespace

    async def create(self, name: str, spec: Json | str, **metadata: Any) -> Json:
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": name, "namespace": self.namespace, **metadata},
            "spec": {"data": {"expr": spec}} if isinstance(spec, str) else spec,
        }
        return await self.api.create(expressions(self.namespace), body)

    async def change(self, name: str, **fields: Any) -> Json:
        """Merge *fields* into the spec; ``expr`` is short for ``data.expr``."""
        if "expr" in fields:
            fields["data"] = {"expr": fields.pop("expr")}
        return await self.api.patch(expressions(self.namespace, name), {"spec": fields}, kind=MERGE_PATCH)

    async def annotate(self, name: str, **annotations: str) -> None:
        body = {"metadata": {"annotations": {key.replace("__", "/"): value for key, value in annotations.items()}}}
        await self.api.patch(expressions(self.namespace, name), body, kind=MERGE_PATCH)

    async def get(self, name: str) -> Json:
        return await self.api.get(expressions(self.namespace, name))

    async def status(self, name: str) -> Json:
        return (await self.get(name)).get("status") or {}

    def delete(self, name: str) -> None:
        """Ask for the deletion; it is not waited for."""
        assert self.server.ask("DELETE", expressions(self.namespace, name)), f"there is no {name}"

    async def gone(self, name: str) -> None:
        async def is_gone() -> bool:
            try:
                await self.get(name)
            except ApiError as error:
                return error.status == NOT_FOUND
            return False

        await eventually(is_gone, lambda: self.get(name))

    async def reaches(self, name: str, phase: str, generation: int | None = None) -> Json:
        """Wait for *phase* of *generation* (the newest one by default); gives the status."""

        async def reached() -> bool:
            body = await self.get(name)
            status = body.get("status") or {}
            wanted = generation or body["metadata"]["generation"]
            return bool(status.get("phase") == phase and status.get("observedGeneration") == wanted)

        await eventually(reached, lambda: self.get(name))
        return await self.status(name)

    async def shows(self, name: str, holds: Callable[[Json], Any]) -> Json:
        """Wait until *holds* is true of the status; gives the status."""
        await eventually(lambda: _truth(self.status(name), holds), lambda: self.get(name))
        return await self.status(name)

    async def events(self, name: str) -> dict[str, Json]:
        """Events of the Expression by reason."""
        found = (await list_all(self.api, core("events", self.namespace))).items
        return {event["reason"]: event for event in found if event["involvedObject"]["name"] == name}

    async def told(self, name: str, *reasons: str) -> dict[str, Json]:
        """The same, once there are some with all *reasons*."""

        async def are_there() -> bool:
            return set(reasons) <= set(await self.events(name))

        await eventually(are_there, lambda: self.events(name))
        return await self.events(name)


async def _truth(value: Awaitable[Json], holds: Callable[[Json], Any]) -> bool:
    return bool(holds(await value))


async def eventually(holds: Callable[[], Awaitable[bool]], seen: Callable[[], Awaitable[Any]] | None = None) -> None:
    """Wait until *holds*; when it never does, say what was *seen* last."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not await holds():
        if time.monotonic() > deadline:
            last = json.dumps(await seen(), indent=1) if seen else ""
            raise AssertionError(f"not within {WAIT_SECONDS:.0f} s; last seen: {last}")
        await asyncio.sleep(0.05)


# A process that has imported everything and is forked for each start: importing takes two seconds, and there are many.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.api.operator", "kubernetes_asyncio.config"])


class Controller:
    """The controller process and the world its fake Nix lives in."""

    def __init__(self, server: Server, directory: Path, *, instance: str = "first") -> None:
        directory.mkdir(exist_ok=True)
        self._instance = instance
        self._kubeconfig = server.kubeconfig("controller", rbac.token(server, rbac.CONTROLLER))
        self._directory = directory
        self._process: ForkServerProcess | None = None
        self.world = World(directory)
        self.world.prepare()
        (directory / "log").touch()

    def start(self, **options: Any) -> None:
        assert self._process is None
        self._process = _processes.Process(
            target=operator.run,
            args=(
                self._directory,
                {"instance": self._instance, **options},
                str(self._kubeconfig),
                self._directory / "log",
            ),
            daemon=True,
        )
        self._process.start()

    def kill(self) -> None:
        """As a crash or the OOM killer would."""
        self._end(signal.SIGKILL)

    def ask_to_stop(self) -> None:
        """As :meth:`stop`, without waiting for the end."""
        self._signal(signal.SIGTERM)

    def stop(self) -> int:
        """As kubelet would; gives the exit code."""
        return self._end(signal.SIGTERM)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stopped in the middle of whatever it does, then going on."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def roots(self) -> dict[str, str]:
        """GC roots: name and path."""
        roots = GcRoots(Store.chroot(self._directory / "root"), "expressions")
        return {name: str(path) for name, path in roots.list().items()}

    async def keeps_only(self, *paths: str) -> None:
        """Wait until the GC roots are of *paths*: what goes goes after the status has been written."""

        async def kept() -> bool:
            return sorted(self.roots().values()) == sorted(paths)

        async def seen() -> Any:
            return self.roots()

        await eventually(kept, seen)

    def add_root(self, name: str, path: Any) -> None:
        GcRoots(Store.chroot(self._directory / "root"), "expressions").add(name, path)

    async def noted(self, event: str, name: str, times: int = 1) -> None:
        """Wait until the fake Nix has noted *event* for *name* so often."""

        async def reached() -> bool:
            return self.world.noted(event, name) >= times

        async def seen() -> str:
            return self.world.journal.read_text() + self.log()[-4000:]

        await eventually(reached, seen)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def _end(self, number: signal.Signals) -> int:
        process = self._process
        assert process is not None
        self._signal(number)
        process.join(30)
        self._process = None
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"the controller did not end within 30 s of {number.name}:\n{self.log()[-4000:]}")
        assert process.exitcode is not None
        return process.exitcode


@pytest_asyncio.fixture
async def expr(server: Server, api: KubernetesApi) -> AsyncIterator[Expressions]:
    """Expressions in a namespace of the test's own."""
    namespace = f"test-{os.getpid()}-{next(_numbers)}"
    await api.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    yield Expressions(server, api, namespace)
    if not server.running:
        server.start_api_server()
    for item in (await list_all(api, expressions(namespace), metadata_only=True)).items:
        name = item["metadata"]["name"]
        with suppress(ApiError):
            await api.patch(expressions(namespace, name), {"metadata": {"finalizers": None}}, kind=MERGE_PATCH)
        server.ask("DELETE", expressions(namespace, name))


@pytest.fixture
def controller(server: Server, expr: Expressions, tmp_path: Path) -> Iterator[Controller]:
    """A controller that the test starts; killed afterwards.  Its log is shown when the test fails."""
    controller = Controller(server, tmp_path)
    yield controller
    _clean_up(server, controller)


@pytest.fixture
def second(server: Server, controller: Controller, tmp_path: Path) -> Iterator[Controller]:
    """Another controller, with a store of its own as on another node."""
    second = Controller(server, tmp_path / "second", instance="second")
    yield second
    _clean_up(server, second)


def _clean_up(server: Server, controller: Controller) -> None:
    if controller.running():
        controller.kill()
    if not server.running:
        server.start_api_server()
    for made in (
        core("secrets", DRIVER_NAMESPACE, "cknix-cache-key"),
        core("configmaps", DRIVER_NAMESPACE, "cknix-cache"),
        f"/apis/coordination.k8s.io/v1/namespaces/{DRIVER_NAMESPACE}/leases/cknix-controller",
    ):
        server.ask("DELETE", made)
    print(controller.log()[-6000:])
