"""Evaluations whose derivations are kept from garbage collection until they have been built.

``nix eval`` makes derivations and holds them for as long as it runs; ``nix-store --realise`` holds them once it has
begun.  Between the two, which may be minutes apart, only a root does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable

from cknix_csi.api.errors import CknixError, OutOfSpace
from cknix_csi.api.expression import Data
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database
from cknix_csi.nix.collector import outlast_collector
from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.nix import Evaluation, Nix, OnProgress

_TRIES = 5


class HeldEvaluations:
    """Evaluates and builds as :class:`Nix` does; satisfies ``controller.ports.Nix``."""

    def __init__(self, nix: Nix, out_of_space: Callable[[], None] = lambda: None, owner: str = "evaluations") -> None:
        """*out_of_space* is told when the disk is full.  *owner* is a directory of GC roots of this object alone."""
        self._nix = nix
        self._out_of_space = out_of_space
        self._roots = GcRoots(nix.store, owner)
        self._held: Counter[StorePath] = Counter()
        self._turn = asyncio.Lock()
        """Nobody comes to need a root between the look at who does and its removal."""

    async def start(self) -> None:
        """Release what an earlier process held.  To be called before anything else."""
        await asyncio.to_thread(lambda: self._remove(self._roots.list()))

    async def evaluate(self, data: Data, system: str) -> Evaluation:
        """As :meth:`Nix.evaluate`; what must be built stays until :meth:`build` has ended, or the process has.

        Raises UNAVAILABLE as well, when it was collected each time before it could be held; and CollectionRuns.
        """
        for _ in range(_TRIES):
            try:
                evaluation = await self._nix.evaluate(data, system)
            except OutOfSpace:
                self._out_of_space()
                raise
            derivations = _derivations(evaluation)
            self._held.update(derivations)
            held = False
            try:
                async with self._turn:
                    new = await asyncio.to_thread(self._hold, derivations)
                await outlast_collector(self._nix.store, *new)
                held = await asyncio.to_thread(self._are_valid, derivations)
            finally:
                if not held:
                    await self._release(derivations)
            if held:
                return evaluation
        raise CknixError(
            f"what is to be built for {evaluation.result} was collected as garbage again and again",
            Situation.PATH_COLLECTED,
        )

    async def build(self, evaluation: Evaluation, *, progress: OnProgress) -> None:
        """As :meth:`Nix.build`."""
        try:
            await self._nix.build(evaluation, progress=progress)
        except OutOfSpace:
            self._out_of_space()
            raise
        finally:
            await self._release(_derivations(evaluation))

    async def substitute(self, path: StorePath) -> None:
        """Have *path* from the substituters of nix.conf, believing what nix.conf believes; nothing is built.

        Raises what :meth:`Nix.build` raises: BuildFailed when none has it, CacheUnavailable when one is away.
        """
        await self.build(Evaluation(path), progress=lambda _: None)

    def _hold(self, derivations: Iterable[StorePath]) -> list[StorePath]:
        """Take roots; returns what had none."""
        new = [derivation for derivation in derivations if not self._roots.has(derivation.basename, derivation)]
        for derivation in new:
            self._roots.add(derivation.basename, derivation)
        return new

    def _are_valid(self, derivations: Iterable[StorePath]) -> bool:
        return all(database.is_valid(self._nix.store, derivation) for derivation in derivations)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._roots.remove(name)

    async def _release(self, derivations: Iterable[StorePath]) -> None:
        async with self._turn:
            self._held.subtract(derivations)
            unused = [derivation for derivation in derivations if self._held[derivation] <= 0]
            for derivation in unused:
                del self._held[derivation]
            await asyncio.to_thread(self._remove, [derivation.basename for derivation in unused])


def _derivations(evaluation: Evaluation) -> frozenset[StorePath]:
    return frozenset(StorePath.parse(target.partition("!")[0]) for target in evaluation.derivations)
