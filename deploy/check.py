"""What a check of `site doctor` looks at, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Literal

from fedmedgan.client.budget_book import BudgetBook
from fedmedgan.client.policy import Policy
from fedmedgan.deploy.site_config import SiteConfig
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import FedMedGanError
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.history import read as read_ledger


class Skip(Exception):
    """The check does not apply here; its text says why."""


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    ok: Literal["ok", "failed", "skipped"]
    what: str
    """One clause."""
    hint: str = ""
    """What to do; for a check that is well, a warning."""
    code: str = ""
    """Key of `errors.HINTS`, "" unless failed."""


@dataclass(frozen=True)
class Place:
    """What is examined."""

    home: Path
    kit: Path

    def config(self) -> SiteConfig:
        return SiteConfig.load(self.kit)

    def policy(self) -> Policy:
        return Policy.load(self.home / "policy.toml")

    def agreement(self) -> Agreement:
        if not (self.home / "study.json").exists():
            raise Skip("no study was agreed yet")
        return Agreement.load(self.home / "study.json")

    def book(self) -> BudgetBook:
        return BudgetBook.open(self.home / self.policy().budget_book)

    def history(self) -> History:
        """The verified ledger; an empty one where none was begun."""
        path = self.home / "ledger.jsonl"
        return read_ledger(path) if path.exists() else History()


def check(name: str) -> Callable[[Callable[[Place], str | tuple[str, str]]], Callable[[Place], Check]]:
    """A function that returns (what, warning), or raises, as one that returns a `Check`."""

    def decorate(look: Callable[[Place], str | tuple[str, str]]) -> Callable[[Place], Check]:
        @wraps(look)
        def made(place: Place) -> Check:
            try:
                found = look(place)
            except Skip as skip:
                return Check(name, "skipped", str(skip))
            except FedMedGanError as error:
                what = "; ".join(part for part in (error.what, error.where) if part)
                return Check(name, "failed", what, error.hint, error.code)
            except Exception as error:  # a doctor that falls over helps nobody; the text may hold patient data
                what, hint = f"the check itself failed ({type(error).__name__})", "report this as a bug"
                return Check(name, "failed", what, hint, "RUN_CRASHED")
            what, warning = found if isinstance(found, tuple) else (found, "")
            return Check(name, "ok", what, warning)

        return made

    return decorate
