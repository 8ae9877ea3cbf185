"""Errors that know what to tell kubelet and the person who reads ``kubectl describe pod``.

Every failure that leaves the program by gRPC, Event or condition is a :class:`CknixError` of a situation in
:mod:`cknix_csi.api.situations`, which knows its code; ``csi`` translates that, so that no other package needs gRPC.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cknix_csi.api.situations import Code, Situation


class CknixError(Exception):
    """A failure of one of the known :class:`Situation` s, which says its gRPC code and stable reason.

    A class has the situation that its failures usually are; a raise may name a closer one.
    """

    situation: Situation = Situation.INTERNAL_ERROR

    def __init__(self, message: str, situation: Situation | None = None) -> None:
        super().__init__(message)
        self.message = message
        if situation is not None:
            self.situation = situation

    @property
    def code(self) -> Code:
        return self.situation.code

    @property
    def reason(self) -> str:
        """CamelCase, for Events and conditions."""
        return self.situation.reason


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with an input: the field, in the reader's own terms, and what to do about it."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class Invalid(CknixError):
    """An input with one or more problems, all reported at once."""

    situation = Situation.INVALID_INPUT

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in self.problems))


class InProgress(CknixError):
    """Work that goes on after the answer; the caller's retry joins it."""

    situation = Situation.VOLUME_BUSY


class Conflict(CknixError):
    """A different volume, or the same one with other arguments, is already there."""

    situation = Situation.VOLUME_CONFLICT


class NotFound(CknixError):
    """The thing a volume names does not exist."""

    situation = Situation.VOLUME_NOT_FOUND


class EvaluationFailed(CknixError):
    """Nix rejected the expression, or its value is not something that can be mounted."""

    situation = Situation.EVALUATION_FAILED


class BuildFailed(CknixError):
    """A derivation did not build."""

    situation = Situation.BUILD_FAILED


class BuildKilled(CknixError):
    """A builder was ended by SIGKILL, which says nothing about what it was building."""

    situation = Situation.BUILD_KILLED


class DeadlineExceeded(CknixError):
    """An evaluation, build or fetch ran longer than its setting allows and was stopped."""

    situation = Situation.DEADLINE_EXCEEDED


class SourceUnavailable(CknixError):
    """A server that an evaluation needs something from could not be asked."""

    situation = Situation.SOURCE_UNAVAILABLE


class CacheUnavailable(CknixError):
    """No binary cache could be reached for a path that this node does not have."""

    situation = Situation.CACHE_UNAVAILABLE


class OtherCacheUnavailable(CacheUnavailable):
    """The cache of the cluster does not have a path, and another one, which may, could not be asked."""


class PathUntrusted(CknixError):
    """A cache offered a path whose signature or content does not hold."""

    situation = Situation.PATH_UNTRUSTED


class OutOfSpace(CknixError):
    """A file system this driver writes to is full."""

    situation = Situation.OUT_OF_SPACE
    needed: int | None = None
    """Bytes that must be free there, when they are known."""


class MountFailed(CknixError):
    """The kernel refused a mount."""

    situation = Situation.MOUNT_FAILED
