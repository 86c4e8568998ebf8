"""What an audit found about one hospital's ledger: one line for each check.

A check is passed only if there was something to look at and all of it was right. With too little evidence it is
"not-run", and the words say what to bring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from fedmedgan.shared.errors import FedMedGanError, PrivacyError

Verdict = Literal["passed", "failed", "not-run"]


@dataclass(frozen=True)
class Finding:
    """One check of one ledger."""

    hospital: str
    check: str
    """seal, chain, signatures, study, anchors, rounds, noise, proof, budget or patients."""
    verdict: Verdict
    code: str
    """Of shared/errors.py, if it failed; otherwise empty."""
    words: str
    where: str = ""
    """Which file or folder the ledger was in, if a hospital has several."""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class NotRun(Exception):
    """There is too little evidence; the text says what to bring."""


def found(hospital: str, name: str, check: Callable[[], str], where: str = "") -> Finding:
    """Run a check: it returns its words, or raises NotRun or an error with a code."""
    try:
        return Finding(hospital, name, "passed", "", check(), where)
    except NotRun as too_little:
        return Finding(hospital, name, "not-run", "", str(too_little), where)
    except FedMedGanError as error:
        words = f"{error.what} ({error.where})" if error.where else error.what
        return Finding(hospital, name, "failed", error.code, words, where)


def refuse(condition: bool, code: str, what: str, where: str = "") -> None:
    """Raise PrivacyError of that code if the condition holds."""
    if condition:
        raise PrivacyError(code, what, where)
