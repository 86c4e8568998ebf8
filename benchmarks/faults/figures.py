"""A figure: a number that was measured, beside the threshold that it has to keep."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

_COMPARE = {"==": operator.eq, ">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Figure:
    """One number, named after its row in the table of thresholds: ``R1_lost``."""

    name: str
    measured: int | float
    threshold: str = ""
    """``== 0``, ``>= 500`` or ``<= 120``; empty where a number is only counted and promises nothing."""

    @property
    def holds(self) -> bool | None:
        """Whether the threshold is kept; None where there is none."""
        if not self.threshold:
            return None
        comparison, number = self.threshold.split()
        return bool(_COMPARE[comparison](self.measured, float(number)))

    def row(self) -> dict:
        return {"figure": self.name, "measured": self.measured, "threshold": self.threshold, "holds": self.holds}


def slug(words: str) -> str:
    """Words as the end of a figure's name."""
    return "".join(c if c.isalnum() else "_" for c in words.lower()).strip("_")


def at_least(size: float, count: int, least: int = 1) -> int:
    """A count of the full measurement at another size."""
    return max(least, round(count * size))


def broken(figures: Iterable[Figure]) -> list[str]:
    """Names of the figures whose threshold is not kept."""
    return [f.name for f in figures if f.holds is False]
