"""Claims: what a StorageClass and a PersistentVolumeClaim say together becomes the attributes of the claim's volume.

The parameters of a class are volume attributes, with the same rules.  A claim may choose its Expression itself, by an
annotation, which comes before every source that the class names; what else the class says stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cknix_csi.api.attributes import (
    EPHEMERAL,
    EXPR,
    EXPRESSION,
    FLAKE_REF,
    NAMESPACE,
    OPTIONS,
    POD_NAMESPACE,
    RESERVED_PREFIX,
    SIZE_LIMIT,
    STORE_PATH,
    excessive,
    named,
    parse_source,
    user_attributes,
)
from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.expression import GROUP
from cknix_csi.api.options import parse_options
from cknix_csi.api.quantity import format_quantity
from cknix_csi.api.suggest import nearest
from cknix_csi.api.systems import KNOWN_SYSTEMS

EXPRESSION_ANNOTATION = f"{GROUP}/{EXPRESSION}"
"""On a claim: name of the Expression, in the claim's own namespace."""
OF_CLAIM = "claim"
"""As ``sizeLimit`` of a class: what each claim asks for."""

PARAMETERS: frozenset[str] = frozenset({EXPRESSION, STORE_PATH, *OPTIONS, *KNOWN_SYSTEMS})
"""What a class may say."""

_SOURCES: frozenset[str] = frozenset({EXPRESSION, STORE_PATH, *KNOWN_SYSTEMS})
_ELSEWHERE = {
    NAMESPACE: "has no meaning in a class: a claim's Expression is one of its own namespace; remove it",
    EXPR: f'is Nix text, which a class cannot hold; apply an Expression and name it with "{EXPRESSION}"',
    FLAKE_REF: f'is a flake, which a class cannot name; apply an Expression and name it with "{EXPRESSION}"',
}
# Added by external-provisioner with --extra-create-metadata.
_CLAIM_NAME = RESERVED_PREFIX + "pvc/name"
_CLAIM_NAMESPACE = RESERVED_PREFIX + "pvc/namespace"


@dataclass(frozen=True, slots=True)
class Claim:
    """The PersistentVolumeClaim a volume is made for."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> Claim | None:
        """The claim that *parameters* of CreateVolume name; None when the provisioner does not tell."""
        namespace, name = parameters.get(_CLAIM_NAMESPACE, ""), parameters.get(_CLAIM_NAME, "")
        return cls(namespace, name) if namespace and name else None

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def volume_attributes(
    parameters: Mapping[str, str], annotations: Mapping[str, str], *, requested: int
) -> dict[str, str]:
    """The attributes of the volume of a claim with *annotations* that asks for *requested* bytes (0: it does not say).

    *parameters* are the class's, with or without what the provisioner adds.  Raises :class:`Invalid` with every
    problem: whatever a node would refuse, unknown parameters, and unknown annotations of ours.
    """
    if too_much := excessive(parameters):
        raise Invalid([_renamed(problem, annotated=False) for problem in too_much])
    given = user_attributes(parameters)
    problems = [_unknown(key) for key in sorted(given.keys() - PARAMETERS)]
    problems += [
        _unknown_annotation(key)
        for key in sorted(annotations)
        if key.startswith(f"{GROUP}/") and key != EXPRESSION_ANNOTATION
    ]
    attributes = {key: value for key, value in given.items() if key in PARAMETERS}
    chosen = annotations.get(EXPRESSION_ANNOTATION)
    if chosen is not None:
        attributes = {key: value for key, value in attributes.items() if key not in _SOURCES} | {EXPRESSION: chosen}
    if attributes.get(SIZE_LIMIT) == OF_CLAIM:
        if requested:
            attributes[SIZE_LIMIT] = format_quantity(requested)
        else:
            del attributes[SIZE_LIMIT]
            problems.append(Problem(_parameter(SIZE_LIMIT), f'is "{OF_CLAIM}", and the claim asks for no size'))
    problems += [_renamed(problem, annotated=chosen is not None) for problem in _problems_of(attributes)]
    if problems:
        raise Invalid(problems)
    return attributes


def _problems_of(attributes: Mapping[str, str]) -> list[Problem]:
    """What a node would say to *attributes*, whichever system it is of."""
    problems: list[Problem] = []
    system = next((system for system in KNOWN_SYSTEMS if system in attributes), KNOWN_SYSTEMS[0])
    # Which pods come, and that each is in the claim's namespace, kubelet tells.
    context = {**attributes, EPHEMERAL: "false", POD_NAMESPACE: "default"}
    if not _SOURCES.intersection(attributes):
        remedy = f'"{EXPRESSION}", or the annotation "{EXPRESSION_ANNOTATION}" on the claim'
        problems.append(Problem("StorageClass parameters", f"no source given; set {remedy}"))
    else:
        try:
            parse_source(context, system=system)
        except Invalid as error:
            problems += error.problems
    try:
        parse_options(context, writable=True)
    except Invalid as error:
        problems += error.problems
    return problems


def _renamed(problem: Problem, *, annotated: bool) -> Problem:
    """*problem* with its field as people find it."""
    if annotated and problem.field == named(EXPRESSION):
        return Problem(f'annotation "{EXPRESSION_ANNOTATION}"', problem.message)
    return Problem(problem.field.replace("volume attribute", "StorageClass parameter", 1), problem.message)


def _parameter(key: str) -> str:
    return f'StorageClass parameter "{key}"'


def _unknown(key: str) -> Problem:
    if key in _ELSEWHERE:
        return Problem(_parameter(key), _ELSEWHERE[key])
    guess = nearest(key, PARAMETERS)
    known = ", ".join((EXPRESSION, STORE_PATH, *OPTIONS, "or a system such as x86_64-linux"))
    return Problem(_parameter(key), "is not known; " + (f'did you mean "{guess}"?' if guess else f"known are {known}"))


def _unknown_annotation(key: str) -> Problem:
    return Problem(f'annotation "{key}"', f'is not known on a claim; did you mean "{EXPRESSION_ANNOTATION}"?')
