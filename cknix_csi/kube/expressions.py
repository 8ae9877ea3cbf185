"""The Expressions of the cluster as one process sees them: in memory, fed by one watch."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import NoReturn

from cknix_csi.api.errors import CknixError, NotFound
from cknix_csi.api.expression import Observed
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.kube.api import NOT_FOUND, Api, ApiError, Json, expressions
from cknix_csi.kube.listwatch import list_and_watch

# How often somebody who waits for an object that the watch has not shown yet asks for it by name.
_ASK_AGAIN_SECONDS = 5.0
# An Expression may be hundreds of kilobytes, whoever wrote it, and a page of a list is read as a whole.
_PAGE = 50

_Key = tuple[str, str]


class ExpressionWatch:
    """Keeps an :class:`Observed` per Expression, so that a publish of a known closure makes no API call."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[_Key, Observed] = {}
        self._results: dict[StorePath, int] = {}
        """Of how many Expressions and systems each is a result."""
        self._complete = False
        self._changed = asyncio.Condition()
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Follow all Expressions until cancelled; an API server that is away is waited for."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell())
            tasks.create_task(self._follow())

    async def get(self, namespace: str, name: str) -> Observed:
        """The Expression from memory; one that is not there yet is asked for once.

        Raises :class:`NotFound` when it does not exist, :class:`CknixError` (``UNAVAILABLE``) when nobody can tell.
        """
        known = self._known.get((namespace, name))
        return known if known is not None else await self._ask(namespace, name)

    async def changed(self, seen: Observed) -> Observed:
        """Wait until the Expression differs from *seen*.  Raises :class:`NotFound` when it is deleted.

        An API server that is away is waited for as well: the caller has the budget.
        """
        key = (seen.namespace, seen.name)
        was_known = key in self._known
        while True:
            known = self._known.get(key)
            if known is not None and known != seen:
                return known
            if known is None:
                # Not in memory means deleted only if it has been there; else the watch may be behind.
                if was_known:
                    raise _not_found(*key)
                try:
                    asked = await self._ask(*key)
                except NotFound:
                    raise
                except CknixError:
                    asked = seen
                if asked != seen:
                    return asked
            was_known = was_known or known is not None
            await self._wait(key, known, limit=None if known is not None else _ASK_AGAIN_SECONDS)

    def publishes(self, namespace: str, path: StorePath) -> bool:
        """Whether *path* is a result of an Expression of *namespace*, as far as the watch has shown.

        Raises :class:`CknixError` (``UNAVAILABLE``) when it has shown nothing yet.
        """
        if not self._complete:
            raise CknixError(
                f"it cannot be told yet whether {path} is a result of an Expression of namespace {namespace}: the API "
                "server has not listed them; kubelet will retry",
                Situation.KUBERNETES_UNAVAILABLE,
            )
        return any(
            path in observed.results.values() for observed in self._known.values() if observed.namespace == namespace
        )

    def wants(self, path: StorePath) -> bool:
        """Whether *path* is now a result of any Expression that the watch has shown; may be called in any thread."""
        return self._results.get(path, 0) > 0

    async def _wait(self, key: _Key, known: Observed | None, *, limit: float | None) -> None:
        async with self._changed:
            try:
                async with asyncio.timeout(limit):
                    await self._changed.wait_for(lambda: self._known.get(key) != known)
            except TimeoutError:
                return

    async def _ask(self, namespace: str, name: str) -> Observed:
        try:
            return Observed.parse(await self._api.get(expressions(namespace, name)))
        except ApiError as error:
            if error.status == NOT_FOUND:
                raise _not_found(namespace, name) from None
            raise CknixError(
                f"Expression {namespace}/{name} is not known here yet, and {error.message}",
                Situation.KUBERNETES_UNAVAILABLE,
            ) from error

    async def _follow(self) -> NoReturn:
        await list_and_watch(
            self._api,
            expressions(),
            listed=self._listed,
            changed=self._one_changed,
            trim=_trimmed,
            page=_PAGE,
        )

    async def _tell(self) -> NoReturn:
        # The watch's callbacks are plain functions; this wakes those who wait in changed().
        while True:
            await self._news.wait()
            self._news.clear()
            async with self._changed:
                self._changed.notify_all()

    def _listed(self, items: list[Json]) -> None:
        found = [Observed.parse(item) for item in items]
        self._known = {(item.namespace, item.name): item for item in found}
        self._results = Counter(path for item in found for path in item.results.values())
        self._complete = True
        self._news.set()

    def _one_changed(self, kind: str, body: Json) -> None:
        observed = Observed.parse(body)
        key = (observed.namespace, observed.name)
        before = self._known.get(key)
        if kind != "DELETED":
            self._known[key] = observed
            self._count(observed, 1)
            self._count(before, -1)
        elif before is not None and before.uid == observed.uid:
            del self._known[key]
            self._count(before, -1)
        self._news.set()

    def _count(self, observed: Observed | None, change: int) -> None:
        for path in () if observed is None else observed.results.values():
            self._results[path] = self._results.get(path, 0) + change
            if not self._results[path]:
                del self._results[path]


def _trimmed(body: Json) -> Json:
    """All of an Expression that :meth:`Observed.parse` looks at, which is neither its text nor its history."""
    metadata, status = body.get("metadata") or {}, body.get("status") or {}
    return {
        "metadata": {name: metadata.get(name) for name in ("namespace", "name", "uid", "generation")},
        "status": {
            name: status.get(name) for name in ("observedGeneration", "phase", "message", "results", "conditions")
        },
    }


def _not_found(namespace: str, name: str) -> NotFound:
    return NotFound(
        f"Expression {namespace}/{name} does not exist; create it, or correct the name", Situation.EXPRESSION_NOT_FOUND
    )
