"""What is left of a hospital's budget, and what the next round would cost: before it is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedmedgan.client import checkpoint
from fedmedgan.client.budget_book import BudgetBook
from fedmedgan.client.joining import LEFT, NOISE, SIGN_AGAIN
from fedmedgan.client.policy import Policy
from fedmedgan.client.training.accountant import ENFORCED
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import PrivacyError, StudyError
from fedmedgan.shared.privacy.accounting import epsilon_replace_one
from fedmedgan.shared.privacy.budget import Decision, preview
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.history import read as read_ledger


@dataclass(frozen=True)
class Outlook:
    """A hospital's budget for the study that it is in."""

    hospital: str
    study: str
    """Its name."""
    delta: float
    rounds: int
    next_round: int | None
    """None where every round of the study is trained and paid, or the study is over here."""
    proof_failed: bool
    """A test of the latest round failed: nothing is trained until the study is signed again."""
    in_study: Decision
    in_all: Decision
    """Over all studies of the same patients, in every ledger of the budget book."""
    replace_one: float
    """Epsilon of what the study spent, where one patient is replaced by another."""
    other_ledgers: int
    """Ledgers of the same patients in other homes."""

    @property
    def fits(self) -> bool:
        """Whether the next round would be granted."""
        granted = all(decision.allowed and decision.agree for decision in (self.in_study, self.in_all))
        return granted and not self.proof_failed


def outlook(home: Path) -> Outlook:
    """Ask both accountants. Reads the ledger and writes nothing.

    Raises:
        StudyError: CONFIG_NOT_FOUND, no study was signed here. PrivacyError: LEDGER_*, also of the book;
            PRIVACY_NONE, the study promises nothing: an epsilon of 0 would say that it promised everything.
    """
    policy, agreement = Policy.load(home / "policy.toml"), Agreement.load(home / "study.json")
    study, path = agreement.study, home / "ledger.jsonl"
    if not study.is_private:
        what, hint = "the study promises no privacy, so there is no epsilon to count", "it is for public images alone"
        raise PrivacyError("PRIVACY_NONE", what, study.name, hint=hint)
    book = BudgetBook.open(home / policy.budget_book)
    history = read_ledger(path) if path.exists() else History()
    trained = max(_round_of(home / "model.safetensors"), _round_of(home / "update.safetensors"))
    t, rate = study.training, study.sampling_rate(study.site(policy.site))
    ended = history.is_closed(study.hash) or (home / LEFT).exists()
    planned = [TrainingSteps(_noise(home), rate, study.steps_per_round)] if trained < t.rounds and not ended else []
    elsewhere, ceiling = list[TrainingSteps](), policy.max_epsilon
    if history.studies:
        book.check(history, path)
        elsewhere, ceiling = book.spent_elsewhere(history.ledger_id), book.ceiling(history, policy.max_epsilon)

    def decide(spent: list[TrainingSteps], ceiling: float) -> Decision:
        return preview(spent, planned, delta=study.privacy.delta, ceiling=ceiling, accountants=ENFORCED)

    return Outlook(
        hospital=policy.site,
        study=study.name,
        delta=study.privacy.delta,
        rounds=t.rounds,
        next_round=trained + 1 if planned else None,
        proof_failed=history.proof_failed(study.hash),
        in_study=decide(history.spent(study.hash), study.privacy.epsilon),
        in_all=decide([*history.spent(), *elsewhere], ceiling),
        replace_one=epsilon_replace_one(history.spent(study.hash), study.privacy.delta),
        other_ledgers=len(book.beside(history.ledger_id)) if history.studies else 0,
    )


def _round_of(path: Path) -> int:
    """Round of a model, or of an update that was trained ahead of its sum: both are paid for."""
    return int(checkpoint.read(path)[1].get("round", 0)) if path.exists() else 0


def _noise(home: Path) -> float:
    """Sigma, which was calibrated when the hospital joined."""
    try:
        return float(json.loads((home / NOISE).read_text(encoding="utf-8"))["noise_multiplier"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StudyError("CONFIG_NOT_FOUND", "the study's noise is not here", NOISE, hint=SIGN_AGAIN) from None
