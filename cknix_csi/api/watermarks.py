"""How much of a disk is to be kept free: below the low mark garbage is collected, until the high mark is reached."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cknix_csi.api.quantity import format_quantity, parse_quantity

LOW = "CKNIX_GC_LOW"
HIGH = "CKNIX_GC_HIGH"


@dataclass(frozen=True, slots=True)
class Watermark:
    """A share of the disk or a number of bytes; exactly one of the two is given."""

    percent: float | None = None
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Watermark:
        """Read ``10%``, an amount of bytes such as ``5Gi``, or ``0``.

        Raises ValueError with what is wrong, as the end of a sentence that begins with *text*.
        """
        if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", text):
            percent = float(match[1])
            if percent >= 100:
                raise ValueError("must be less than 100%")
            return cls(percent=percent)
        try:
            return cls(size=0 if text == "0" else parse_quantity(text))
        except ValueError:
            raise ValueError("is neither a share of the disk, such as 10%, nor a size, such as 5Gi") from None

    def of(self, total: int) -> int:
        """In bytes, on a disk of *total* bytes."""
        if self.size is not None:
            return min(self.size, total)
        assert self.percent is not None
        return int(total * self.percent / 100)

    def __str__(self) -> str:
        return f"{self.percent:g}%" if self.size is None else format_quantity(self.size)


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Collection begins below *low* and ends at *high* free space; a *low* of 0 switches it off.

    By default it begins when kubelet begins to delete images (85 % used), and before kubelet evicts pods (90 %).
    Raises ValueError when *low* is not less than *high*; a share and a size can only be compared on a disk, and there
    the higher one of the two counts as *high*.
    """

    low: Watermark = Watermark(percent=15.0)
    high: Watermark = Watermark(percent=20.0)

    def __post_init__(self) -> None:
        if self.low == Watermark(size=0):
            return
        pairs = ((self.low.percent, self.high.percent), (self.low.size, self.high.size))
        if any(low is not None and high is not None and low >= high for low, high in pairs):
            raise ValueError(f"{LOW} ({self.low}) must be less than {HIGH} ({self.high})")
