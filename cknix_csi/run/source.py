"""From the command line of ``cknix-csi run`` to what is to be evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.expression import KIND, Data, Spec, parse_manifest


def from_file(file: Path) -> tuple[str, Spec]:
    """Name and spec of the one Expression in a YAML *file*; other kinds of objects in it are passed over.

    Raises :class:`Invalid`.
    """
    import yaml  # noqa: PLC0415 - only needed here

    try:
        documents = [document for document in yaml.safe_load_all(file.read_text()) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid([Problem(str(file), f"cannot be read: {error}")]) from None
    except yaml.YAMLError as error:
        raise Invalid([Problem(str(file), f"is not YAML: {error}")]) from None
    expressions = [document for document in documents if isinstance(document, dict) and document.get("kind") == KIND]
    if len(expressions) != 1:
        found = "none" if not expressions else f"{len(expressions)}: {', '.join(map(_name, expressions))}"
        raise Invalid([Problem(str(file), f"must hold one object of kind {KIND}; found {found}")])
    return _name(expressions[0]), parse_manifest(expressions[0])


def from_text(kind: str, text: str) -> Spec:
    """The spec of an Expression with only *text*.  Raises :class:`Invalid`."""
    return Spec.parse({"data": {kind: text}})


def describe(data: Data) -> str:
    """A short name for messages."""
    return data.text if data.kind != "expr" else "the expression"


def _name(document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    return str(metadata.get("name", "unnamed")) if isinstance(metadata, dict) else "unnamed"
