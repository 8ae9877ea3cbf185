"""A whole node: the real daemon in a mount namespace that outlives it, with a real Nix, cache and API server beside it.

Only kubelet is played here: :class:`WholeNode` makes the directories that kubelet makes, answers the registration
socket and calls the CSI socket.  What a test sees of mounts, stores and processes comes from findmnt, Nix and /proc.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from cknix_csi.api.expression import API_VERSION, KIND
from cknix_csi.kube.api import CONFLICT, MERGE_PATCH, ApiError, core, expressions
from cknix_csi.nix.cache.signing import KeyPair
from cknix_csi.proto.csi_grpc import NodeStub
from cknix_csi.proto.csi_pb2 import (
    NodeGetInfoRequest,
    NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest,
    VolumeCapability,
)
from cknix_csi.proto.pluginregistration_grpc import RegistrationStub
from cknix_csi.proto.pluginregistration_pb2 import InfoRequest, RegistrationStatus
from tests.api import rbac
from tests.api.conftest import connected
from tests.api.server import DRIVER_NAMESPACE, Server
from tests.nixes import NixEnv, NixVersion, demo_search_path, remove
from tests.node import blocking
from tests.node.hatchery import Hatched, Hatchery
from tests.node.relay import Relay

REPOSITORY = Path(__file__).parents[2]
LIMIT = 30.0
"""Seconds after which a state that was waited for counts as not reached."""
POD_NAMESPACE = "default"

Mode = VolumeCapability.AccessMode

_RESULTS = {
    "hello": "hello",
    "other": 'greet "another generation"',
    "toolbox": "toolbox",
    "shapes": "shapes",
    "file": "file",
    "link": "link",
    "chain": "chainFast 60",
    "wide": "wideFast 40",
}


@dataclass(frozen=True)
class Source:
    """The store behind the cache, filled by real Nix; *results* are store paths by name."""

    env: NixEnv
    results: dict[str, str]
    _closures: dict[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def build(cls, nix: NixVersion, directory: Path) -> Source:
        env = NixEnv(nix, directory)
        packages = " ".join(f"({text})" for text in _RESULTS.values())
        arguments = ["--no-out-link", *demo_search_path(REPOSITORY / "nix/demo")]
        built = env.lines("nix-build", *arguments, "-E", f"with import <cknix-demo> {{ }}; [ {packages} ]")
        return cls(env, dict(zip(_RESULTS, built, strict=True)))

    def __getattr__(self, name: str) -> str:
        try:
            return self.results[name]
        except KeyError:
            raise AttributeError(name) from None

    def closure(self, path: str) -> set[str]:
        if path not in self._closures:
            self._closures[path] = frozenset(self.env.lines("nix-store", "--query", "--requisites", path))
        return set(self._closures[path])

    @contextmanager
    def one_bit_flipped(self, file: str) -> Iterator[None]:
        """One bit of *file*, a path in the store, is another one on the cache's disk."""
        physical = self.env.physical(file)
        original = physical.read_bytes()
        physical.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        try:
            yield
        finally:
            physical.write_bytes(original)

    @contextmanager
    def hidden(self, path: str) -> Iterator[None]:
        """The store has lost *path*: its cache says so, as for one that was never built."""
        physical = self.env.physical(path)
        aside = physical.with_name(f"{physical.name}.hidden")
        physical.rename(aside)
        try:
            yield
        finally:
            aside.rename(physical)


class Cluster:
    """What a node finds elsewhere: API server and cache behind relays, and what users and the controller write."""

    def __init__(self, server: Server, cache_port: int, key: KeyPair) -> None:
        self.server = server
        self.key = key
        self.api = Relay(int(server.url.rpartition(":")[2]))
        self.cache = Relay(cache_port)
        self.reopen()
        self.kubeconfig = self._kubeconfig()
        self._scheduled: list[str] = []
        # Elsewhere the controller manager, which does not run here, makes it.
        server.kubectl("create", "serviceaccount", "default", "-n", POD_NAMESPACE)

    def _kubeconfig(self) -> dict[str, Any]:
        """That of the node daemon's ServiceAccount, through the relay."""
        file = self.server.kubeconfig("node", rbac.token(self.server, rbac.NODE))
        config: dict[str, Any] = json.loads(file.read_text())
        config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{self.api.port}"
        return config

    @property
    def cache_url(self) -> str:
        return f"http://127.0.0.1:{self.cache.port}"

    def reopen(self) -> None:
        """Both relays pass everything on."""
        for relay in (self.api, self.cache):
            relay.pace = 0
            relay.open()

    def close(self) -> None:
        for relay in (self.api, self.cache):
            relay.close()

    async def use_cache(self, *, public_key: str = "", node: str = "elsewhere") -> None:
        """Write the ConfigMap ``cknix-cache``, as the controller on *node* does; by default with its true key."""
        data = {"url": self.cache_url, "publicKey": public_key or self.key.public, "node": node}
        async with connected(self.server.kubeconfig("admin")) as api:
            try:
                body = {"metadata": {"name": "cknix-cache"}, "data": data}
                await api.create(core("configmaps", DRIVER_NAMESPACE), body)
            except ApiError as error:
                if error.status != CONFLICT:
                    raise
                await api.patch(core("configmaps", DRIVER_NAMESPACE, "cknix-cache"), {"data": data}, kind=MERGE_PATCH)

    async def schedule(self, volume: str = "v1", **spec: Any) -> None:
        """Have the pod of *volume* on the node, with *spec*; without it, the daemon is told of a pod that has gone.

        It is a static pod to the API server: the uid by which its kubelet knows such a one is for us to say.
        """
        async with connected(self.server.kubeconfig("admin")) as api:
            body = {
                "metadata": {"name": f"pod-{volume}", "annotations": {"kubernetes.io/config.mirror": volume}},
                "spec": {
                    "nodeName": "node-1",
                    "automountServiceAccountToken": False,
                    "containers": [{"name": "main", "image": "none"}],
                    **spec,
                },
            }
            await api.create(core("pods", POD_NAMESPACE), body)
        self._scheduled.append(f"pod-{volume}")

    def evict(self) -> None:
        """Remove every pod that was scheduled."""
        for name in self._scheduled:
            self.server.ask("DELETE", core("pods", POD_NAMESPACE, name) + "?gracePeriodSeconds=0")
        self._scheduled.clear()

    async def events(self, pod: str) -> list[tuple[str, str]]:
        """Reasons and messages of the Events on *pod*."""
        async with connected(self.server.kubeconfig("admin")) as api:
            query = {"fieldSelector": f"involvedObject.kind=Pod,involvedObject.name={pod}"}
            found = await api.get(core("events", POD_NAMESPACE), query=query)
            return [(item["reason"], item["message"]) for item in found["items"]]

    async def apply(self, name: str) -> None:
        """What a user does: create the Expression, or change its spec to a newer generation."""
        async with connected(self.server.kubeconfig("admin")) as api:
            expr = f"# {time.monotonic_ns()}\n1"
            body = {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "metadata": {"name": name, "namespace": POD_NAMESPACE},
                "spec": {"data": {"expr": expr}},
            }
            try:
                await api.create(expressions(POD_NAMESPACE), body)
            except ApiError as error:
                if error.status != CONFLICT:
                    raise
                spec = {"spec": body["spec"]}
                await api.patch(expressions(POD_NAMESPACE, name), spec, kind=MERGE_PATCH)

    async def delete(self, name: str) -> None:
        """What a user does: delete the Expression, which nothing keeps."""
        await asyncio.to_thread(self.server.kubectl, "delete", "expr", name, "-n", POD_NAMESPACE)

    async def delete_all(self) -> None:
        """The same of every Expression, also those that other tests have left."""
        await asyncio.to_thread(self.server.kubectl, "delete", "expr", "--all", "-n", POD_NAMESPACE)

    async def report(self, name: str, phase: str, *, message: str = "", **results: str) -> None:
        """What the controller does: write the status of the newest generation; *results* by system, ``_`` for ``-``."""
        async with connected(self.server.kubeconfig("admin")) as api:
            body = await api.get(expressions(POD_NAMESPACE, name))
            listed = [{"system": system.replace("_linux", "-linux"), "path": path} for system, path in results.items()]
            status = {
                "phase": phase,
                "message": message,
                "observedGeneration": body["metadata"]["generation"],
                **({"results": listed, "result": listed[0]["path"]} if listed else {}),
            }
            await api.patch(expressions(POD_NAMESPACE, name, status=True), {"status": status}, kind=MERGE_PATCH)


class Namespace:
    """A mount namespace that lives until :meth:`close`, whatever becomes of the processes in it."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,  # closed with this process, however it ends
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n", "no private mount namespace: CAP_SYS_ADMIN is needed"

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self._holder.pid}/ns/mnt")

    def command(self, *argv: str | Path) -> list[str]:
        return ["nsenter", f"--mount={self.path}", "--", *map(str, argv)]

    def run(self, *argv: str | Path, check: bool = True, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, check=False, env=env)
        if check and done.returncode != 0:
            raise AssertionError(f"{argv} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def see(self, path: Path) -> Path:
        """*path* as the namespace has it, for this process to look at."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def mounts(self, below: Path) -> list[str]:
        """Mount points below *below*, in the order they were mounted."""
        table = self.run("findmnt", "--kernel", "--list", "--noheadings", "--output", "TARGET")
        return [target for target in table.splitlines() if target.startswith(f"{below}/")]

    def mount_id(self, target: Path) -> str:
        """Ids of what is mounted at *target*; empty when nothing is."""
        return self.run(
            "findmnt", "--kernel", "--noheadings", "--output", "ID", "--mountpoint", target, check=False
        ).strip()

    def close(self) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait()


class WholeNode:
    """Directories of one node below *directory*, and the daemon that works on them, while there is one."""

    def __init__(self, directory: Path, nix: NixVersion, kubeconfig: dict[str, Any], hatchery: Hatchery) -> None:
        self.directory = directory
        self._hatchery = hatchery
        self.nix = NixEnv(nix, directory / "nix")
        self.namespace = Namespace()
        self.data = directory / "data"
        self.kubelet = directory / "kubelet"
        self.pods = self.kubelet / "pods"
        self.endpoint = self.kubelet / "plugins/csi.cknix.cool/csi.sock"
        self.registration = self.kubelet / "plugins_registry/csi.cknix.cool-reg.sock"
        for made in (self.data, self.pods, self.endpoint.parent, self.registration.parent):
            made.mkdir(parents=True)
        self._log = directory / "daemon.log"
        self._nix_log = directory / "nix.log"
        self._write_nix_wrappers(directory / "bin")
        self._kubeconfig = directory / "kubeconfig"
        self._kubeconfig.write_text(json.dumps(kubeconfig))
        self._kubeconfig.chmod(0o600)
        self.daemon: subprocess.Popen[bytes] | Hatched | None = None

    def _write_nix_wrappers(self, directory: Path) -> None:
        directory.mkdir()
        for program in self.nix.nix.bin_dir.iterdir():
            self.wrap(program.name, f'exec {program} "$@"')

    def wrap(self, program: str, script: str) -> None:
        """Let *script* be what the daemon runs as *program* of Nix, after a line in the file of :meth:`nix_calls`."""
        wrapper = self.directory / "bin" / program
        wrapper.write_text(f'#!/bin/sh\necho "{program} $*" >> {self._nix_log}\n{script}\n')
        wrapper.chmod(0o755)

    # The daemon

    def environment(self, **settings: str) -> dict[str, str]:
        """All of the daemon's environment: *settings*, and what a DaemonSet sets."""
        return {
            **self.nix.environ,
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "KUBECONFIG": str(self._kubeconfig),
            "CSI_ENDPOINT": f"unix://{self.endpoint}",
            "KUBE_NODE_NAME": "node-1",
            "CKNIX_DATA_ROOT": str(self.data),
            "CKNIX_KUBELET_ROOT": str(self.kubelet),
            "CKNIX_RPC_BUDGET": f"{LIMIT}",
            "CKNIX_GC_LOW": "0",  # what a test sees must not depend on how full this machine's disk is
            "CKNIX_KEEP_WARM": "0",  # nor on what was used before
            "CKNIX_METRICS_LISTEN": "off",  # nodes share this machine's ports
            **settings,
        }

    def spawn(self, **settings: str) -> subprocess.Popen[bytes]:
        """The command ``cknix-csi node``."""
        command = self.namespace.command(sys.executable, "-m", "cknix_csi.cli", "node")
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(**settings)
            )

    def launch(self, **settings: str) -> None:
        """Start the daemon and do not wait for it."""
        assert self.daemon is None
        self.daemon = self._hatchery.start(self.namespace.path, self._log, self.environment(**settings))

    async def start(self, **settings: str) -> None:
        """Start the daemon and do what kubelet does when its registration socket appears."""
        self.launch(**settings)
        await self.registered()

    async def registered(self) -> None:
        assert self.daemon is not None
        running = self.daemon
        await self.eventually("the daemon registers", lambda: running.poll() is not None or self._serves())
        assert running.poll() is None, f"the daemon ended with {running.poll()}:\n{self.log()}"
        async with Channel(path=str(self.registration)) as channel:
            registration = RegistrationStub(channel)
            info = await registration.GetInfo(InfoRequest(), timeout=LIMIT)
            assert (info.type, info.name, info.endpoint) == ("CSIPlugin", "csi.cknix.cool", str(self.endpoint))
            async with Channel(path=info.endpoint) as driver:
                assert (await NodeStub(driver).NodeGetInfo(NodeGetInfoRequest(), timeout=LIMIT)).node_id == "node-1"
            await registration.NotifyRegistrationStatus(RegistrationStatus(plugin_registered=True), timeout=LIMIT)

    def _serves(self) -> bool:
        """What a killed predecessor left refuses connections."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.registration)) == 0

    def kill(self, *, with_children: bool = True) -> None:
        """SIGKILL.  A container's end takes all of its processes along; a bare process leaves its children behind."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        self.daemon = None
        if with_children:
            self.end_children()

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.daemon is not None
        self.daemon.terminate()
        try:
            return self.daemon.wait(LIMIT)
        finally:
            self.daemon.kill()
            self.daemon = None

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-6000:] if self._log.exists() else ""

    def require_responsive(self) -> None:
        """No operation of the daemons of this node has kept all the others waiting."""
        assert blocking.too_long(Path(f"{self._log}.blocking")) == []

    def children(self) -> list[int]:
        """Processes of Nix that a daemon of this node has begun: their home is in its data root."""
        mark = f"HOME={self.data}/home\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def end_children(self) -> None:
        while children := self.children():
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.005)

    def descendants_faults(self) -> int:
        """Page faults of all children the daemon has had so far (proc_pid_stat(5), cminflt): no child, no fault."""
        assert self.daemon is not None
        return int(Path(f"/proc/{self.daemon.pid}/stat").read_text().rpartition(")")[2].split()[8])

    def own_children(self) -> list[str]:
        """Ids of the daemon's children that live, or have ended and nobody has asked how."""
        assert self.daemon is not None
        tasks = Path(f"/proc/{self.daemon.pid}/task").glob("*/children")
        return [child for task in tasks for child in task.read_text().split()]

    def nix_calls(self) -> list[str]:
        """Command lines of Nix that the daemon has run."""
        return self._nix_log.read_text().splitlines() if self._nix_log.exists() else []

    # What kubelet does

    def target(self, volume: str = "v1") -> Path:
        return self.pods / volume / "volumes/kubernetes.io~csi/nix/mount"

    def publish_request(self, volume: str = "v1", *, writable: bool = False, **attributes: str) -> Any:
        """What kubelet sends for an inline volume; its directory's parent exists."""
        target = self.target(volume)
        target.parent.mkdir(parents=True, exist_ok=True)
        return NodePublishVolumeRequest(
            volume_id=volume,
            target_path=str(target),
            readonly=not writable,
            volume_capability=VolumeCapability(
                mount=VolumeCapability.MountVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER)
            ),
            volume_context={
                "csi.storage.k8s.io/ephemeral": "true",
                "csi.storage.k8s.io/pod.name": f"pod-{volume}",
                "csi.storage.k8s.io/pod.namespace": POD_NAMESPACE,
                "csi.storage.k8s.io/pod.uid": volume,
                **attributes,
            },
        )

    async def call(self, request: Any) -> None:
        """Send *request*, on a connection of its own as kubelet does.  Raises GRPCError."""
        async with Channel(path=str(self.endpoint)) as channel:
            stub = NodeStub(channel)
            if isinstance(request, NodePublishVolumeRequest):
                await stub.NodePublishVolume(request, timeout=2 * LIMIT)
            else:
                await stub.NodeUnpublishVolume(request, timeout=2 * LIMIT)

    async def publish(self, volume: str = "v1", *, writable: bool = False, **attributes: str) -> Path:
        """Publish, and return the volume's directory as this process can look into it."""
        await self.call(self.publish_request(volume, writable=writable, **attributes))
        return self.shown(volume)

    async def unpublish(self, volume: str = "v1") -> None:
        await self.call(NodeUnpublishVolumeRequest(volume_id=volume, target_path=str(self.target(volume))))

    async def refused(self, volume: str = "v1", *, writable: bool = False, **attributes: str) -> tuple[str, str]:
        """Code and message of a publish that must fail."""
        return await self.refusal(self.publish_request(volume, writable=writable, **attributes))

    async def refusal(self, request: Any) -> tuple[str, str]:
        try:
            await self.call(request)
        except GRPCError as error:
            return error.status.name, error.message or ""
        raise AssertionError(f"was not refused:\n{request}\n{self.log()}")

    async def publish_retrying(self, volume: str = "v1", **arguments: Any) -> Path:
        """As kubelet does: again while the answer is that it takes longer or cannot be told now."""
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                return await self.publish(volume, **arguments)
            except GRPCError as error:
                if error.status not in {Status.ABORTED, Status.UNAVAILABLE} or time.monotonic() > deadline:
                    raise AssertionError(f"{error.status.name}: {error.message}\n{self.log()}") from error
            await asyncio.sleep(0.05)

    # What is on the node

    def shown(self, volume: str = "v1") -> Path:
        return self.namespace.see(self.target(volume))

    def mount_id(self, volume: str = "v1") -> str:
        return self.namespace.mount_id(self.target(volume))

    def run_in(self, volume: str, *argv: str) -> str:
        """Output of a program run with the volume at /nix, as a pod has it."""
        pod = self.directory / "pod-root"
        (pod / "nix").mkdir(parents=True, exist_ok=True)
        script = 'mount --rbind "$1" "$2/nix"; root=$2; shift 2; exec chroot "$root" "$@"'
        inside: tuple[str | Path, ...] = (
            "unshare",
            "--mount",
            "sh",
            "-euc",
            script,
            "sh",
            self.target(volume),
            pod,
            *argv,
        )
        return self.namespace.run(*inside, env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/nix/var/result/bin"})

    def admin(self, program: str, *arguments: str, check: bool = True) -> list[str]:
        """Output of a Nix program that an administrator runs on the node's store."""
        store = f"local?root={self.data}"
        command = (self.nix.nix.program(program), *arguments, "--store", store)
        return self.namespace.run(*command, env=self.nix.environ, check=check).splitlines()

    def registered_paths(self) -> set[str]:
        """Every valid path of the node's store, by Nix; none when there is no store yet."""
        see = self.namespace.see(self.data / "nix/var/nix/db/db.sqlite")
        while see.exists():
            try:
                return set(self.admin("nix", "path-info", "--all"))
            except AssertionError as error:  # it asks for the paths first, and then for each, which may have gone
                if "is not valid" not in str(error):
                    raise
        return set()

    def collect_garbage(self) -> None:
        self.admin("nix-store", "--gc")

    def traces(self) -> list[str]:
        """All that volumes have left on this node: mounts, directories, GC roots."""
        data = self.namespace.see(self.data)
        found = [f"mount {target}" for target in self.namespace.mounts(self.data)]
        found += [f"mount {target}" for target in self.namespace.mounts(self.pods)]
        for name in ("views", "farms", "volumes", "trash"):
            with suppress(FileNotFoundError):
                found += [f"{name}/{entry}" for entry in os.listdir(data / name)]
        found += [f"target {target}" for target in self.pods.glob("*/volumes/kubernetes.io~csi/nix/*")]
        roots = data / "nix/var/nix/gcroots/cknix"
        found += [f"root {path.relative_to(roots)}" for path in roots.rglob("*") if path.is_symlink()]
        return found

    async def left_nothing(self) -> None:
        """Wait until there is no trace of any volume: deletions happen in the background."""
        await self.eventually("nothing is left", lambda: not self.traces(), lambda: "\n".join(self.traces()))

    async def eventually(
        self, what: str, holds: Callable[[], Any], seen: Callable[[], str] | None = None, limit: float = LIMIT
    ) -> None:
        """Wait until *holds*; when it never does, say what was *seen*, the mounts and the daemon's log."""
        deadline = time.monotonic() + limit
        while not holds():
            if time.monotonic() > deadline:
                mounts = "\n".join(self.namespace.mounts(self.directory))
                raise AssertionError(
                    f"not within {limit:.0f} s: {what}\n{seen() if seen else ''}\n--- mounts\n{mounts}\n{self.log()}"
                )
            await asyncio.sleep(0.01)

    async def unpublish_all(self) -> None:
        """Undo what a test has published and left, and see that nothing is left of it."""
        if self.daemon is None or self.daemon.poll() is not None:
            self.daemon = None
            await self.start()
        for target in self.pods.glob("*/volumes/kubernetes.io~csi/nix/mount"):
            await self.unpublish(target.relative_to(self.pods).parts[0])
        await self.left_nothing()

    def destroy(self) -> None:
        """End the daemon, its mounts and its files, whatever state they are in."""
        if self.daemon is not None:
            self.kill()
        self.end_children()
        self.namespace.close()
        remove(self.directory)


def require_exactly(volume: Path, source: Source, path: str) -> None:
    """*volume* shows exactly the closure of *path*, as it is where it was built, and says so in its database."""
    closure = source.closure(path)
    assert {f"/nix/store/{name}" for name in os.listdir(volume / "store") if name != ".links"} == closure
    script = 'for name; do diff --recursive --no-dereference "$from/$name" "$to/$name"; done'
    names = [each.removeprefix("/nix/store/") for each in closure]
    places = {"from": str(source.env.physical("/nix/store")), "to": str(volume / "store"), "PATH": os.environ["PATH"]}
    compare = subprocess.run(
        ["sh", "-c", script, "sh", *names], env=places, capture_output=True, text=True, check=False
    )
    assert compare.stdout + compare.stderr == ""
    assert os.readlink(volume / "var/result") == path
    with closing(sqlite3.connect(":memory:")) as opened:
        opened.deserialize((volume / "var/nix/db/db.sqlite").read_bytes())
        assert {row[0] for row in opened.execute("SELECT path FROM ValidPaths")} == closure
