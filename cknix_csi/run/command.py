"""Build an Expression, publish it through the CSI node service, and run a command with the volume at /nix."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.api.attributes import STORE_PATH
from cknix_csi.api.errors import CknixError, Invalid, Problem
from cknix_csi.api.expression import Spec
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import nix as nix_commands
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.fetcher import StoreFetcher
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.substituters import CacheEndpoint
from cknix_csi.run import source
from cknix_csi.run.namespace import enter_private_mounts
from cknix_csi.run.report import Reporter
from cknix_csi.run.scratch import Scratch, scratch
from cknix_csi.serve import nix_of
from cknix_csi.settings import NixSettings, run_settings
from cknix_csi.volumes.syscalls import owned

EXIT_SIGNALLED = 128
_NIX = Path("/nix")
_RESULT_BIN = "/nix/var/result/bin"

# Runs in a mount namespace of its own below ours, so that our own programs may come from /nix; the FIFO tells the
# moment before the command takes over.
_ENTER = 'mount --bind "$1" /nix && printf . > "$2" && shift 2 && exec "$@"'


@dataclass(frozen=True, slots=True)
class Options:
    """The command line; exactly one of *file*, *expr*, *flake* and *store_path* is given."""

    file: Path | None = None
    expr: str | None = None
    flake: str | None = None
    store_path: str | None = None
    writable: bool = False
    data_root: Path | None = None
    quiet: bool = False
    argv: tuple[str, ...] = ()


def run(options: Options, environment: Mapping[str, str]) -> int:
    """Returns the command's exit code, or 128 and the number of the signal that ended it.

    Raises :class:`Invalid` for bad arguments or settings, and :class:`CknixError` when the volume cannot be had.
    """
    name, spec = _source(options)
    data_root = options.data_root.resolve() if options.data_root else None
    settings = run_settings(environment, data_root)
    if os.geteuid() != 0:
        raise CknixError("mounting needs root: run it with sudo, or as root in a container with CAP_SYS_ADMIN")
    if not nix_commands.installed():
        raise CknixError("the Nix commands are not on PATH; on Debian: apt-get install --no-install-recommends nix-bin")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="cknix: %(levelname)s %(name)s: %(message)s")
    try:
        settings.data_root.mkdir(parents=True, exist_ok=True)
        _NIX.mkdir(exist_ok=True)
        enter_private_mounts()
    except OSError as error:
        raise CknixError(f"cannot prepare {error.filename}: {error.strerror}") from None
    with scratch(nix_of(settings).store, settings.data_root) as own:
        return asyncio.run(_Run(settings, own, options, name, spec).run())


def _source(options: Options) -> tuple[str, Spec]:
    if options.file is not None:
        return source.from_file(options.file)
    for kind, text in (("expr", options.expr), ("flakeRef", options.flake), (STORE_PATH, options.store_path)):
        if text is not None:
            return "the expression" if kind == "expr" else text, source.from_text(kind, text)
    raise Invalid([Problem("command line", "give one of --file, --expr, --flake and --store-path")])


class _Run:
    def __init__(self, settings: NixSettings, own: Scratch, options: Options, name: str, spec: Spec) -> None:
        self._settings = settings
        self._own = own
        self._options = options
        self._name = name
        self._spec = spec
        self._report = Reporter(quiet=options.quiet)
        self._nix = nix_of(settings)
        self._signalled: signal.Signals | None = None
        self._child: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        working = asyncio.current_task()
        assert working is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number, working)
        try:
            path = await self._build()
            return await self._mounted(path)
        except asyncio.CancelledError:
            if self._signalled is None:
                raise
            return EXIT_SIGNALLED + self._signalled

    def _on_signal(self, number: signal.Signals, working: asyncio.Task[object]) -> None:
        if self._child is None:
            self._signalled = number
            working.cancel()
        elif number != signal.SIGINT:  # the terminal has sent that to the command as well
            with suppress(ProcessLookupError):
                self._child.send_signal(number)

    async def _build(self) -> StorePath:
        began = time.monotonic()
        system = self._settings.system
        if self._spec.systems and system not in self._spec.systems:
            raise Invalid([Problem("spec.systems", f"does not name this machine's system {system}")])
        self._report.say(f"evaluating {self._name}")
        evaluation = await self._nix.evaluate(self._spec.data, system)
        evaluated = time.monotonic()
        # Kept after this run: the next one of the same result finds it in the store.
        await asyncio.to_thread(GcRoots(self._nix.store, "run").add, evaluation.result.basename, evaluation.result)
        await self._nix.build(evaluation, progress=self._report.progress)
        built = time.monotonic()
        self._report.say(
            f"{evaluation.result} (evaluated in {evaluated - began:.2f} s, built in {built - evaluated:.2f} s)"
        )
        return evaluation.result

    async def _mounted(self, path: StorePath) -> int:
        # Imported here since they take as long as the evaluation before them; both are then under way sooner.
        from cknix_csi.csi.client import published  # noqa: PLC0415
        from cknix_csi.csi.closures import ClosureService  # noqa: PLC0415
        from cknix_csi.csi.daemon import NodeDependencies, serving  # noqa: PLC0415
        from cknix_csi.volumes.volumes import Volumes  # noqa: PLC0415

        store, own = self._nix.store, self._own
        volumes = Volumes(own.directory, StoreClosures(store, f"{own.owner}/closures"))
        # Not below the data root: the path of a socket has at most 107 bytes.
        with tempfile.TemporaryDirectory(prefix="cknix-run-") as sockets:
            endpoint = Path(sockets) / "csi.sock"
            node = NodeDependencies(
                node_id="localhost",
                system=self._settings.system,
                endpoint=endpoint,
                registration=None,
                volumes=volumes,
                closures=ClosureService(StoreFetcher(self._nix, _no_caches, f"{own.owner}/fetches")),
                expressions=None,
                budget=self._settings.fetch_timeout,
            )
            try:
                async with serving(node):
                    target = own.directory / "target"
                    began = time.monotonic()
                    async with published(
                        endpoint, "run", target, {STORE_PATH: str(path)}, writable=self._options.writable
                    ):
                        return await self._command(target, began)
            finally:
                await volumes.close()

    async def _command(self, target: Path, began: float) -> int:
        argv = self._options.argv or (os.environ.get("SHELL", "/bin/sh"),)
        environment = {**os.environ, "PATH": f"{_RESULT_BIN}:{os.environ.get('PATH', os.defpath)}"}
        fifo = self._own.directory / "started"
        os.mkfifo(fifo, 0o600)
        with owned(os.open(fifo, os.O_RDWR | os.O_NONBLOCK)) as reading:
            started = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(reading, started.set)
            script = ["sh", "-c", _ENTER, "cknix", str(target), str(fifo), *argv]
            self._child = await asyncio.create_subprocess_exec(
                *("unshare", "--mount", "--propagation", "private"),
                *script,
                env=environment,
                pass_fds=(self._own.lock,),
            )
            ended = asyncio.create_task(self._child.wait())
            starting = asyncio.create_task(started.wait())
            await asyncio.wait({ended, starting}, return_when=asyncio.FIRST_COMPLETED)
            loop.remove_reader(reading)
            if starting.done():
                self._report.say(f"known closure to running command: {(time.monotonic() - began) * 1000:.0f} ms")
            starting.cancel()
        code = await ended
        return code if code >= 0 else EXIT_SIGNALLED - code


async def _no_caches() -> tuple[CacheEndpoint, ...]:
    """Only those of nix.conf."""
    return ()
