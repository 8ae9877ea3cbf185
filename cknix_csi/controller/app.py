"""The controller process: everything that runs in it, and how it stops."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from cknix_csi.controller.ending import let_go_at_last
from cknix_csi.controller.health import alive
from cknix_csi.controller.key import publish_config, with_key
from cknix_csi.controller.measured import MeasuredNix
from cknix_csi.controller.nodes import ClusterSystems
from cknix_csi.controller.operator import Operator
from cknix_csi.controller.ports import Dependencies
from cknix_csi.controller.queue import BuildQueue
from cknix_csi.controller.reconcile import Services
from cknix_csi.controller.supervisor import Supervisor
from cknix_csi.kube.api import Api
from cknix_csi.kube.events import EventRecorder
from cknix_csi.kube.lease import FencedApi, Lease
from cknix_csi.metrics.ports import State
from cknix_csi.nix.cache.signing import KeyPair

COMPONENT = "cknix-controller"
LEASE = "cknix-controller"

_log = logging.getLogger(__name__)


async def run_controller(dependencies: Dependencies, stop: asyncio.Event, *, instance: str = COMPONENT) -> None:
    """Reconcile Expressions and serve the cache until *stop* is set; wait while another controller does.

    Then, and when something fails for good, every build's processes have ended before this returns.  *instance* names
    this process in Events and in the Lease (the pod's name).  Raises ``MalformedKey``, or OSError when the cache or
    ``/livez`` cannot listen.
    """
    working = asyncio.create_task(_work(dependencies, instance), name="controller")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
    if not working.cancelled():
        working.result()


async def _work(dependencies: Dependencies, instance: str) -> None:
    """Take turns with other controllers, for ever."""
    options = dependencies.options
    lease = Lease(dependencies.api, options.namespace, LEASE, instance, timing=options.lease, now=dependencies.now)
    async with alive(options.health, dependencies.metrics_page):
        while True:
            await lease.acquire()
            await _lead(dependencies, instance, lease)
            _log.warning("another controller has taken over; this one waits for its turn")


async def _lead(dependencies: Dependencies, instance: str, lease: Lease) -> None:
    """Do the controller's work; returns when another one has the Lease.  Nothing of it runs on after this."""
    options = dependencies.options
    api = FencedApi(dependencies.api, lease)
    events = EventRecorder(api, component=COMPONENT, instance=instance, now=dependencies.now)
    queue = BuildQueue(options.max_builds)
    supervisor = Supervisor(
        Services(
            api=api,
            nix=MeasuredNix(dependencies.nix, dependencies.metrics),
            closures=dependencies.closures,
            roots=dependencies.roots,
            queue=queue,
            cluster=ClusterSystems(api),
            events=events,
            options=options,
            now=dependencies.now,
            metrics=dependencies.metrics,
        )
    )
    dependencies.metrics.lead(lambda: State(supervisor.phases(), waiting=queue.waiting, served=queue.served))
    try:
        async with asyncio.TaskGroup() as tasks:
            working = [
                tasks.create_task(
                    with_key(api, options.namespace, dependencies.generate_key, partial(_publish, dependencies, api)),
                    name="cache",
                ),
                tasks.create_task(events.run(), name="events"),
                tasks.create_task(supervisor.run(), name="supervisor"),
                tasks.create_task(Operator(api, supervisor, dependencies.roots).run(), name="watch"),
            ]
            await lease.hold()
            for task in working:
                task.cancel()
    except asyncio.CancelledError:
        await let_go_at_last(api, supervisor.release)
        raise
    except ExceptionGroup as group:
        # One failure ends the others; it is the news, not that there was a group.
        raise _first(group) from group
    finally:
        dependencies.metrics.lead(None)
        await lease.release()


async def _publish(dependencies: Dependencies, api: Api, key: KeyPair) -> None:
    """Serve the cache, and keep the nodes told where it is and whose signatures to believe."""
    options = dependencies.options
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(dependencies.serve_cache(key))
        tasks.create_task(publish_config(api, options.namespace, options.cache_url, key.public, options.node))


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
