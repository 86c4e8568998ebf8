"""May this round run? Asked before anything is reserved, and answered by two accountants that must agree.

Enforced is the LARGER epsilon of the accountants given: dp-accounting's PLD and, at a hospital, Opacus' PRV.
Two ceilings hold at once: the study's, over the study's own records, and the hospital's, over all studies in
its ledger and in its other ledgers of the same patients, since those patients pay for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.accounting import Accountant
from fedmedgan.shared.privacy.events import TrainingSteps, check_delta, real
from fedmedgan.shared.privacy.ledger import Ledger

MAX_RELATIVE_GAP, MAX_ABSOLUTE_GAP = 0.02, 0.01
"""Two accountants agree when they differ by at most 2% of the larger, or by 0.01. PRV adds its error bound
(0.01 at the epsilons of practice) and PLD rounds up on its grid by less than 1%."""


@dataclass(frozen=True)
class Decision:
    """What a planned run of steps would cost."""

    allowed: bool
    """after_epsilon <= ceiling, with no tolerance."""
    spent_epsilon: float
    after_epsilon: float
    """Epsilon with the planned steps included: the larger of the accountants."""
    ceiling: float
    per_accountant: Mapping[str, float]
    """Each accountant's epsilon with the planned steps included."""

    @property
    def agree(self) -> bool:
        """Whether the accountants agree on `after_epsilon`."""
        gap = self.after_epsilon - min(self.per_accountant.values(), default=-math.inf)
        return gap <= max(MAX_ABSOLUTE_GAP, MAX_RELATIVE_GAP * self.after_epsilon)


def preview(
    spent: Iterable[TrainingSteps],
    planned: Iterable[TrainingSteps],
    *,
    delta: float,
    ceiling: float,
    accountants: Mapping[str, Accountant],
) -> Decision:
    """Work out what `planned` would cost on top of `spent`. Writes nothing, and refuses by `allowed` alone.

    ========================================  ===================================
    case                                      result
    ========================================  ===================================
    nothing spent, nothing planned            allowed, epsilon 0
    after_epsilon == ceiling                  allowed
    an accountant says NaN                    counted as infinite: not allowed
    no accountant                             infinite: not allowed
    ceiling is NaN or infinite                not allowed
    delta out of range                        the accountants raise PRIVACY_RANGE
    ========================================  ===================================
    """
    spent, planned = list(spent), list(planned)
    before = {name: _or_infinite(epsilon(spent, delta)) for name, epsilon in accountants.items()}
    after = {name: _or_infinite(epsilon([*spent, *planned], delta)) for name, epsilon in accountants.items()}
    after_epsilon = max(after.values(), default=math.inf)
    return Decision(
        allowed=math.isfinite(ceiling) and after_epsilon <= ceiling,
        spent_epsilon=max(before.values(), default=math.inf),
        after_epsilon=after_epsilon,
        ceiling=ceiling,
        per_accountant=after,
    )


class Reservation:
    """A reserved round. Settle it with `charge` or `void`; unsettled, it is spent in full."""

    def __init__(self, ledger: Ledger, seq: int, decision: Decision) -> None:
        self.seq, self.decision = seq, decision
        self._ledger = ledger

    def charge(self, *steps_done: int, noise_source: str, checks: Mapping[str, str], code: str) -> None:
        """Write down the steps really done, one number for each event. Raises LEDGER_STATE, LEDGER_WRITE."""
        self._ledger.charge(self.seq, *steps_done, noise_source=noise_source, checks=checks, code=code)

    def void(self, reason: str) -> None:
        """Take it back: only where no patient's data was touched. Raises LEDGER_STATE, LEDGER_WRITE."""
        self._ledger.void(self.seq, reason)


class Budget:
    """The budget of one study at one hospital.

    Args:
        ledger: open for writing; the study must have been opened in it.
        study: hash of the study.
        delta: of the study, and of both ceilings.
        study_ceiling: epsilon that this study may spend here.
        total_ceiling: epsilon that all studies of the same patients may spend together.
        accountants: name -> accountant; at a hospital `client.training.accountant.ENFORCED`.
        elsewhere: what other ledgers of the hospital spent on the same patients (client/budget_book.py).

    Raises:
        PrivacyError: PRIVACY_RANGE.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        study: str,
        delta: float,
        study_ceiling: float,
        total_ceiling: float,
        accountants: Mapping[str, Accountant],
        elsewhere: Sequence[TrainingSteps] = (),
    ) -> None:
        self.ledger, self.study, self.accountants = ledger, study, accountants
        self.elsewhere = tuple(elsewhere)
        self.delta = check_delta(delta)
        self.study_ceiling = real(study_ceiling, "study_ceiling")
        self.total_ceiling = real(total_ceiling, "total_ceiling")

    def preview(self, *planned: TrainingSteps) -> tuple[Decision, Decision]:
        """What `planned` would cost: (within this study, over all studies of the same patients)."""
        return (
            self._preview(self.ledger.spent(self.study), planned, self.study_ceiling),
            self._preview([*self.ledger.spent(), *self.elsewhere], planned, self.total_ceiling),
        )

    def _preview(self, spent: Iterable[TrainingSteps], planned: Iterable[TrainingSteps], ceiling: float) -> Decision:
        return preview(spent, planned, delta=self.delta, ceiling=ceiling, accountants=self.accountants)

    @contextmanager
    def reserve(self, round: int, *planned: TrainingSteps) -> Iterator[Reservation]:
        """Check both ceilings, write the reservation, and only then let the body of the `with` touch data.

        Whatever happens inside, a reservation that was not settled stays spent in full.

        Raises:
            PrivacyError: BUDGET_EXHAUSTED or PRIVACY_ACCOUNTANTS (nothing was written), LEDGER_*.
        """
        decisions = self.preview(*planned)
        for decision, scope in zip(decisions, ("this study", "all studies of the same patients"), strict=True):
            _refuse(decision, f"round {round}, {scope}")
        yield Reservation(self.ledger, self.ledger.reserve(self.study, round, planned), decisions[0])


def _refuse(decision: Decision, where: str) -> None:
    if not decision.allowed:
        what = f"epsilon would be {decision.after_epsilon:.6g}, the ceiling is {decision.ceiling:.6g}"
        raise PrivacyError("BUDGET_EXHAUSTED", what, where)
    if not decision.agree:
        said = ", ".join(f"{name} {value:.4g}" for name, value in decision.per_accountant.items())
        raise PrivacyError("PRIVACY_ACCOUNTANTS", said, where)


def _or_infinite(epsilon: float) -> float:
    """Python's max() skips a NaN, or not, depending on the order."""
    return epsilon if math.isfinite(epsilon) else math.inf
