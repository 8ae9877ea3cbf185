"""From the command line of ``cknix-csi run`` to what is to be evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.expression import KIND, Spec, parse_manifest


def from_file(file: Path) -> tuple[str, Spec]:
    """Name and spec of the one Expression in a YAML *file*; other kinds of objects in it are passed over.

    Raises :class:`Invalid`.
    """
    import yaml  # noqa: PLC0415 - only needed here

    try:
        documents = list(yaml.safe_load_all(file.read_text("utf-8")))
    except OSError as error:
        raise Invalid([Problem(str(file), f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise Invalid([Problem(str(file), f"cannot be read: byte {error.start + 1} is not UTF-8")]) from None
    except yaml.YAMLError as error:
        raise Invalid([Problem(str(file), f"is not YAML: {_explained(error)}")]) from None
    expressions = [document for document in documents if isinstance(document, dict) and document.get("kind") == KIND]
    if len(expressions) != 1:
        found = "none" if not expressions else f"{len(expressions)}: {', '.join(map(_name, expressions))}"
        raise Invalid([Problem(str(file), f"must hold one object of kind {KIND}; found {found}")])
    return _name(expressions[0]), parse_manifest(expressions[0])


def from_text(option: str, kind: str, text: str) -> Spec:
    """The spec of an Expression with only *text*, given by a command-line *option*.  Raises :class:`Invalid`."""
    try:
        return Spec.parse({"data": {kind: text}})
    except Invalid as error:
        raise Invalid([Problem(option, problem.message) for problem in error.problems]) from None


def _name(document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    return str(metadata.get("name", "unnamed")) if isinstance(metadata, dict) else "unnamed"


def _explained(error: Exception) -> str:
    """A YAML error on one line, with its place."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
