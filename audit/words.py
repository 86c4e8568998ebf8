"""Numbers and verdicts in words, the same in tables and on the page. A promise is never rounded down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

QUESTIONS = {
    "chain": "Is the ledger whole, and in order?",
    "signatures": "Did the hospital sign every record?",
    "seal": "Did the hospital sign this bundle?",
    "study": "Did all hospitals sign this study?",
    "anchors": "Is it the ledger that others have seen?",
    "rounds": "Was every update that left paid for?",
    "noise": "Is the noise the one that was agreed?",
    "proof": "Was the noise there in every step?",
    "budget": "Did epsilon stay below its ceilings?",
    "patients": "Is it their patients' only ledger?",
    "one-run": "Attack: planted images, one run",
    "many-run": "Attack: many small runs",
    "generator": "Attack: images that are repeated",
}
"""check or attack -> what a reader wants to know"""

VERDICTS = {"passed": "passed", "failed": "FAILED", "not-run": "not run", "too-few": "too few"}


def certainty(epsilon: float) -> float:
    """e^epsilon / (1 + e^epsilon): how sure somebody who starts at 50 : 50 can become, delta apart."""
    return 1 / (1 + math.exp(-epsilon))


def rounded_up(value: float | None) -> str:
    """Two decimals, never less than the value; the dash where there is none."""
    return "–" if value is None else f"{math.ceil(round(value * 100, 9)) / 100:.2f}"


def nearest(value: float | None) -> str:
    """Two decimals, three below 0.1: for what an attack found, as its own sentence says it."""
    return "–" if value is None else f"{value:.{3 if 0 < value < 0.1 else 2}f}"


def at_most(share: float) -> str:
    """A percentage that is never rounded down, and never up to 100 %."""
    digits = 1 if share <= 0.99 else 2
    percent = math.ceil(round(100 * share * 10**digits, 6)) / 10**digits
    return f"{percent:.{digits}f}\u00a0%" if percent < 100 else "over 99.99\u00a0%"


def plain(value: float) -> str:
    """``1e-4`` rather than ``0.0001``."""
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def count(value: int) -> str:
    """Thousands set apart by a narrow space."""
    return f"{value:,}".replace(",", "\u202f")


def when(time: str) -> str:
    """A ledger's time for people: ``2031-02-03 10:11``, UTC."""
    return time[:16].replace("T", " ")


def bar(value: float, ceiling: float, width: int = 20) -> str:
    """What was used of a ceiling, as text."""
    share = value / ceiling if ceiling > 0 else 1.0
    full = min(width, math.ceil(width * share)) if value > 0 else 0
    return "█" * full + "░" * (width - full)


def plural(number: int, noun: str, several: str = "") -> str:
    """``1 round``, ``2 rounds``."""
    return f"{count(number)} {noun if number == 1 else several or noun + 's'}"


def meaning(finding: Mapping[str, Any]) -> list[str]:
    """What one finding of an attack means, for somebody who signs for patients and not for statistics.

    Args:
        finding: fields of `results.Shown`.
    """
    quantity, confidence = finding["quantity"], f"{100 * finding['confidence']:g} %"
    shown, ceiling, allowed = (nearest(finding[name]) for name in ("lower_bound", "ceiling", "allowed"))
    lines = [
        f"shown     {quantity} is at least {shown}, with {confidence} confidence",
        f"allowed   {allowed}",
        f"ceiling   {ceiling}: what an attack would have shown that is right every single time",
    ]
    if finding["verdict"] == "failed":
        chance = 100 - 100 * finding["confidence"]
        said = f"The promise is broken. An honest run looks like this at most {chance:.2g} % of the time."
    elif finding["verdict"] == "too-few":
        said = "This says too little: with so few numbers a fault could well have been missed."
    else:
        said = (
            "No fault was found, and one could have been. It is no proof: an attack refutes a promise or says nothing."
        )
    return [*lines, f"means     {said}"]
