"""From what a volume asks for to one exact store path."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Protocol

from cknix_csi.api.attributes import EXPRESSION, FromExpression, FromSource, FromStorePath, VolumeSource
from cknix_csi.api.errors import CacheUnavailable, CknixError, InProgress, NotFound, OtherCacheUnavailable
from cknix_csi.api.expression import FAILED, SUCCEEDED, Observed
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.waiting import OnWait, untold

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 5.0
"""An API server that takes longer does not answer, as far as a result is concerned that is known from before."""


class Expressions(Protocol):
    """The cluster's Expressions; satisfied by ``kube.expressions.ExpressionWatch``."""

    async def get(self, namespace: str, name: str) -> Observed:
        """Raises :class:`NotFound`, or a :class:`CknixError` with UNAVAILABLE when the API server cannot be asked."""

    async def changed(self, seen: Observed) -> Observed:
        """Wait until the object differs from *seen*.  Raises :class:`NotFound` when it has been deleted."""


class Results(Protocol):
    """Last known results; satisfied by ``csi.remembered.RememberedResults``."""

    def get(self, expression: FromExpression) -> StorePath | None:
        """The last result that was kept."""

    def keep(self, expression: FromExpression, result: StorePath) -> None:
        """*result* is what the API server says now."""

    def forget(self, expression: FromExpression) -> None:
        """The API server says that there is no such Expression."""


class Resolver:
    """Resolves volume sources on a node of *system*; *expressions* is None where there is no Kubernetes.

    A result from *remembered* is taken only where no API server says anything: one that answers, be it that the
    Expression does not exist, is always believed.
    """

    def __init__(self, system: str, expressions: Expressions | None, remembered: Results | None = None) -> None:
        self._system = system
        self._expressions = expressions
        self._remembered = remembered

    async def resolve(self, source: VolumeSource, *, budget: float, waiting: OnWait = untold) -> StorePath:
        """The store path that *source* means now.

        Waits up to *budget* seconds for an Expression that has no result yet, and returns as soon as it has one;
        *waiting* hears of it.
        Raises :class:`InProgress` when the budget ends, :class:`NotFound`, or a :class:`CknixError` with
        FAILED_PRECONDITION when waiting would not help.
        """
        match source:
            case FromStorePath(path):
                return path
            case FromExpression():
                return await self._expression(source, budget, waiting)
            case FromSource():
                raise _refused(
                    f'volume attribute "{source.kind}": Nix text inside a volume is not evaluated yet; '
                    f'apply an Expression with this text and name it with the attribute "{EXPRESSION}"'
                )

    async def _expression(self, source: FromExpression, budget: float, waiting: OnWait) -> StorePath:
        if self._expressions is None:
            raise _refused(
                f'volume attribute "{EXPRESSION}": {source} cannot be looked up, this driver runs without Kubernetes; '
                'use "storePath"'
            )
        observed: Observed | None = None
        try:
            async with asyncio.timeout(max(budget, 0)):
                found = await self._look(self._expressions, source)
                if isinstance(found, StorePath):
                    return found
                observed = found
                while (path := settle(observed, self._system)) is None:
                    waiting(Situation.WAITING_FOR_EXPRESSION, partial(_pending, observed))
                    observed = await self._expressions.changed(observed)
        except TimeoutError:
            raise _not_yet(source, observed) from None
        except NotFound:
            if self._remembered is not None:
                self._remembered.forget(source)
            raise NotFound(
                f'Expression "{source}" does not exist; create it or correct the volume attribute "{EXPRESSION}" '
                "(an inline volume cannot name an Expression of another namespace)",
                Situation.EXPRESSION_NOT_FOUND,
            ) from None
        if self._remembered is not None:
            self._remembered.keep(source, path)
        return path

    async def _look(self, expressions: Expressions, source: FromExpression) -> Observed | StorePath:
        """What the API server says of *source*, or the remembered result when it says nothing."""
        remembered = None if self._remembered is None else self._remembered.get(source)
        if remembered is None:
            return await expressions.get(source.namespace, source.name)
        patience = asyncio.timeout(_PATIENCE_SECONDS)
        try:
            async with patience:
                return await expressions.get(source.namespace, source.name)
        except TimeoutError:
            if not patience.expired():  # the budget is shorter
                raise
            why = f"the API server did not answer within {_PATIENCE_SECONDS:.0f}s"
        except CknixError as error:
            if not error.code.transient:
                raise
            why = error.message
        log.warning("using the last known result of Expression %s, %s: %s", source, remembered, why)
        return remembered


def settle(observed: Observed, system: str) -> StorePath | None:
    """The latest good result for *system*, or None when one may still come.

    A result stays good while a newer generation is built, and when that fails.  Raises :class:`CknixError` with
    FAILED_PRECONDITION when there is none and none is on its way.
    """
    if system in observed.results:
        return observed.results[system]
    if observed.observed_generation < observed.generation or observed.phase not in {SUCCEEDED, FAILED}:
        return None
    if observed.phase == FAILED:
        raise CknixError(
            f"Expression {observed} failed (generation {observed.generation}): {observed.message or 'no message'}",
            Situation.EXPRESSION_FAILED,
        )
    results = ", ".join(sorted(observed.results)) or "no system"
    raise CknixError(
        f"Expression {observed} has no result for this node's system {system}, only for {results}; "
        "add the system to spec.systems, or run the pod on another node",
        Situation.WRONG_SYSTEM,
    )


def nowhere(source: VolumeSource, path: StorePath, error: CacheUnavailable | NotFound) -> CknixError:
    """*error* of fetching *path*, for the reader who has named *source*: what it means that the cache has lost it."""
    if not isinstance(source, FromExpression):
        return error
    help_ = (
        f"`kubectl -n {source.namespace} describe expr {source.name}` tells whether it is being built again or lost, "
        "and what helps"
    )
    if isinstance(error, NotFound):
        return NotFound(
            f"{path}, the result of Expression {source}, is not on this node, and the controller's cache does not have "
            f"it; {help_}",
            Situation.RESULT_LOST,
        )
    if isinstance(error, OtherCacheUnavailable):
        return CacheUnavailable(f"{error.message}; {help_}")
    return error


def _not_yet(source: FromExpression, observed: Observed | None) -> CknixError:
    if observed is None:
        return CknixError(
            f"the API server did not answer in time about Expression {source}; kubelet will retry",
            Situation.KUBERNETES_UNAVAILABLE,
        )
    return InProgress(f"{_pending(observed)}; kubelet will retry", Situation.WAITING_FOR_EXPRESSION)


def _pending(observed: Observed) -> str:
    detail = f": {observed.message}" if observed.message else ""
    return f"Expression {observed} has no result yet (generation {observed.generation}, {observed.phase}){detail}"


def _refused(message: str) -> CknixError:
    return CknixError(message, Situation.UNSUPPORTED_SOURCE)
