"""The ways in which a closure can become a directory."""

from __future__ import annotations

import enum


class Presentation(enum.Enum):
    """What a volume is made of; the values are what users write."""

    REDIRECT = "redirect"
    """An overlay that follows one redirect per store path into the store: constant cost, nothing is written."""
    HARDLINK = "hardlink"
    """A farm of hard links to the store's files, one per closure: no overlay is needed to read it."""
    COPY = "copy"
    """A private copy of every file, by reflink where the file system can: the volume's own, and paid for by it."""
