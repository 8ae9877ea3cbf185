"""The word that was meant, for messages about one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of *known* that *word* is most probably meant to be; None when it is like none of them."""
    words = sorted(known)
    by_lower = {other.lower(): other for other in words}
    close = difflib.get_close_matches(word, words, n=1)
    return by_lower.get(word.lower()) or (close[0] if close else None)
