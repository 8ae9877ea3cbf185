"""Whether what a volume shows is all there, looked at while pods use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from cknix_csi.api.errors import CknixError
from cknix_csi.api.presentation import Presentation
from cknix_csi.volumes.closures import Closures
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.locks import KeyedLocks
from cknix_csi.volumes.trees import Trees


class Conditions:
    """Of closures, as volumes of *trees* show them.

    One look costs some 10 µs per store path, in a thread, and is shared by all volumes of a closure for *fresh*
    seconds when nothing is wrong; what is wrong is looked at again each time, so that its end is told at once.
    """

    def __init__(self, trees: Sequence[Trees], closures: Closures, *, fresh: float = 55.0) -> None:
        self._trees = {each.presentation: each for each in trees}
        self._closures = closures
        self._fresh = fresh
        self._well: dict[tuple[Presentation, str], float] = {}
        """When a closure was last found to be."""
        self._held: frozenset[str] = frozenset()
        self._held_at = 0.0
        self._locks = KeyedLocks()

    async def problem(self, presentation: Presentation, closure_id: str) -> str | None:
        """What is wrong with what volumes show of a closure, None when nothing is.  A copy needs nothing of the store.

        What is looked at: that each store path is in the store and is what was to be shown, and the GC root.
        """
        trees = self._trees.get(presentation)
        if trees is None:
            return None
        key = presentation, closure_id
        async with self._locks.hold(f"{presentation.value} {closure_id}"):  # never two looks at one closure
            if time.monotonic() - self._well.get(key, -self._fresh) < self._fresh:
                return None
            problem = await self._look(trees, closure_id)
            self._remember(key, well=problem is None)
            return problem

    async def _look(self, trees: Trees, closure_id: str) -> str | None:
        try:
            flaw = await asyncio.to_thread(trees.look, closure_id)
            held = flaw is not None or await self._is_held(closure_id)
        except CknixError as error:
            return error.message
        if flaw is not None:
            return (
                f"the {trees.noun} is damaged: {flaw}; delete the pods on this node that use {closure_id}: when the "
                f"last has gone, it is built anew"
            )
        if not held:
            return (
                f"its GC root is gone, so Nix may delete its files: restart the node daemon, which takes it again "
                f"({closure_id})"
            )
        return None

    async def _is_held(self, closure_id: str) -> bool:
        if closure_id not in self._held or time.monotonic() - self._held_at >= self._fresh:
            with explained("list the GC roots"):
                held = await self._closures.held()
            self._held = frozenset(name for name, root in held.items() if name == root.basename)
            self._held_at = time.monotonic()
        return closure_id in self._held

    def _remember(self, key: tuple[Presentation, str], *, well: bool) -> None:
        now = time.monotonic()
        self._well = {each: at for each, at in self._well.items() if now - at < self._fresh and each != key}
        if well:
            self._well[key] = now
