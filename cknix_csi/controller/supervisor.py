"""One task per Expression: a change cancels what is obsolete, a deletion ends it, a repetition changes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cknix_csi.controller.reconcile import Reconciliation, Services, Wanted
from cknix_csi.controller.roots import keep_only
from cknix_csi.controller.status import ExpressionStatus
from cknix_csi.kube.events import Subject

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Current:
    reconciliation: Reconciliation
    task: asyncio.Task[None]


class Supervisor:
    """Fed with every observation of every Expression; all of its work happens inside :meth:`run`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._current: dict[str, _Current] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Work until cancelled; then every task is cancelled and has ended before this returns."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await asyncio.Event().wait()
        finally:
            self._tasks = None

    def observe(self, body: Mapping[str, Any]) -> None:
        """An Expression looks like this now.  Cheap, and safe to repeat."""
        if self._tasks is None:
            return
        wanted = Wanted.parse(body)
        uid = wanted.subject.uid
        current = self._current.get(uid)
        if (body.get("metadata") or {}).get("deletionTimestamp"):
            if current is not None:
                current.task.cancel()
            return
        if current is not None:
            running = current.reconciliation.wanted
            if running.trigger == wanted.trigger or wanted.generation < running.generation:
                return
            current.task.cancel()
        # While we work on an object, our own memory of its status is newer than what the watch shows.
        status = ExpressionStatus.parse(body) if current is None else current.reconciliation.status
        reconciliation = Reconciliation(self._services, wanted, status)
        task = self._tasks.create_task(self._work(reconciliation, current), name=f"expression {uid}")
        self._current[uid] = _Current(reconciliation, task)

    async def release(self, subject: Subject) -> None:
        """The Expression is being deleted: its work ends, its roots go.  Raises OSError when they cannot."""
        current = self._current.pop(subject.uid, None)
        if current is not None:
            current.task.cancel()
            await asyncio.wait({current.task})
        await keep_only(self._services.roots, subject.uid, ())
        _log.info("released %s/%s", subject.namespace, subject.name)

    async def _work(self, reconciliation: Reconciliation, before: _Current | None) -> None:
        if before is not None:
            # Nix processes of the obsolete work end first; what it has published meanwhile counts.
            await asyncio.wait({before.task})
            reconciliation.status = before.reconciliation.status
        try:
            await reconciliation.run()
        except Exception:
            # Nothing that is known comes here; one Expression's bug must not stop the others.
            _log.exception("the work on %s has stopped", reconciliation.wanted.subject)
