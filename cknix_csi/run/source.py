"""From the command line of ``cknix-csi run`` to what is to be evaluated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.expression import KIND, Spec, parse_manifest
from cknix_csi.api.suggest import nearest

STANDARD_INPUT = Path("-")


def from_file(file: Path, name: str | None = None) -> tuple[str, Spec]:
    """Name and spec of the one Expression in a YAML *file*, or of the one called *name* (or ``namespace/name``).

    Several documents and lists (``kind: List``) are looked through; other kinds of objects are passed over.  Raises
    :class:`Invalid`.
    """
    import yaml  # noqa: PLC0415 - only needed here

    label = "standard input" if file == STANDARD_INPUT else str(file)
    try:
        content = sys.stdin.buffer.read() if file == STANDARD_INPUT else file.read_bytes()
        documents = list(yaml.safe_load_all(content.decode("utf-8")))
    except OSError as error:
        raise Invalid([Problem(label, f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise Invalid([Problem(label, f"cannot be read: byte {error.start + 1} is not UTF-8")]) from None
    except yaml.YAMLError as error:
        raise Invalid([Problem(label, f"is not YAML: {_explained(error)}")]) from None
    objects = list(_objects(documents))
    chosen = _chosen([found for found in objects if found.get("kind") == KIND], name, label, objects)
    return _name(chosen), parse_manifest(chosen)


def _objects(documents: list[Any]) -> Iterator[dict[str, Any]]:
    """Every object, also of lists as ``kubectl get --output yaml`` prints them."""
    for document in documents:
        if isinstance(document, dict):
            items = document.get("items")
            if str(document.get("kind")).endswith("List") and isinstance(items, list):
                yield from _objects(items)
            else:
                yield document


def _chosen(
    expressions: list[dict[str, Any]], name: str | None, label: str, objects: list[dict[str, Any]]
) -> dict[str, Any]:
    names = ", ".join(map(_name, expressions))
    if not expressions:
        others = ", ".join(sorted({str(found.get("kind", "no kind")) for found in objects}))
        found = f"none, but {others}" if others else "none"
        raise Invalid([Problem(label, f"must hold an object of kind {KIND}; found {found}")])
    if name is None:
        if len(expressions) > 1:
            raise Invalid([Problem(label, f"holds {len(expressions)} Expressions: {names}; choose one with --name")])
        return expressions[0]
    matching = [found for found in expressions if name in {_name(found), _qualified(found)}]
    if len(matching) > 1:
        all_of_them = ", ".join(map(_qualified, matching))
        raise Invalid([Problem("--name", f"{name!r} is the name of {all_of_them} in {label}; name one of these")])
    if not matching:
        meant = nearest(name, map(_name, expressions))
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise Invalid([Problem("--name", f"{name!r} is none of the Expressions in {label}: {names}{hint}")])
    return matching[0]


def from_text(option: str, kind: str, text: str) -> Spec:
    """The spec of an Expression with only *text*, given by a command-line *option*.  Raises :class:`Invalid`."""
    try:
        return Spec.parse({"data": {kind: text}})
    except Invalid as error:
        raise Invalid([Problem(option, problem.message) for problem in error.problems]) from None


def _name(document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    return str(metadata.get("name", "unnamed")) if isinstance(metadata, dict) else "unnamed"


def _qualified(document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    namespace = metadata.get("namespace") if isinstance(metadata, dict) else None
    return f"{namespace or 'default'}/{_name(document)}"


def _explained(error: Exception) -> str:
    """A YAML error on one line, with its place."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
