"""What the roles tell about their work, for whoever counts it.

Here nobody does: these classes are the default everywhere, and :mod:`.node` and :mod:`.controller` count for
Prometheus.  Every method is called on the event loop, takes microseconds and never fails.

An *outcome* is ``OK`` or the reason of an error (``CknixError.reason``); an error that is none of ours is
``Unexpected``, and ``Cancelled`` is what somebody else has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from cknix_csi.api.errors import CknixError

Closure = Literal["mounted", "known", "new", "unknown"]
"""What a publish has found of its closure: ``mounted`` at its target already, ``known`` on this node, ``new`` and to be
fetched; or it failed before that could be told."""

Work = Literal["evaluation", "build"]

OK = "OK"
CANCELLED = "Cancelled"
UNEXPECTED = "Unexpected"


def outcome_of(error: BaseException | None) -> str:
    """The outcome of work that ended by *error*."""
    if error is None:
        return OK
    if isinstance(error, CknixError):
        return error.reason
    return CANCELLED if isinstance(error, asyncio.CancelledError) else UNEXPECTED


class NodeMetrics:
    """Of the node daemon.  Times are seconds."""

    def rpc(self, method: str, code: str, reason: str, seconds: float) -> None:
        """A call of *method* (``/csi.v1.Node/NodePublishVolume``) was answered with *code*, gRPC's name of it in
        capitals; *reason* is the outcome."""

    def publish(self, outcome: str, closure: Closure, seconds: float) -> None:
        """A publish has come to its end."""

    def unpublish(self, outcome: str, seconds: float) -> None:
        """An unpublish has come to its end."""

    def fetch(self, outcome: str, seconds: float) -> None:
        """A fetch has ended; it had its turn for so long."""

    def fetched_bytes(self, size: int) -> None:
        """A fetch has brought paths of together *size* bytes, as NARs, that were not there."""


@dataclass(frozen=True, slots=True)
class State:
    """What a controller is about."""

    phases: Mapping[str, int]
    """Expressions by phase; those that are missing are none."""
    waiting: int
    """Expressions in the queue."""
    served: int
    """Expressions whose turn it is."""


class ControllerMetrics:
    """Of the controller.  Times are seconds."""

    def begin(self, work: Work) -> None:
        """An evaluation, or a build, for one system begins."""

    def end(self, work: Work, outcome: str, seconds: float) -> None:
        """It has ended."""

    def failure(self, reason: str) -> None:
        """A try to bring an Expression to its result has failed, for good or until the next try."""

    def lead(self, state: Callable[[], State] | None) -> None:
        """This process holds the Lease, and *state* says how things are; None: it does not hold it any more."""


class CollectionMetrics:
    """Of garbage collections, in either role."""

    def collection(self, outcome: str, seconds: float, size: int, paths: int) -> None:
        """A collection has ended, which freed *size* bytes and deleted so many *paths*."""


class CacheMetrics:
    """Of the binary cache."""

    def answered(self, kind: str, code: int) -> None:
        """A request for *kind* was answered with HTTP status *code*."""

    def sent(self, size: int) -> None:
        """So many bytes of NARs have gone out."""
