"""The controller as a process, with the real Kubernetes side and real GC roots, and a Nix that follows a script.

``python -m tests.api.operator DIRECTORY OPTIONS`` with OPTIONS as JSON; or :func:`run` in a forked process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cknix_csi.controller.app import run_controller
from cknix_csi.controller.ports import Dependencies, Options
from cknix_csi.kube.client import connect
from cknix_csi.kube.lease import Timing
from cknix_csi.metrics.controller import ControllerCounts
from cknix_csi.metrics.exposition import Exposition
from cknix_csi.nix.cache.signing import KeyPair, generate_key
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.store import Store
from tests.api.fakenix import FakeClosures, FakeNix, World
from tests.api.server import DRIVER_NAMESPACE


async def main(directory: Path, options: dict[str, Any]) -> None:
    world = World(directory)
    world.prepare()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    async def serve_cache(key: KeyPair) -> None:
        world.note("serving", key.public)
        await asyncio.Event().wait()

    port = options.get("port")
    exposition = Exposition("controller", directory)
    async with connect() as api:
        await run_controller(
            Dependencies(
                api=api,
                nix=FakeNix(world),
                closures=FakeClosures(world),
                roots=GcRoots(Store.chroot(directory / "root"), "expressions"),
                serve_cache=serve_cache,
                generate_key=generate_key,
                metrics=ControllerCounts(exposition),
                metrics_page=exposition.page,
                options=Options(
                    namespace=DRIVER_NAMESPACE,
                    cache_url="http://cknix-cache.cknix-system.svc",
                    node=options.get("node", "node-0"),
                    systems=tuple(options.get("systems", ["x86_64-linux"])),
                    max_builds=options.get("max_builds", 4),
                    retry_first=options.get("retry_first", 0.2),
                    retry_cap=options.get("retry_cap", 1.0),
                    health=None if port is None else ("127.0.0.1", port),
                    check_seconds=options.get("check_seconds", 3600.0),
                    lease=Timing(**options.get("lease", {})),
                ),
            ),
            stop,
            # A pod's name, which the containers that kubelet starts in it one after the other share.
            instance=options["instance"],
        )
    world.note("stopped", "controller")


def run(directory: Path, options: dict[str, Any], kubeconfig: str | None = None, log: Path | None = None) -> None:
    """The whole process; its output goes to the file *log*."""
    if log is not None:
        with log.open("ab") as output:
            for number in (1, 2):
                os.dup2(output.fileno(), number)
    if kubeconfig is not None:
        os.environ["KUBECONFIG"] = kubeconfig
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(name)s %(levelname)s %(message)s")
    asyncio.run(main(directory, options))


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
