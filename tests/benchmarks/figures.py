"""Percentiles, and how a row of them is printed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median, 95th percentile (nearest rank) and maximum of some seconds."""

    p50: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        ordered = sorted(values)
        rank = math.ceil(0.95 * len(ordered))
        return cls(statistics.median(ordered), ordered[rank - 1], ordered[-1])

    def __str__(self) -> str:
        return f"p50 {self.p50:6.2f} s   p95 {self.p95:6.2f} s   max {self.max:6.2f} s"
