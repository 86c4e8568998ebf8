"""Epsilon again, from the recorded events alone: for each study of a ledger, and for all studies of the same patients.

Three code bases that know nothing of each other are asked: dp-accounting's privacy loss distribution (PLD), Opacus' PRV
accountant where torch is installed, and the Renyi differential privacy (RDP) of this file. What counts is the LARGER of
PLD and PRV, as at the hospital; RDP stands beside it as an upper bound. Never the smallest.

The unit is one patient with all images, sampling is Poisson by patient, and a patient is added or removed. What the
same steps cost where a patient is REPLACED by another stands beside it; no ceiling is about that.

Sources: Mironov, Talwar, Zhang, "Renyi differential privacy of the sampled Gaussian mechanism", 2019 (arXiv
1908.10530), section 3.3, for whole and fractional orders; Canonne, Kamath, Steinke, "The discrete Gaussian for
differential privacy", 2020 (arXiv 2004.00010), Proposition 12, for epsilon from RDP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, gammasgn, log_ndtr, logsumexp  # type: ignore[import-untyped,unused-ignore]

from fedmedgan.client.training.accountant import epsilon_prv
from fedmedgan.shared.privacy.accounting import epsilon_pld, epsilon_replace_one
from fedmedgan.shared.privacy.events import TrainingSteps, check_delta, merge
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.records import Terms

MAX_KINDS = 20
"""Kinds of steps (noise, rate) that are worked out one by one; of more, noise is rounded down and rates up."""
MAX_PRV_STEPS = 1_000_000
"""Above it PRV needs more than 15 s and 2 GB, and is not asked."""
_FRACTIONAL_ORDERS = (*(1 + k / 20 for k in range(1, 20)), *(k + 0.5 for k in range(2, 11)))
_WHOLE_ORDERS = (*range(2, 65), *range(72, 129, 8), *range(144, 257, 16), 320, 384, 512, 768, 1024, 2048)


@dataclass(frozen=True)
class Epsilon:
    """What some events cost at one delta."""

    accountants: Mapping[str, float]
    """"pld" and "prv"; without torch "pld" alone."""
    rdp: float
    """The upper bound beside them."""
    replace_one: float
    rounded: bool
    """There were more than `MAX_KINDS` kinds of steps: every number is of more than was done."""

    @property
    def enforced(self) -> float:
        """The larger of the accountants."""
        return max(self.accountants.values())


@dataclass(frozen=True)
class Cost:
    """What one study, or all of them, cost each patient of a hospital."""

    hospital: str
    study: str
    """Its hash; empty for all studies together."""
    steps: int
    kinds: int
    """Different (noise multiplier, sampling rate)."""
    epsilon: float
    """The larger of the accountants."""
    accountants: Mapping[str, float]
    rdp: float
    replace_one: float
    rounded: bool
    delta: float
    ceiling: float
    """Of the study, or of all studies of the same patients."""

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "accountants": dict(self.accountants)}


def cost_of(events: Iterable[TrainingSteps], delta: float) -> Epsilon:
    """Every accountant's epsilon of some events.

    ==============================================  ==================================================================
    case                                            result
    ==============================================  ==================================================================
    nothing was done                                0 everywhere
    rounds that ended early, with 0 steps           cost nothing
    several noise multipliers or sampling rates     composed
    more than 20 of them                            rounded to fewer, less noise and higher rates: never too little
    torch is not installed, above a million steps   PLD alone is enforced; RDP still stands beside it
    RDP's bound exceeds 300                         that bound
    delta outside of 1e-10 to 0.1                   PRIVACY_RANGE, before an accountant sees it
    more than 10 million steps of one kind          PRIVACY_RANGE
    ==============================================  ==================================================================

    Raises:
        PrivacyError: PRIVACY_RANGE; PRIVACY_ACCOUNTANTS, Opacus gave up.
    """
    return _cost_of(tuple(merge(events)), check_delta(delta))


@lru_cache(maxsize=1024)
def _cost_of(events: tuple[TrainingSteps, ...], delta: float) -> Epsilon:
    few = fewer_kinds(events)
    rounded = len(few) < len(events)
    return Epsilon(_accountants(few, delta), epsilon_rdp(few, delta), epsilon_replace_one(few, delta), rounded)


def enforced(events: Iterable[TrainingSteps], delta: float) -> float:
    """The larger accountant's epsilon alone, which is what ceilings are about. Cases and errors as `cost_of`."""
    return max(_accountants(fewer_kinds(events), check_delta(delta)).values())


def _accountants(few: tuple[TrainingSteps, ...], delta: float) -> dict[str, float]:
    found = {"pld": epsilon_pld(few, delta)}
    if sum(event.steps for event in few) <= MAX_PRV_STEPS:
        with suppress(ModuleNotFoundError):  # an auditor's machine without torch
            found["prv"] = epsilon_prv(few, delta)
    return found


def costs(history: History) -> list[Cost]:
    """What every study of a ledger cost, in the order in which they were opened. Raises like `cost_of`."""
    found = []
    for study in history.studies:
        terms = history.terms(study)
        if terms is not None:
            found.append(_cost(history.hospital, study, history.spent(study), terms.delta, terms.ceiling))
    return found


def all_costs(histories: Sequence[History]) -> Cost:
    """What all studies of the same patients cost together: of one ledger, or of several that the data owner allowed.

    Delta is that of the study that was opened last, as at the hospital; the ceiling is the lowest of the ledgers'.

    Raises:
        PrivacyError: like `cost_of`; PRIVACY_RANGE where no study was ever opened.
    """
    latest = [terms for terms in map(latest_terms, histories) if terms is not None]
    delta = min((terms.delta for terms in latest), default=math.nan)
    ceiling = min((terms.total_ceiling for terms in latest), default=math.nan)
    spent = merge(event for history in histories for event in history.spent())
    return _cost(histories[0].hospital, "", spent, check_delta(delta), ceiling)


def latest_terms(history: History) -> Terms | None:
    """Of the study that was opened last; None where none was."""
    body = next((record.body for record in reversed(history.records) if record.kind == "open"), None)
    return Terms.of(body) if body else None


def _cost(hospital: str, study: str, spent: Sequence[TrainingSteps], delta: float, ceiling: float) -> Cost:
    found = cost_of(spent, delta)
    return Cost(
        hospital=hospital,
        study=study,
        steps=sum(event.steps for event in spent),
        kinds=len(spent),
        epsilon=found.enforced,
        accountants=found.accountants,
        rdp=found.rdp,
        replace_one=found.replace_one,
        rounded=found.rounded,
        delta=delta,
        ceiling=ceiling,
    )


def fewer_kinds(events: Iterable[TrainingSteps], most: int = MAX_KINDS) -> tuple[TrainingSteps, ...]:
    """At most so many kinds of steps, none with more noise or a lower rate than before; unchanged where they are few.

    Time stays bounded whatever a ledger holds: 3, 2 and 1 significant digits are tried, then one kind for all.
    """
    kinds = merge(events)
    for digits in (3, 2, 1):
        if len(kinds) <= most:
            return tuple(kinds)
        down, up = Context(prec=digits, rounding=ROUND_FLOOR), Context(prec=digits, rounding=ROUND_CEILING)
        kinds = merge(
            TrainingSteps(
                float(down.create_decimal(repr(event.noise_multiplier))),
                float(up.create_decimal(repr(event.sampling_rate))),
                event.steps,
            )
            for event in kinds
        )
    if len(kinds) <= most:
        return tuple(kinds)
    sigma = min(event.noise_multiplier for event in kinds)
    rate = max(event.sampling_rate for event in kinds)
    return (TrainingSteps(sigma, rate, sum(event.steps for event in kinds)),)


# ---- Renyi differential privacy, written for this file alone


def epsilon_rdp(events: Iterable[TrainingSteps], delta: float) -> float:
    """Upper bound on epsilon by Renyi divergences of whole and fractional orders.

    Raises:
        PrivacyError: PRIVACY_RANGE.
    """
    kinds, delta = merge(events), check_delta(delta)
    if not kinds:
        return 0.0
    best = math.inf
    for order in (*_FRACTIONAL_ORDERS, *_WHOLE_ORDERS):
        rdp = sum(e.steps * renyi_divergence(e.noise_multiplier, e.sampling_rate, order) for e in kinds)
        best = min(best, rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return max(0.0, best)


def renyi_divergence(sigma: float, q: float, order: float) -> float:
    """Of one Poisson-subsampled Gaussian step, with and without a patient; the larger of both directions.

    Args:
        order: above 1.
    """
    if q == 1:
        return order / (2 * sigma**2)
    log_moment = _whole_moment if float(order).is_integer() else _fractional_moment
    return max(0.0, log_moment(sigma, q, order)) / (order - 1)


def _whole_moment(sigma: float, q: float, order: float) -> float:
    """log E_p[(mixture / p)^order] by the binomial theorem: arXiv 1908.10530, section 3.3."""
    k = np.arange(int(order) + 1)
    terms = _log_binomial(order, k) + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
    return float(logsumexp(terms))


def _fractional_moment(sigma: float, q: float, order: float) -> float:
    """The same for a fractional order: the line is split at z, where both terms of the mixture are equal, and each half
    is an infinite binomial series. Terms fall like a geometric series; as many are added as are not negligible.
    """
    z = sigma**2 * math.log(1 / q - 1) + 0.5
    terms = 64
    while True:
        i = np.arange(terms)
        binomial, sign = _log_binomial(order, i), gammasgn(order - i + 1)
        j = order - i
        left = binomial + i * math.log(q) + j * math.log1p(-q) + i * (i - 1) / (2 * sigma**2)
        right = binomial + j * math.log(q) + i * math.log1p(-q) + j * (j - 1) / (2 * sigma**2)
        left, right = left + log_ndtr((z - i) / sigma), right + log_ndtr((j - z) / sigma)
        total = float(logsumexp([*left, *right], b=[*sign, *sign]))
        if max(left[-1], right[-1]) < total - 30 or terms >= 1 << 14:
            # A series that was cut off: what is missing is at most its last terms again, and only makes it larger.
            return float(np.logaddexp(total, max(left[-1], right[-1]) + math.log(terms)))
        terms *= 4


def _log_binomial(order: float, k: NDArray[np.int64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    return found
