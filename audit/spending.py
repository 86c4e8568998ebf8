"""What each round of a ledger did and cost, as rows for tables and charts.

Epsilon after a round is worked out by Google's PLD accountant, add or remove one patient. The larger of two accountants
is what was enforced (audit/recompute.py); the two differ by less than 2 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fedmedgan.shared.privacy.accounting import epsilon_pld
from fedmedgan.shared.privacy.events import TrainingSteps, merge
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.records import CHECKS, Record, events_of, not_run

T = TypeVar("T")

MOST_EPSILONS = 40
"""An epsilon takes a tenth of a second. Of a longer study it is worked out after this many rounds, evenly spaced."""

STATES = {
    "charged": "",
    "voided": "taken back: no patient's data was touched",
    "unsettled": "never settled, as after a crash: counted in full",
}
"""state -> note"""


@dataclass(frozen=True)
class Spend:
    """One reservation of a ledger, with what became of it."""

    study: str
    round: int
    seq: int
    """Number of the record that reserved it."""
    time: str
    state: str
    """A key of `STATES`."""
    noise_multiplier: float
    sampling_rate: float
    steps: int
    """What counts as done: 0 when it was taken back, all that was reserved when it was never settled."""
    noise_source: str
    """Empty unless charged."""
    checks: Mapping[str, str]
    """check -> verdict; "not-run" unless charged."""
    reason: str
    """Why it was taken back; empty otherwise."""
    epsilon: float | None = None
    """Of its study, after this round; None where it was not worked out."""
    epsilon_all: float | None = None
    """Of all studies in the ledger, after this round."""

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the round's tests that failed."""
        return tuple(name for name in CHECKS if self.checks[name] == "failed")

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "checks": dict(self.checks)}


def spending(history: History, most_epsilons: int = MOST_EPSILONS) -> list[Spend]:
    """Every reservation of a ledger in its order.

    Args:
        most_epsilons: of each study, after how many rounds epsilon is worked out; the last is always among them.

    ===============================  ==============================================================
    case                             result
    ===============================  ==============================================================
    an empty ledger, or no rounds    []
    a reservation of several kinds   a row for each kind of step, epsilon after all of them
    of steps                         on the last
    a round reserved twice           two rows: both count
    a voided reservation             0 steps, epsilon as before
    ===============================  ==============================================================

    Raises:
        PrivacyError: PRIVACY_RANGE, more steps than any accountant takes.
    """
    settled = {r.body["reserve"]: r for r in history.records if r.kind in ("charge", "void")}
    rows = [row for r in history.records if r.kind == "reserve" for row in _rows(r, settled.get(r.seq))]
    wanted = _worked_out(rows, most_epsilons)
    done: list[tuple[str, TrainingSteps]] = []
    finished = []
    for index, row in enumerate(rows):
        done.append((row.study, TrainingSteps(row.noise_multiplier, row.sampling_rate, row.steps)))
        terms = history.terms(row.study)
        if index in wanted and terms is not None:
            own = epsilon_pld(merge(event for study, event in done if study == row.study), terms.delta)
            everything = epsilon_pld(merge(event for _, event in done), terms.delta)
            row = Spend(**{**row.__dict__, "epsilon": own, "epsilon_all": everything})
        finished.append(row)
    return finished


def _rows(reserve: Record, settled: Record | None) -> list[Spend]:
    body, events = reserve.body, events_of(reserve.body)
    state, steps = "unsettled", [event.steps for event in events]
    source, reason, checks = "", "", not_run()
    if settled is not None and settled.kind == "void":
        state, steps, reason = "voided", [0] * len(events), settled.body["reason"]
    elif settled is not None:
        state, steps, source = "charged", settled.body["steps"], settled.body["noise_source"]
        checks = {name: settled.body["checks"][name] for name in CHECKS}
    return [
        Spend(
            study=body["study"],
            round=body["round"],
            seq=reserve.seq,
            time=body["time"],
            state=state,
            noise_multiplier=event.noise_multiplier,
            sampling_rate=event.sampling_rate,
            steps=count,
            noise_source=source,
            checks=checks,
            reason=reason,
        )
        for event, count in zip(events, steps, strict=True)
    ]


def _worked_out(rows: list[Spend], most: int) -> set[int]:
    """Places of the rows after which epsilon is worked out."""
    last_of_reservation = {row.seq: index for index, row in enumerate(rows)}
    places: dict[str, list[int]] = {}
    for index in last_of_reservation.values():
        places.setdefault(rows[index].study, []).append(index)
    return {index for own in places.values() for index in evenly(own, most)}


def evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
