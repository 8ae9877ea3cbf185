"""Errors that know what to tell kubelet and the person who reads ``kubectl describe pod``.

Every failure that leaves the program by gRPC, Event or condition is a :class:`CknixError`.  The code is one of gRPC's
canonical codes (CSI spec, "Error Scheme"); ``csi`` translates it, so that no other package needs gRPC.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Code(enum.Enum):
    """The canonical gRPC codes this driver answers with.

    kubelet treats the *transient* ones as "may be mounted": it retries, and unpublishes when the pod goes away.  After
    any other code it forgets the volume, so whatever the call created must be gone before the answer is sent.
    """

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    INTERNAL = "INTERNAL"
    ABORTED = "ABORTED"
    UNAVAILABLE = "UNAVAILABLE"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"

    @property
    def transient(self) -> bool:
        """True when kubelet keeps the volume as "uncertain" and promises to unpublish it."""
        return self in {Code.ABORTED, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED}


class CknixError(Exception):
    """A failure with a stable reason (CamelCase, used for Events and conditions) and a gRPC code."""

    code: Code = Code.INTERNAL
    reason: str = "InternalError"

    def __init__(self, message: str, *, code: Code | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if reason is not None:
            self.reason = reason


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an input: the field, in the reader's own terms, and what to do about it."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class Invalid(CknixError):
    """An input with one or more problems, all reported at once."""

    code = Code.INVALID_ARGUMENT
    reason = "InvalidInput"

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))


class InProgress(CknixError):
    """Work that goes on after the answer; the caller's retry joins it."""

    code = Code.ABORTED
    reason = "InProgress"


class Conflict(CknixError):
    """A different volume, or the same one with other arguments, is already there."""

    code = Code.ALREADY_EXISTS
    reason = "VolumeConflict"


class NotFound(CknixError):
    """The thing a volume names does not exist."""

    code = Code.NOT_FOUND
    reason = "NotFound"


class EvaluationFailed(CknixError):
    """Nix rejected the expression, or its value is not something that can be mounted."""

    code = Code.FAILED_PRECONDITION
    reason = "EvaluationFailed"


class BuildFailed(CknixError):
    """A derivation did not build."""

    code = Code.FAILED_PRECONDITION
    reason = "BuildFailed"


class DeadlineExceeded(CknixError):
    """An evaluation, build or fetch ran longer than its setting allows and was stopped."""

    code = Code.FAILED_PRECONDITION
    reason = "DeadlineExceeded"


class SourceUnavailable(CknixError):
    """A server that an evaluation needs something from could not be asked."""

    code = Code.UNAVAILABLE
    reason = "SourceUnavailable"


class CacheUnavailable(CknixError):
    """No binary cache could be reached for a path that this node does not have."""

    code = Code.UNAVAILABLE
    reason = "CacheUnavailable"


class PathUntrusted(CknixError):
    """A cache offered a path whose signature or content does not hold."""

    code = Code.FAILED_PRECONDITION
    reason = "PathUntrusted"


class OutOfSpace(CknixError):
    """A file system this driver writes to is full."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "OutOfSpace"


class MountFailed(CknixError):
    """The kernel refused a mount."""

    code = Code.INTERNAL
    reason = "MountFailed"
