"""Build an Expression, publish it through the CSI node service, and run a command with the volume at /nix."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.api.attributes import STORE_PATH
from cknix_csi.api.errors import CknixError, Invalid, Problem
from cknix_csi.api.expression import Spec
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import nix as nix_commands
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.fetcher import StoreFetcher
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.substituters import CacheEndpoint
from cknix_csi.run import orphans, signals, source
from cknix_csi.run.child import PATIENCE, Child, child
from cknix_csi.run.keeper import EXIT_SIGNALLED
from cknix_csi.run.mountpoint import mountpoint
from cknix_csi.run.namespace import enter_private_mounts
from cknix_csi.run.report import Reporter
from cknix_csi.run.scratch import Scratch, scratch
from cknix_csi.serve import nix_of
from cknix_csi.settings import NixSettings, run_settings
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.volumes import Volumes

_NIX = Path("/nix")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line; exactly one of *file*, *expr*, *flake* and *store_path* is given."""

    file: Path | None = None
    """``-`` is standard input."""
    name: str | None = None
    """Of the Expression in *file*, where there are several."""
    expr: str | None = None
    flake: str | None = None
    store_path: str | None = None
    writable: bool = False
    restricted: bool = False
    data_root: Path | None = None
    quiet: bool = False
    argv: tuple[str, ...] = ()


def run(options: Options, environment: Mapping[str, str]) -> int:
    """Returns the command's exit code, or 128 and the number of the signal that ended it.

    Raises :class:`Invalid` for bad arguments or settings, and :class:`CknixError` when the volume cannot be had.
    """
    name, spec = _source(options)
    settings = run_settings(environment, _data_root(options), restricted=options.restricted)
    if os.geteuid() != 0:
        raise CknixError(
            "mounting needs root: run it with sudo, or as root in a container with CAP_SYS_ADMIN",
            Situation.NOT_PRIVILEGED,
        )
    if not nix_commands.installed():
        raise CknixError(
            "the Nix commands are not on PATH; on Debian: apt-get install --no-install-recommends nix-bin",
            Situation.NIX_NOT_FOUND,
        )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="cknix: %(levelname)s %(name)s: %(message)s")
    # What the node service refuses is this program's own last line; what else it cannot do is no matter here.
    for quiet in ("cknix_csi.csi.rpc", "cknix_csi.volumes.abilities"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    with ExitStack() as stack:
        stack.enter_context(signals.held())
        with explained(f"make the directory {_NIX}, where the command finds the volume"):
            stack.enter_context(mountpoint(_NIX))
        stack.enter_context(explained(f"work in the data root {settings.data_root}"))
        settings.data_root.mkdir(parents=True, exist_ok=True)
        _prepare_process()
        own = stack.enter_context(scratch(nix_of(settings).store, settings.data_root))
        command = stack.enter_context(child(options.argv, environment, own))
        work = _Run(settings, own, options, command, name=name, spec=spec)
        code = asyncio.run(work.run())
        if work.signalled is not None:
            signals.ignored()
        return code


def _source(options: Options) -> tuple[str, Spec]:
    if options.file is not None:
        return source.from_file(options.file, options.name)
    if options.name is not None:
        raise Invalid([Problem("--name", "chooses among the Expressions of a file; give --file")])
    if options.expr is not None:
        return "the expression", source.from_text("--expr", "expr", options.expr)
    if options.flake is not None:
        return options.flake, source.from_text("--flake", "flakeRef", options.flake)
    if options.store_path is not None:
        return options.store_path, source.from_text("--store-path", "storePath", options.store_path)
    raise Invalid([Problem("command line", "give one of --file, --expr, --flake and --store-path")])


def _data_root(options: Options) -> Path | None:
    if options.data_root is None:
        return None
    root = options.data_root.resolve()
    if root == Path("/") or root.is_relative_to(_NIX):
        raise Invalid([Problem("--data-root", f"{root} cannot be it: choose a directory below /, and not in {_NIX}")])
    return root


def _prepare_process() -> None:
    with explained("enter a mount namespace"):
        enter_private_mounts()
    with explained("become the parent of what the command leaves"):
        orphans.adopt()


# A laptop may have no network: substituters that do not answer are given up soon, and everything is built here.
_PATIENCE = {"connect-timeout": "5", "download-attempts": "2", "fallback": "true"}


class _Run:
    def __init__(
        self, settings: NixSettings, own: Scratch, options: Options, child: Child, *, name: str, spec: Spec
    ) -> None:
        self._settings = settings
        self._own = own
        self._options = options
        self._name = name
        self._spec = spec
        self._child = child
        self._report = Reporter(quiet=options.quiet)
        self._nix = nix_of(settings, _PATIENCE)
        self.signalled: signal.Signals | None = None
        self._doing = "starting"

    async def run(self) -> int:
        working = asyncio.current_task()
        assert working is not None
        loop = asyncio.get_running_loop()
        for number in signals.ending():
            loop.add_signal_handler(number, self._on_signal, number, working)
        volumes = Volumes(self._own.directory, StoreClosures(self._nix.store, f"{self._own.owner}/closures"))
        try:
            with signals.delivered():
                return await self._mounted(await self._build(), volumes)
        except asyncio.CancelledError:
            if self.signalled is None:
                raise
            return EXIT_SIGNALLED + self.signalled
        finally:
            self._report.clear()
            await volumes.emptied()  # there is no next start for what a run leaves
            await volumes.close()
            await self._nix.close()

    def _on_signal(self, number: signal.Signals, working: asyncio.Task[object]) -> None:
        if self._child.started:
            if self._child.signal(number):
                self._report.warn(f"killed the command, which got SIGTERM {PATIENCE} times")
        elif self.signalled is None:  # a second one must not interrupt the clearing up
            self.signalled = number
            how = "interrupted" if number is signal.SIGINT else f"ended by {number.name}"
            self._report.warn(f"{how} while {self._doing}")
            working.cancel()

    async def _build(self) -> StorePath:
        began = time.monotonic()
        system = self._settings.system
        if self._spec.systems and system not in self._spec.systems:
            raise Invalid([Problem("spec.systems", f"does not name this machine's system {system}")])
        self._doing = f"evaluating {self._name}"
        self._report.say(self._doing)
        evaluation = await self._nix.evaluate(self._spec.data, system)
        evaluated = time.monotonic()
        roots = GcRoots(self._nix.store, f"{self._own.owner}/result")
        await asyncio.to_thread(roots.add, evaluation.result.basename, evaluation.result)
        self._doing = f"building {evaluation.result}"
        await self._nix.build(evaluation, progress=self._report.progress)
        built = time.monotonic()
        self._report.say(
            f"{evaluation.result} (evaluated in {evaluated - began:.2f} s, built in {built - evaluated:.2f} s)"
        )
        return evaluation.result

    async def _mounted(self, path: StorePath, volumes: Volumes) -> int:
        # Imported here since gRPC takes as long as the evaluation, which is then under way sooner.
        from cknix_csi.csi.client import published  # noqa: PLC0415
        from cknix_csi.csi.closures import ClosureService  # noqa: PLC0415
        from cknix_csi.csi.daemon import NodeDependencies, serving  # noqa: PLC0415

        self._doing = f"mounting {path}"
        own = self._own
        # A directory of its own: whoever makes a socket locks the directory it is in.
        (own.directory / "csi").mkdir()
        endpoint = own.short / "csi/csi.sock"
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
        async with serving(node):
            began = time.monotonic()

            def started() -> None:
                self._report.say(f"known closure to running command: {(time.monotonic() - began) * 1000:.0f} ms")

            attributes = {STORE_PATH: str(path)}
            async with published(endpoint, "run", self._child.volume, attributes, writable=self._options.writable):
                return await self._child.run(started)


async def _no_caches() -> tuple[CacheEndpoint, ...]:
    """Only those of nix.conf."""
    return ()
