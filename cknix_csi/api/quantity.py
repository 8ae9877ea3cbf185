"""Amounts of bytes as people write them in Kubernetes objects: ``10Gi``, ``500M``, ``1.5Gi``, ``1e9``.

The grammar and the meaning are those of ``resource.Quantity`` (k8s.io/apimachinery, pkg/api/resource/quantity.go),
rounded up to whole bytes as its ``Value`` does; 2⁶³ and more count as 2⁶³-1.  Three things that it takes are refused,
since nobody means them: negative amounts, nothing at all (zero), and the suffixes of thousandths and less (``500m`` is
half a byte).
"""

from __future__ import annotations

import re
from fractions import Fraction

MAXIMUM = 2**63 - 1
"""What any larger amount counts as."""

_QUANTITY = re.compile(
    r"(?P<sign>[+-]?)(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?P<suffix>[numkMGTPE]|[KMGTPE]i|[eE](?P<exponent>[+-]?[0-9]+))?",
    re.ASCII,
)
_MULTIPLES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_LONGEST = 64
_BIGGEST_EXPONENT = 100
"""Beyond it, no number of _LONGEST characters gives anything but one byte or MAXIMUM."""


def parse_quantity(text: str) -> int:
    """The bytes that *text* stands for, 1 or more.  Raises ValueError, which says what may be written instead."""
    match = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise ValueError(
            f"{text[:_LONGEST]!r} is not an amount of bytes; write for example 10Gi, 500Mi, 1.5G or 1e9{_hint(text)}"
        )
    suffix = match["suffix"] or ""
    if suffix in {"n", "u", "m"}:
        number = match["number"]
        raise ValueError(
            f"{text!r} is a fraction of a byte; for megabytes write {number}M, or {number}Mi for mebibytes"
        )
    amount = Fraction(match["number"].removesuffix(".")) * _factor(suffix, match["exponent"])
    if match["sign"] == "-" or not amount:
        raise ValueError(f"{text!r} is no amount that anything fits into; write for example 10Gi")
    return min(-(-amount.numerator // amount.denominator), MAXIMUM)


def format_quantity(amount: int) -> str:
    """*amount* bytes, exactly, in the largest binary unit that divides it: ``10Gi``, ``1025``."""
    for suffix, factor in reversed(_BINARY.items()):
        if amount and amount % factor == 0:
            return f"{amount // factor}{suffix}"
    return str(amount)


def readable_size(amount: int) -> str:
    """*amount* bytes for people, rounded: ``3.4 GiB``, ``17 B``."""
    value, unit = float(amount), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{amount} B" if unit == "B" else f"{value:.1f} {unit}"


def _factor(suffix: str, exponent: str | None) -> Fraction:
    if exponent is not None:
        return Fraction(10) ** max(-_BIGGEST_EXPONENT, min(int(exponent), _BIGGEST_EXPONENT))
    return Fraction(_MULTIPLES.get(suffix) or _BINARY.get(suffix) or 1)


def _hint(text: str) -> str:
    """The likeliest slip: a unit as people write it elsewhere, such as 10GB, 10 GiB or 10K."""
    if len(text) > _LONGEST:
        return ""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtTpPeE])(i?)[bB]?\s*", text, re.ASCII)
    if match is None:
        return ""
    number, letter, binary = match.groups()
    unit = f"{letter.upper()}i" if binary else letter.upper().replace("K", "k")
    return f"; did you mean {number}{unit}?"
