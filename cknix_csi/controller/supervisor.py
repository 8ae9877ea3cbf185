"""One task per Expression: a change cancels what is obsolete, a deletion ends it, a repetition changes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cknix_csi.controller.reconcile import Memory, Reconciliation, Services, Wanted
from cknix_csi.controller.roots import keep_only
from cknix_csi.controller.status import ExpressionStatus
from cknix_csi.kube.events import Subject

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Known:
    """One Expression, from when it is first seen until it is released."""

    wanted: Wanted
    memory: Memory
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """The newest one, and cancelled ones that are still ending."""

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


class Supervisor:
    """Fed with every observation of every Expression; all of its work happens inside :meth:`run`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._known: dict[str, _Known] = {}
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
        known = self._known.get(uid)
        if (body.get("metadata") or {}).get("deletionTimestamp"):
            if known is not None:
                known.cancel()
            return
        if known is None:
            # Later on our own memory of the status is newer than what the watch shows.
            known = self._known[uid] = _Known(wanted, Memory(ExpressionStatus.parse(body)))
        elif known.wanted.trigger == wanted.trigger or wanted.generation < known.wanted.generation:
            return
        known.wanted = wanted
        known.cancel()
        before = frozenset(known.tasks)
        task = self._tasks.create_task(self._work(wanted, known.memory, before), name=f"expression {uid}")
        known.tasks.add(task)
        task.add_done_callback(known.tasks.discard)

    def phases(self) -> Mapping[str, int]:
        """How many Expressions are in which phase."""
        return Counter(known.memory.status.phase for known in self._known.values())

    async def release(self, subject: Subject) -> None:
        """The Expression is being deleted: its work ends, its roots go.  Raises OSError when they cannot."""
        known = self._known.get(subject.uid)
        if known is not None and known.tasks:
            known.cancel()
            await asyncio.wait(set(known.tasks))
        await keep_only(self._services.roots, subject.uid, ())
        # Last: whoever releases it again after this was cancelled must still find the work that has not ended.
        self._known.pop(subject.uid, None)
        _log.info("released %s", subject)

    async def release_all_but(self, alive: Collection[str]) -> None:
        """Release every Expression whose uid is not in *alive*: they have vanished unseen.  Raises OSError."""
        for uid, known in list(self._known.items()):
            if uid not in alive:
                await self.release(known.wanted.subject)

    async def _work(self, wanted: Wanted, memory: Memory, before: frozenset[asyncio.Task[None]]) -> None:
        if before:
            # Nix processes of the obsolete work end first; what it has published meanwhile counts.
            await asyncio.wait(before)
        try:
            await Reconciliation(self._services, wanted, memory).run()
        except Exception:
            # Nothing that is known comes here; one Expression's bug must not stop the others.
            _log.exception("the work on %s has stopped", wanted.subject)
