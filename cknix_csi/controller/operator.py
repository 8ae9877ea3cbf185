"""kopf: which Expressions there are, and the finalizer that makes their deletion wait for us.  Nothing else.

kopf runs in a thread and an event loop of its own: when it ends, it cancels every task of its loop that it does not
know (its running.py), and it does end when the API server refuses a list for a minute.  Builds outlive that, and kopf
is started again.

kopf asks once, at its start, what the API server has.  So it runs for as long as one definition of Expressions (CRD) is
served, and ends and begins anew with it; see :mod:`cknix_csi.controller.ending` for the time in between.

Handlers only pass things on.  There is no handler for creation or change, since what to do follows from the state and
not from the difference; so kopf needs no record of the last handled configuration, which otherwise would copy every
expression into an annotation of its object (kopf issue 1087).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import kopf

# Not exported, though kopf.operator() takes one: it alone tells what kopf has found to watch.
from kopf._cogs.structs.references import Insights

from cknix_csi.api.expression import FINALIZER, GROUP, PLURAL, VERSION
from cknix_csi.controller.ending import let_go
from cknix_csi.controller.ports import Roots
from cknix_csi.controller.roots import release_orphans
from cknix_csi.controller.supervisor import Supervisor
from cknix_csi.kube.api import Api
from cknix_csi.kube.backoff import Backoff
from cknix_csi.kube.client import load_configuration
from cknix_csi.kube.definition import NAME, Definition, DefinitionWatch
from cknix_csi.kube.events import Subject

RELEASE_RETRY_SECONDS = 10.0
# A run of kopf that lasted longer than this was a good one.
_STEADY_SECONDS = 60.0

_log = logging.getLogger(__name__)


class Operator:
    """Feeds *supervisor*, which lives in the loop that calls :meth:`run`."""

    def __init__(self, api: Api, supervisor: Supervisor, roots: Roots) -> None:
        self._api = api
        self._supervisor = supervisor
        self._roots = roots

    async def run(self) -> None:
        """Do what the state of the definition asks for, until cancelled."""
        # kopf tells of every event that was passed on; what matters of it is told by the supervisor.
        logging.getLogger("kopf.objects").setLevel(logging.WARNING)
        # It warns that it does not listen to signals in a thread, which is as it should be.
        logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
        definition = DefinitionWatch(self._api)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(definition.run(), name="definition")
            state = await definition.other_than(None)
            while True:
                work = tasks.create_task(self._work(state), name=f"definition {state.uid}")
                state = await definition.other_than(state)
                work.cancel()
                await asyncio.wait({work})

    async def _work(self, state: Definition) -> None:
        if state.served:
            await self._watch()
        elif state.terminating:
            _log.info("the CustomResourceDefinition %s is being deleted, and every Expression with it", NAME)
            await let_go(self._api, self._supervisor.release)
        else:
            # Roots stay: which Expressions are gone is known from a list of them, and nobody can list them now.
            _log.warning("the CustomResourceDefinition %s is not served; waiting for it", NAME)

    async def _watch(self) -> None:
        """Run kopf, again and again, until cancelled."""
        backoff = Backoff(first=1.0, cap=30.0)
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                await self._until_discovered()
                # Each time, since kopf does not tell of what vanished while it did not watch, such as with a former
                # definition.  A definition goes only when the last of its Expressions is gone, and what is read here
                # is a complete list of the Expressions of this one: an empty list means that there are none.
                # Before kopf: what is found gone must not be what an Expression of a moment ago is about to root.
                alive = await release_orphans(self._api, self._roots)
                await self._supervisor.release_all_but(alive)
                await self._run_once(loop)
                _log.warning("kopf has stopped")
            except Exception as error:  # whatever kopf stumbled over, Expressions must be watched again
                _log.warning("kopf has stopped: %s", error, exc_info=_log.isEnabledFor(logging.DEBUG))
            if loop.time() - started > _STEADY_SECONDS:
                backoff.reset()
            await asyncio.sleep(backoff.next())

    async def _until_discovered(self) -> None:
        """Wait until discovery has Expressions, a moment after their definition is served: kopf looks there, once."""
        while True:
            groups = (await self._api.get("/apis")).get("groups") or []
            if any(group.get("name") == GROUP for group in groups):
                resources = (await self._api.get(f"/apis/{GROUP}/{VERSION}")).get("resources") or []
                # Without "patch" it still shows a definition that was being deleted; kopf would take that for all time.
                if any(found.get("name") == PLURAL and "patch" in (found.get("verbs") or ()) for found in resources):
                    return
            await asyncio.sleep(0.5)

    async def _run_once(self, loop: asyncio.AbstractEventLoop) -> None:
        thread = KopfThread(self._registry(loop))
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kopf")
        running = loop.run_in_executor(executor, thread.run)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            thread.stop()
            await asyncio.wait({running})
            raise
        finally:
            executor.shutdown(wait=False)

    def _registry(self, loop: asyncio.AbstractEventLoop) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        supervisor = self._supervisor

        @kopf.on.login(registry=registry)
        async def login(**_: Any) -> kopf.ConnectionInfo:
            return await connection()

        @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
        async def observed(type: str | None, body: kopf.Body, **_: Any) -> None:
            if type == "DELETED":
                # Usually done by the finalizer; somebody may have taken that away by hand.
                await _in(loop, supervisor.release(_subject(body)))
            else:
                raw = dict(body)
                loop.call_soon_threadsafe(supervisor.observe, raw)

        @kopf.on.delete(GROUP, VERSION, PLURAL, registry=registry)
        async def deleted(body: kopf.Body, **_: Any) -> None:
            try:
                await _in(loop, supervisor.release(_subject(body)))
            except OSError as error:
                raise kopf.TemporaryError(f"GC roots not released: {error}", delay=RELEASE_RETRY_SECONDS) from error

        return registry


class KopfThread:
    """One run of kopf, in whatever thread :meth:`run` is called in.

    It writes without asking whether the Lease is still held, and need not: all it writes are finalizers, and an
    Expression whose finalizer is gone too soon is told to every controller that watches, and its roots are released.
    """

    def __init__(self, registry: kopf.OperatorRegistry) -> None:
        self._registry = registry
        self._settings = operator_settings()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._blind = False

    def run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._operate())

    def stop(self) -> None:
        """Callable from another thread, also when it has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _operate(self) -> None:
        insights = Insights()
        # Made before kopf begins, so that kopf leaves it alone at its end.
        looking = asyncio.create_task(self._stop_if_blind(insights))
        try:
            await kopf.operator(
                registry=self._registry,
                settings=self._settings,
                insights=insights,
                clusterwide=True,
                standalone=True,
                stop_flag=self._stop,
            )
        finally:
            looking.cancel()
        if self._blind:
            raise RuntimeError("it was not told of Expressions by the API server that it asked")

    async def _stop_if_blind(self, insights: Insights) -> None:
        """kopf looks once.  One of several API servers may know of a new definition a moment later than the others."""
        await insights.ready_resources.wait()
        if not insights.watched_resources:
            self._blind = True
            self._stop.set()


class NoDiffBase(kopf.DiffBaseStorage):
    """Remembers nothing about what was handled last, since no handler here depends on a difference."""

    def build(self, *, body: kopf.Body, extra_fields: Iterable[Any] | None = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Nothing: see the class."""


def operator_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.persistence.finalizer = FINALIZER
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP, v1=False)
    settings.persistence.diffbase_storage = NoDiffBase()
    # Else it would want to read every CRD of the cluster; ours alone is watched in run().
    settings.scanning.disabled = True
    # Our Events have stable reasons and are counted; kopf's would be noise beside them.
    settings.posting.enabled = False
    settings.networking.request_timeout = 30.0
    settings.networking.connect_timeout = 10.0
    settings.watching.connect_timeout = 10.0
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.chunk_size = 250
    # This process decides itself how long its end may take.
    settings.process.ultimate_exiting_timeout = None
    return settings


async def connection() -> kopf.ConnectionInfo:
    configuration = await load_configuration()
    header = await configuration.get_api_key_with_prefix("BearerToken") or ""
    return kopf.ConnectionInfo(
        server=str(configuration.host),
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        token=header.removeprefix("Bearer ").strip() or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
    )


def _subject(body: kopf.Body) -> Subject:
    return Subject(str(body.metadata.namespace), str(body.metadata.name), str(body.metadata.uid))


async def _in(loop: asyncio.AbstractEventLoop, work: Any) -> None:
    """Run the coroutine *work* in another thread's *loop*."""
    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
