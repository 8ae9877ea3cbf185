"""The long-running roles, wired: settings → real parts → controller or node daemon, until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

from cknix_csi import __version__, logs
from cknix_csi.api.storepath import StorePath
from cknix_csi.beside import Helper, beside
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.collection import Collector
from cknix_csi.nix.demo import search_path
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.nix import Nix, NixOptions, has_build_users
from cknix_csi.nix.residence import AbandonedStore, move_in
from cknix_csi.nix.store import Store
from cknix_csi.privileges import CONTROLLER_KEEPS, NODE_KEEPS, give_up_all_but
from cknix_csi.settings import (
    CONTROLLER,
    DRIVER_NAME,
    ControllerSettings,
    NixSettings,
    NodeSettings,
    ProvisionerSettings,
    controller_settings,
    node_settings,
    provisioner_settings,
)

# A predecessor may still be stopping its builds.
_PATIENCE_SECONDS = 60.0
# Some programs close all that they may have open, one by one: not more, whatever the container may have.
_DESCRIPTORS = 1 << 20

_log = logging.getLogger(__name__)


def controller(environment: Mapping[str, str]) -> int:
    """Run the controller until SIGTERM; returns the exit code.  Raises ``Invalid`` for bad settings."""
    settings = controller_settings(environment)
    logs.set_up(settings.log_level, settings.log_format)
    take_descriptors()
    _log.info("cknix %s controller, data root %s", __version__, settings.nix.data_root)
    if not settings.keep_capabilities:
        give_up_all_but(CONTROLLER_KEEPS)
    asyncio.run(_until_stopped(lambda stop: _controller(settings, stop)))
    return 0


def node(environment: Mapping[str, str]) -> int:
    """Run the node daemon until SIGTERM; returns the exit code.  Raises ``Invalid`` for bad settings."""
    settings = node_settings(environment)
    logs.set_up(settings.log_level, settings.log_format)
    take_descriptors()
    _log.info("cknix %s on node %s, data root %s", __version__, settings.node_name, settings.nix.data_root)
    if not settings.keep_capabilities:
        give_up_all_but(NODE_KEEPS)
    asyncio.run(_until_stopped(lambda stop: _node(settings, stop)))
    return 0


def provisioner(environment: Mapping[str, str]) -> int:
    """Serve volumes for claims until SIGTERM; returns the exit code.  Raises ``Invalid`` for bad settings."""
    settings = provisioner_settings(environment)
    logs.set_up(settings.log_level, settings.log_format)
    take_descriptors()
    _log.info("cknix %s provisioner, records in namespace %s", __version__, settings.namespace)
    asyncio.run(_until_stopped(lambda stop: _provisioner(settings, stop)))
    return 0


def nix_of(settings: NixSettings, options_of_nix: Mapping[str, str] | None = None) -> Nix:
    """The Nix of one data root, with *options_of_nix* over those of nix.conf."""
    options = NixOptions(
        home=settings.data_root / "home",
        search_path=search_path(),
        restrict_eval=settings.restrict_eval,
        settings=options_of_nix or {},
        eval_timeout=settings.eval_timeout,
        build_timeout=settings.build_timeout,
        fetch_timeout=settings.fetch_timeout,
    )
    return Nix(Store.chroot(settings.data_root), options)


async def _controller(settings: ControllerSettings, stop: asyncio.Event) -> None:
    from cknix_csi.controller.app import run_controller  # noqa: PLC0415 - a node needs no kopf
    from cknix_csi.controller.ports import Dependencies, Options  # noqa: PLC0415
    from cknix_csi.csi.housekeeping import Housekeeping  # noqa: PLC0415
    from cknix_csi.kube.client import connect  # noqa: PLC0415
    from cknix_csi.monitoring import ControllerMonitoring  # noqa: PLC0415
    from cknix_csi.nix.cache.server import serve_cache  # noqa: PLC0415
    from cknix_csi.nix.cache.signing import KeyPair, generate_key  # noqa: PLC0415
    from cknix_csi.nix.evaluations import HeldEvaluations  # noqa: PLC0415

    # Held until this process ends.
    await move_in(settings.nix.data_root, patience=_PATIENCE_SECONDS)
    nix = nix_of(settings.nix)
    if not has_build_users():
        _log.warning("there is no group nixbld with members: builds run as root, and can change their inputs")

    roots = GcRoots(nix.store, "expressions", outlasting=True)
    monitoring = ControllerMonitoring(settings.nix.data_root)
    housekeeping = Housekeeping(
        store=monitoring.measured(Collector(nix.store, settings.nix.data_root / "home", unsynced=nix.unsynced)),
        watermarks=settings.watermarks,
        released=lambda: roots.removed,
    )
    held = HeldEvaluations(nix, housekeeping.out_of_space)
    await held.start()

    async def serve(key: KeyPair) -> None:
        host, port = settings.cache_host, settings.cache_port
        await nix.unsynced.survived()
        await serve_cache(nix.store, key, host=host, port=port, observer=monitoring.cache)

    async with AsyncExitStack() as kept:
        kept.push_async_callback(nix.close)
        api = await kept.enter_async_context(connect())
        dependencies = Dependencies(
            api=api,
            nix=held,
            closures=StoreClosures(nix.store, unsynced=nix.unsynced),
            roots=roots,
            serve_cache=serve,
            generate_key=generate_key,
            options=Options(
                namespace=settings.namespace,
                cache_url=settings.cache_url,
                node=settings.node_name,
                systems=(settings.nix.system,),
                max_builds=settings.max_builds,
            ),
            metrics=monitoring.metrics,
            metrics_page=monitoring.exposition.page,
        )
        instance = os.environ.get("HOSTNAME", "cknix-controller")
        helpers: dict[str, Helper] = {
            "housekeeping": housekeeping.run,
            "measuring the event loop": monitoring.exposition.watch_loop,
        }
        await beside(helpers, run_controller(dependencies, stop, instance=instance))


async def _node(settings: NodeSettings, stop: asyncio.Event) -> None:
    from cknix_csi.csi.closures import ClosureService  # noqa: PLC0415 - a controller needs no gRPC
    from cknix_csi.csi.daemon import NodeDependencies, run_node  # noqa: PLC0415
    from cknix_csi.csi.housekeeping import Housekeeping  # noqa: PLC0415
    from cknix_csi.csi.measured import MeasuredFetcher  # noqa: PLC0415
    from cknix_csi.csi.remembered import RememberedResults  # noqa: PLC0415
    from cknix_csi.csi.storepaths import StorePathRule  # noqa: PLC0415
    from cknix_csi.kube.cacheconfig import CacheConfig  # noqa: PLC0415
    from cknix_csi.kube.client import connect  # noqa: PLC0415
    from cknix_csi.kube.controllerplace import follow_controller  # noqa: PLC0415
    from cknix_csi.kube.events import EventRecorder  # noqa: PLC0415
    from cknix_csi.kube.expressions import ExpressionWatch  # noqa: PLC0415
    from cknix_csi.kube.pods import PodEvents, PodWatch  # noqa: PLC0415
    from cknix_csi.monitoring import NodeMonitoring  # noqa: PLC0415
    from cknix_csi.nix.fetcher import StoreFetcher  # noqa: PLC0415
    from cknix_csi.volumes.ledger import FILE, Ledger  # noqa: PLC0415
    from cknix_csi.volumes.volumes import Volumes  # noqa: PLC0415
    from cknix_csi.volumes.warm import Warm  # noqa: PLC0415

    data_root = settings.nix.data_root
    data_root.mkdir(parents=True, exist_ok=True)
    _close_to_others(data_root / "state")
    nix = nix_of(settings.nix)

    def wanted(closure_id: str) -> bool:
        return watch.wants(StorePath.from_basename(closure_id))  # made below, before there are volumes

    keep_warm = Warm(settings.keep_warm, settings.keep_warm_seconds, wanted)
    closures = StoreClosures(nix.store)
    volumes = Volumes(data_root, closures, keep_warm=keep_warm)
    ledger = Ledger(data_root / FILE)
    monitoring = NodeMonitoring(data_root, volumes, ledger)
    abandoned = AbandonedStore(
        data_root / CONTROLLER, volumes, node=settings.node_name, keep=settings.abandoned_seconds
    )
    collector = Collector(nix.store, data_root / "home", unsynced=nix.unsynced)
    housekeeping = Housekeeping(
        store=monitoring.measured(abandoned.before(collector)),
        uses=ledger,
        volumes=volumes,
        watermarks=settings.watermarks,
        released=lambda: closures.released,
    )
    try:
        async with monitoring.served(settings.metrics), connect() as api:
            config = CacheConfig(api, settings.namespace, data_root / "state/cache.json")
            watch = ExpressionWatch(api)
            pods = PodWatch(api, settings.node_name)
            events = EventRecorder(api, component="cknix-node", instance=settings.node_name)
            fetcher = StoreFetcher(nix, config.endpoints, fetched=monitoring.metrics.fetched_bytes)
            fetching = ClosureService(MeasuredFetcher(fetcher, monitoring.metrics), housekeeping)
            monitoring.metrics.show_fetches(fetching.count)
            dependencies = NodeDependencies(
                node_id=settings.node_name,
                system=settings.nix.system,
                endpoint=settings.endpoint,
                registration=settings.kubelet_root / "plugins_registry" / f"{DRIVER_NAME}-reg.sock",
                volumes=volumes,
                closures=fetching,
                expressions=watch,
                budget=settings.rpc_budget,
                sizes=settings.sizes,
                store_paths=StorePathRule(settings.store_paths, watch),
                pods=pods,
                events=PodEvents(events),
                remembered=RememberedResults(data_root / "state/results.json", settings.nix.system),
                ledger=ledger,
                room=housekeeping,
                metrics=monitoring.metrics,
                readiness=monitoring.readiness,
            )

            async def keep_room() -> None:
                await dependencies.in_order.wait()
                await housekeeping.run()

            await beside(
                {
                    "following Expressions": watch.run,
                    "following the node's pods": pods.run,
                    "posting Events": events.run,
                    "housekeeping": keep_room,
                    "measuring the event loop": monitoring.exposition.watch_loop,
                    "following the controller": partial(
                        follow_controller, api, settings.namespace, abandoned.controller_is_on
                    ),
                },
                run_node(dependencies, stop),
            )
    finally:
        await volumes.close()
        await nix.close()


async def _provisioner(settings: ProvisionerSettings, stop: asyncio.Event) -> None:
    from cknix_csi.csi.provisioner import run_provisioner  # noqa: PLC0415 - a controller needs no gRPC
    from cknix_csi.kube.client import connect  # noqa: PLC0415
    from cknix_csi.monitoring import ProvisionerMonitoring  # noqa: PLC0415

    monitoring = ProvisionerMonitoring()
    async with monitoring.served(settings.metrics), connect() as api:
        serving = run_provisioner(
            api,
            namespace=settings.namespace,
            endpoint=settings.endpoint,
            stop=stop,
            observe=monitoring.calls.rpc,
            readiness=monitoring.readiness,
        )
        await beside({"measuring the event loop": monitoring.exposition.watch_loop}, serving)


def take_descriptors() -> None:
    """Allow this process as many open files as it may allow itself: 1024 are fewer than clients and Nix can need.

    What Nix runs inherits that, as it does from nix-daemon's own unit, which has the same limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        _log.warning("the limit of %d open files cannot be raised to %d: %s", soft, wanted, error)


def _close_to_others(directory: Path) -> None:
    """Make *directory*, or take what rights others have there; volumes need neither."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)
    except OSError as error:
        _log.warning("%s cannot be had for this process alone: %s", directory, error.strerror)


async def _until_stopped(role: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await role(stop)
    _log.info("stopped")
