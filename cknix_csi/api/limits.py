"""How much a writable volume may hold, and what a node's administrator has to say to that."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cknix_csi.api.attributes import SIZE_LIMIT, named
from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.quantity import format_quantity

MINIMUM_BYTES = 1 << 20
MAXIMUM_BYTES = 1 << 40
"""ext4 with 32-bit block numbers ends at 16 TiB, as does a file on ext4."""
BLOCK_SIZE = 4096
"""Limits are made in whole blocks of so many bytes."""


class Medium(enum.Enum):
    """Where what is written lives; the values are what users write."""

    DISK = "Disk"
    MEMORY = "Memory"
    """Counted against the memory limit of the container that writes it."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How much may be written.  Raises ValueError for what is too small or too large to be made."""

    bytes: int
    """Rounded down to whole blocks when it is made."""
    medium: Medium = Medium.DISK

    def __post_init__(self) -> None:
        if not MINIMUM_BYTES <= self.bytes <= MAXIMUM_BYTES:
            size = "small" if self.bytes < MINIMUM_BYTES else "large"
            lowest, highest = format_quantity(MINIMUM_BYTES), format_quantity(MAXIMUM_BYTES)
            raise ValueError(f"{format_quantity(self.bytes)} is too {size}; the limit is from {lowest} to {highest}")

    def whole(self) -> Limit:
        """What is made of it: whole blocks."""
        return Limit(self.bytes - self.bytes % BLOCK_SIZE, self.medium)

    def __str__(self) -> str:
        return f"{format_quantity(self.bytes)} {'in memory' if self.medium is Medium.MEMORY else 'on disk'}"


@dataclass(frozen=True, slots=True)
class SizePolicy:
    """What a node gives its writable volumes; bytes, None for no rule."""

    default: int | None = None
    """For those that ask for no limit, on disk; without it they get the maximum, if there is one."""
    maximum: int | None = None

    def limit(self, asked: Limit | None) -> Limit | None:
        """What a writable volume gets that asks for *asked*; None: as much as the node's disk has.

        Raises :class:`Invalid` for more than the maximum.
        """
        if asked is None:
            given = self.maximum if self.default is None else self.default
            return None if given is None else Limit(given)
        if self.maximum is not None and asked.bytes > self.maximum:
            wanted, most = format_quantity(asked.bytes), format_quantity(self.maximum)
            rule = f"is more than the {most} that this node gives a volume (CKNIX_SIZE_LIMIT_MAX); ask for no more"
            raise Invalid([Problem(named(SIZE_LIMIT), f"{wanted} {rule}")])
        return asked


ANY_SIZE = SizePolicy()
"""No rule at all."""
