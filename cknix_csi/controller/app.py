"""The controller process: everything that runs in it, and how it stops."""

from __future__ import annotations

import asyncio
import logging

from cknix_csi.controller.key import ensure_key, publish_config
from cknix_csi.controller.nodes import ClusterSystems
from cknix_csi.controller.operator import Operator
from cknix_csi.controller.ports import Dependencies
from cknix_csi.controller.queue import BuildQueue
from cknix_csi.controller.reconcile import Services
from cknix_csi.controller.roots import release_orphans
from cknix_csi.controller.supervisor import Supervisor
from cknix_csi.kube.events import EventRecorder

COMPONENT = "cknix-controller"

_log = logging.getLogger(__name__)


async def run_controller(dependencies: Dependencies, stop: asyncio.Event, *, instance: str = COMPONENT) -> None:
    """Reconcile Expressions and serve the cache until *stop* is set.

    Then, and when something fails for good, every build's processes have ended before this returns.  *instance* names
    this process in Events (the pod's name).  Raises ``MalformedKey``, or OSError when the cache cannot listen.
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
    api, options = dependencies.api, dependencies.options
    key = await ensure_key(api, options.namespace, dependencies.generate_key)
    events = EventRecorder(api, component=COMPONENT, instance=instance, now=dependencies.now)
    supervisor = Supervisor(
        Services(
            api=api,
            nix=dependencies.nix,
            closures=dependencies.closures,
            roots=dependencies.roots,
            queue=BuildQueue(options.max_builds),
            cluster=ClusterSystems(api),
            events=events,
            options=options,
            now=dependencies.now,
        )
    )

    async def watch() -> None:
        # In this order: what is found gone here must not be what an Expression of a moment ago is about to root.
        await release_orphans(api, dependencies.roots)
        await Operator(api, supervisor).run()

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(dependencies.serve_cache(key), name="cache")
            tasks.create_task(
                publish_config(api, options.namespace, options.cache_url, key.public, options.node), name="cache config"
            )
            tasks.create_task(events.run(), name="events")
            tasks.create_task(supervisor.run(), name="supervisor")
            tasks.create_task(watch(), name="watch")
    except ExceptionGroup as group:
        # One failure ends the others; it is the news, not that there was a group.
        raise group.exceptions[0] from group
