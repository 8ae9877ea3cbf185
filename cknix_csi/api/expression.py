"""The Expression resource as values: names, spec and its rules, and what of its status other parts rely on.

The rules here are those of the CRD in ``yaml/`` (schema and CEL); a test holds the two against each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cknix_csi.api import conditions, durations
from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.api.suggest import nearest
from cknix_csi.api.systems import KNOWN_SYSTEMS

GROUP = "cknix.cool"
VERSION = "v1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "Expression"
PLURAL = "expressions"

INLINE_LABEL = f"{GROUP}/inline"
FINALIZER = f"{GROUP}/gc-roots"

SOURCES = ("expr", "flakeRef", "storePath")
MAX_EXPR = 131_072
MAX_FLAKE_REF = 2048
MAX_SYSTEMS = len(KNOWN_SYSTEMS)
DEFAULT_HISTORY_LIMIT = 3
MAX_HISTORY_LIMIT = 64
MIN_REFRESH_SECONDS = 60
MAX_REFRESH_SECONDS = 365 * 86_400
MAX_REFRESH_LENGTH = 32

# Written so that Go's regular expressions (the CRD) and Python's mean the same: no \s, no \S, ASCII ranges only.
EXPR_PATTERN = r"[^\x00]*[^\x00\t\n\f\r ][^\x00]*"
FLAKE_REF_PATTERN = r"[^\x00-\x20\x7f-][^\x00-\x20\x7f]*"
"""Both as in the CRD's schema (there anchored with ^ and $)."""

# Condition types.
EVALUATED = "Evaluated"
BUILT = "Built"
PUBLISHED = "Published"
READY = "Ready"

# Phases: a summary for people, derived from the conditions.
PENDING = "Pending"
RUNNING = "Running"
SUCCEEDED = "Succeeded"
FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class Data:
    """What to evaluate: *kind* is one of ``expr``, ``flakeRef`` and ``storePath``."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Spec:
    data: Data
    systems: tuple[str, ...] = ()
    """Empty: the systems of the cluster's nodes."""
    history_limit: int = DEFAULT_HISTORY_LIMIT
    refresh: int | None = None
    """Seconds between evaluations of mutable references; None: only when the spec changes."""

    @classmethod
    def parse(cls, spec: Mapping[str, Any]) -> Spec:
        """Read ``.spec``.  Raises :class:`Invalid` with every problem, fields named as in YAML."""
        problems: list[Problem] = []
        _refuse_unknown(spec, ("data", "systems", "historyLimit", "refresh"), "spec", problems)
        data = _parse_data(spec.get("data"), problems)
        systems = _parse_systems(spec.get("systems"), problems)
        history_limit = _parse_history_limit(spec.get("historyLimit"), problems)
        refresh = _parse_refresh(spec.get("refresh"), problems)
        if problems or data is None:
            raise Invalid(problems)
        return cls(data, systems, history_limit, refresh)


def parse_manifest(manifest: Any) -> Spec:
    """The spec of a whole Expression object, as in a YAML file.  Raises :class:`Invalid`."""
    if not isinstance(manifest, Mapping):
        raise Invalid([Problem("document", "is not a Kubernetes object")])
    problems: list[Problem] = []
    _refuse_unknown(manifest, ("apiVersion", "kind", "metadata", "spec", "status"), "", problems)
    for field, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if manifest.get(field) != expected:
            problems.append(Problem(field, f"is {manifest.get(field)!r}, expected {expected!r}"))
    spec = manifest.get("spec")
    parsed = None
    if not isinstance(spec, Mapping):
        problems.append(Problem("spec", "is missing" if spec is None else "must be an object"))
    else:
        try:
            parsed = Spec.parse(spec)
        except Invalid as error:
            problems += error.problems
    if problems or parsed is None:
        raise Invalid(problems)
    return parsed


def _refuse_unknown(found: Mapping[Any, Any], known: tuple[str, ...], field: str, problems: list[Problem]) -> None:
    for key in found:
        if key not in known:
            meant = nearest(str(key), known)
            remedy = f'did you mean "{meant}"?' if meant else f"known are {', '.join(known)}"
            problems.append(Problem(f"{field}.{key}".lstrip("."), f"is not a known field; {remedy}"))


def _parse_data(data: Any, problems: list[Problem]) -> Data | None:
    if not isinstance(data, Mapping):
        problems.append(Problem("spec.data", f"is required: an object with exactly one of {', '.join(SOURCES)}"))
        return None
    _refuse_unknown(data, SOURCES, "spec.data", problems)
    # The API server drops a field that is null, so null means absent here as well.
    given = [kind for kind in SOURCES if data.get(kind) is not None]
    if len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none"
        problems.append(Problem("spec.data", f"needs exactly one of {', '.join(SOURCES)}; {found}"))
        return None
    kind = given[0]
    text = data[kind]
    field = f"spec.data.{kind}"
    if not isinstance(text, str) or not re.fullmatch(EXPR_PATTERN, text):
        problems.append(Problem(field, "must be text that is not blank and holds no NUL"))
        return None
    limit = {"expr": MAX_EXPR, "flakeRef": MAX_FLAKE_REF}.get(kind)
    if limit is not None and len(text) > limit:
        problems.append(Problem(field, f"is {len(text)} characters long, the limit is {limit}"))
    if kind == "flakeRef" and not re.fullmatch(FLAKE_REF_PATTERN, text):
        refused = "it may not hold spaces or control characters, nor begin with '-'"
        problems.append(Problem(field, f"{text!r} is not a flake reference: {refused}"))
    if kind == "storePath":
        try:
            path = StorePath.parse(text)
        except InvalidStorePath as error:
            problems.append(Problem(field, error.message))
        else:
            if path.is_derivation:
                problems.append(Problem(field, f"{text} is a derivation; name its output path instead"))
    return Data(kind, text)


def _parse_systems(systems: Any, problems: list[Problem]) -> tuple[str, ...]:
    if systems is None:
        return ()
    if not isinstance(systems, list) or not all(isinstance(system, str) for system in systems):
        problems.append(Problem("spec.systems", "must be a list of system names"))
        return ()
    for index, system in enumerate(systems):
        if system not in KNOWN_SYSTEMS:
            problems.append(
                Problem(f"spec.systems[{index}]", f"{system!r} is not known; known are {', '.join(KNOWN_SYSTEMS)}")
            )
    if len(set(systems)) != len(systems):
        problems.append(Problem("spec.systems", "names a system twice"))
    return tuple(systems)


def _parse_history_limit(limit: Any, problems: list[Problem]) -> int:
    if limit is None:
        return DEFAULT_HISTORY_LIMIT
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_HISTORY_LIMIT:
        problems.append(Problem("spec.historyLimit", f"is {limit!r}; it must be 1 to {MAX_HISTORY_LIMIT}"))
        return DEFAULT_HISTORY_LIMIT
    return limit


def _parse_refresh(refresh: Any, problems: list[Problem]) -> int | None:
    if refresh is None:
        return None
    seconds = -1
    if isinstance(refresh, str) and len(refresh) <= MAX_REFRESH_LENGTH:
        with suppress(ValueError):
            seconds = durations.parse_duration(refresh)
    if seconds < 0:
        problems.append(Problem("spec.refresh", f"{refresh!r} is not a duration; write for example 15m, 1h or 1h30m"))
        return None
    if seconds < MIN_REFRESH_SECONDS:
        problems.append(Problem("spec.refresh", f"is {refresh}; the shortest is {MIN_REFRESH_SECONDS}s"))
    if seconds > MAX_REFRESH_SECONDS:
        problems.append(Problem("spec.refresh", f"is {refresh}; the longest is {MAX_REFRESH_SECONDS // 86_400}d"))
    return seconds


@dataclass(frozen=True, slots=True)
class Observed:
    """What a consumer needs to know of an Expression: its latest good results and how the newest build goes."""

    namespace: str
    name: str
    uid: str
    generation: int
    observed_generation: int
    phase: str
    message: str
    results: Mapping[str, StorePath]
    """Latest good store path by system."""
    ready: bool

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Observed:
        """Read an Expression object; fields that are missing or malformed count as absent."""
        metadata = _mapping(body.get("metadata"))
        status = _mapping(body.get("status"))
        results = {}
        for entry in _mappings(status.get("results")):
            with suppress(KeyError, InvalidStorePath):
                results[str(entry["system"])] = StorePath.parse(str(entry["path"]))
        return cls(
            namespace=str(metadata.get("namespace") or ""),
            name=str(metadata.get("name") or ""),
            uid=str(metadata.get("uid") or ""),
            generation=_count(metadata.get("generation")),
            observed_generation=_count(status.get("observedGeneration")),
            phase=str(status.get("phase") or PENDING),
            message=str(status.get("message") or ""),
            results=results,
            ready=conditions.is_true(_mappings(status.get("conditions")), READY),
        )

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
