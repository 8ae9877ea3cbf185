"""Volume attributes: what a pod or a PersistentVolume may say about the closure it wants.

The keys are documented constants, the rules are pure, and every problem is reported at once with the attribute's name,
its value and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.api.suggest import nearest
from cknix_csi.api.systems import KNOWN_SYSTEMS

EXPRESSION = "expression"
"""Name of an Expression; the volume is its latest result for the node's system."""
NAMESPACE = "namespace"
"""Namespace of that Expression.  Only for PersistentVolumes; inline volumes always use the pod's own."""
STORE_PATH = "storePath"
"""An exact store path, the same for every system."""
FLAKE_REF = "flakeRef"
"""A flake reference, evaluated by the controller."""
EXPR = "expr"
"""Nix source text, evaluated by the controller."""

SIZE_LIMIT = "sizeLimit"
"""The most that a writable volume may hold, as a Kubernetes quantity; see :mod:`.options`."""
MEDIUM = "medium"
"""Beside it: where that is kept."""
PRESENTATION = "presentation"
"""What the volume is made of; the node chooses where it is not given."""

FALLBACKS: tuple[str, ...] = (STORE_PATH, EXPRESSION, FLAKE_REF, EXPR)
"""Sources in order of priority; a key of the node's own system comes before all of them."""

OPTIONS: tuple[str, ...] = (SIZE_LIMIT, MEDIUM, PRESENTATION)

KNOWN_KEYS: frozenset[str] = frozenset({*FALLBACKS, NAMESPACE, *OPTIONS, *KNOWN_SYSTEMS})

RESERVED_PREFIX = "csi.storage.k8s.io/"
POD_NAME = RESERVED_PREFIX + "pod.name"
POD_NAMESPACE = RESERVED_PREFIX + "pod.namespace"
POD_UID = RESERVED_PREFIX + "pod.uid"
SERVICE_ACCOUNT = RESERVED_PREFIX + "serviceAccount.name"
EPHEMERAL = RESERVED_PREFIX + "ephemeral"
# What external-provisioner adds to the attributes of every volume it makes.
_PROVISIONER_IDENTITY = "storage.kubernetes.io/csiProvisionerIdentity"

# What a CSI driver must be able to take is 4 KiB in all (CSI specification, "Size Limits").  Kubernetes lets a pod have
# a megabyte, and whatever looks at each of them takes time that others wait for.
_MOST_ATTRIBUTES = 64
_LONGEST_KEY = 256
_LONGEST_VALUE = 4096
_LONGEST_TEXT = 128 * 1024
"""Of Nix text."""

# RFC 1123 subdomain and label, as the API server checks object names and namespaces.
_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAMESPACE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_MAX_OBJECT_NAME = 253
_MAX_NAMESPACE_NAME = 63


@dataclass(frozen=True, slots=True)
class PodInfo:
    """The pod a volume is for, as kubelet tells it (CSIDriver ``podInfoOnMount``); empty strings when it did not."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    service_account: str = ""
    ephemeral: bool | None = None

    @classmethod
    def parse(cls, context: Mapping[str, str]) -> PodInfo:
        ephemeral = context.get(EPHEMERAL)
        return cls(
            name=context.get(POD_NAME, ""),
            namespace=context.get(POD_NAMESPACE, ""),
            uid=context.get(POD_UID, ""),
            service_account=context.get(SERVICE_ACCOUNT, ""),
            ephemeral=None if ephemeral is None else ephemeral == "true",
        )


@dataclass(frozen=True, slots=True)
class FromStorePath:
    """The volume is this exact store path."""

    path: StorePath


@dataclass(frozen=True, slots=True)
class FromExpression:
    """The volume is the latest result of this Expression for the node's system."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class FromSource:
    """The volume is what the controller makes of this text (*kind* is ``expr`` or ``flakeRef``)."""

    namespace: str
    kind: str
    text: str


VolumeSource = FromStorePath | FromExpression | FromSource


def user_attributes(context: Mapping[str, str]) -> dict[str, str]:
    """The attributes a person wrote: *context* without what kubelet and the provisioner add."""
    return {
        key: value
        for key, value in context.items()
        if not key.startswith(RESERVED_PREFIX) and key != _PROVISIONER_IDENTITY
    }


def excessive(context: Mapping[str, str]) -> list[Problem]:
    """What is too much in the attributes in *context*: to be asked before anything else looks at them."""
    attributes = user_attributes(context)
    if len(attributes) > _MOST_ATTRIBUTES:
        return [Problem("volume attributes", f"are {len(attributes)}, and at most {_MOST_ATTRIBUTES} can be given")]
    problems = []
    for key, value in sorted(attributes.items()):
        most = _LONGEST_TEXT if key in {EXPR, FLAKE_REF} else _LONGEST_VALUE
        if len(key) > _LONGEST_KEY:
            words = (
                f"have a key of {len(key)} characters, and at most {_LONGEST_KEY} can be given: {_quoted(key[:40])}…"
            )
            problems.append(Problem("volume attributes", words))
        elif len(value) > most:
            problems.append(Problem(named(key), f"has {len(value)} characters, and at most {most} can be given"))
    return problems


def parse_source(context: Mapping[str, str], *, system: str) -> VolumeSource:
    """The closure that the attributes in *context* ask for on a node of *system*.

    Raises :class:`Invalid` with every problem found: unknown keys, malformed values, no source, or several kinds of
    source at once (system keys may stand beside one fallback).
    """
    pod = PodInfo.parse(context)
    attributes = user_attributes(context)
    problems = [_unknown(key) for key in sorted(attributes) if key not in KNOWN_KEYS]
    problems += _empty(attributes)

    paths = _store_paths(attributes, problems)
    chosen = [key for key in FALLBACKS if key in attributes]
    if len(chosen) > 1:
        problems.append(
            Problem(
                named(chosen[1]),
                f"cannot stand beside {_quoted(chosen[0])}; a volume has one source, remove all but one of "
                + ", ".join(_quoted(key) for key in chosen),
            )
        )
    systems = [key for key in attributes if key in KNOWN_SYSTEMS]
    if not chosen and not systems and not problems:
        problems.append(
            Problem(
                "volume attributes",
                f"no source given; set one of {', '.join(_quoted(key) for key in (EXPRESSION, STORE_PATH))} "
                f'or a store path per system, for example {system}: "/nix/store/…"',
            )
        )
    elif not chosen and system not in attributes and not problems:
        problems.append(
            Problem(
                named(system),
                f"missing: this node's system is {system}, but there are store paths only for "
                f'{", ".join(sorted(systems))}; add "{system}", or a fallback such as "{EXPRESSION}"',
            )
        )
    namespace = _namespace(attributes, pod, problems)
    if EXPRESSION in attributes:
        problems += _expression_name(attributes[EXPRESSION])
    if problems:
        raise Invalid(problems)

    if system in paths:
        return FromStorePath(paths[system])
    if STORE_PATH in paths:
        return FromStorePath(paths[STORE_PATH])
    if EXPRESSION in attributes:
        return FromExpression(namespace, attributes[EXPRESSION])
    kind = FLAKE_REF if FLAKE_REF in attributes else EXPR
    return FromSource(namespace, kind, attributes[kind])


def named(key: str) -> str:
    """An attribute as the field of a :class:`Problem`."""
    return f"volume attribute {_quoted(key)}"


def _quoted(key: str) -> str:
    """Between quotes, with what is no letter or sign as Python writes it: terminals obey some of that."""
    return f'"{key if key.isprintable() else repr(key)[1:-1]}"'


def _unknown(key: str) -> Problem:
    guess = nearest(key, KNOWN_KEYS)
    if guess is not None:
        return Problem(named(key), f"is not known; did you mean {_quoted(guess)}?")
    known = ", ".join((*FALLBACKS, NAMESPACE, *OPTIONS, "or a system such as x86_64-linux"))
    return Problem(named(key), f"is not known; known are {known}")


def _empty(attributes: Mapping[str, str]) -> list[Problem]:
    return [
        Problem(named(key), "is empty; give it a value or remove it")
        for key in sorted(attributes)
        if key in KNOWN_KEYS - {MEDIUM} and not attributes[key].strip()  # the default medium is written as nothing
    ]


def _store_paths(attributes: Mapping[str, str], problems: list[Problem]) -> dict[str, StorePath]:
    paths = {}
    for key in (STORE_PATH, *KNOWN_SYSTEMS):
        if attributes.get(key, "").strip():
            try:
                paths[key] = StorePath.parse(attributes[key])
            except InvalidStorePath as error:
                problems.append(Problem(named(key), error.message))
            else:
                if paths[key].is_derivation:
                    problems.append(
                        Problem(named(key), f"{attributes[key]} is a derivation; name its output path instead")
                    )
    return paths


def _namespace(attributes: Mapping[str, str], pod: PodInfo, problems: list[Problem]) -> str:
    wanted = attributes.get(NAMESPACE, "")
    if NAMESPACE in attributes and EXPRESSION not in attributes:
        problems.append(Problem(named(NAMESPACE), f"has a meaning only beside {_quoted(EXPRESSION)}; remove it"))
    if wanted and (len(wanted) > _MAX_NAMESPACE_NAME or not _NAMESPACE_NAME.fullmatch(wanted)):
        problems.append(Problem(named(NAMESPACE), f"{wanted!r} is not the name of a namespace"))
    if wanted and pod.ephemeral and wanted != pod.namespace:
        problems.append(
            Problem(
                named(NAMESPACE),
                f"{wanted!r} is not the pod's namespace {pod.namespace!r}; an inline volume can only use an Expression "
                "of its own namespace",
            )
        )
    namespace = wanted or pod.namespace
    needy = next((key for key in (EXPRESSION, FLAKE_REF, EXPR) if key in attributes), None)
    if not namespace and needy is not None:
        other = f", or set the attribute {_quoted(NAMESPACE)}" if needy == EXPRESSION else ""
        problems.append(
            Problem(
                named(needy),
                "the namespace is not known: kubelet did not name the pod. Apply the CSIDriver object "
                f"(podInfoOnMount: true){other}",
            )
        )
    return namespace


def _expression_name(name: str) -> list[Problem]:
    if name.strip() and (len(name) > _MAX_OBJECT_NAME or not _OBJECT_NAME.fullmatch(name)):
        hint = " (an Expression of another namespace cannot be named)" if "/" in name else ""
        return [
            Problem(
                named(EXPRESSION),
                f"{name!r} is not the name of an Expression: lower-case letters, digits, '-' and '.'{hint}",
            )
        ]
    return []
