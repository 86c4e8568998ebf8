"""What an attack's hits prove: lower bounds on epsilon, on the AUC and on the rate of patients found.

An attack can refute a privacy claim and never confirm it. So a bound is worth nothing without its CEILING: the bound
that would have come out had the attack been right every single time. A ceiling below the declared epsilon means that
the numbers were too few to find any fault, and then nothing has "passed".

Sources: Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", 2023 (arXiv 2305.08846); Jagielski,
Ullman, Oprea, "Auditing differentially private machine learning", 2020 (arXiv 2006.07709); Clopper, Pearson, "The use
of confidence or fiducial limits", 1934; Carlini et al., "Membership inference attacks from first principles", 2022
(arXiv 2112.03570), for the true positive rate at a low false positive rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats  # type: ignore[import-untyped,unused-ignore]

Places = NDArray[np.int64]
Verdict = Literal["passed", "failed", "too-few"]

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Bootstrap samples of the patients."""
MOST_EPSILON = 100.0
"""Where the search for a bound ends; a study's epsilon is never larger."""


@dataclass(frozen=True)
class Finding:
    """One attack: what it showed, what it could have shown, and whether that is allowed."""

    name: str
    quantity: str
    """What the bounds are about: "epsilon", "AUC" or "TPR at 1 % FPR"."""
    estimate: float | None
    """The quantity as measured, without regard to chance; None for epsilon."""
    lower_bound: float
    """With `confidence`, the true quantity is at least this."""
    confidence: float
    ceiling: float
    """The lower bound of an attack that is always right, with the same numbers."""
    allowed: float
    """A lower bound above it fails: the declared epsilon, or what a generator without a leak stays below."""
    numbers: dict[str, int | float]
    """What was used: canaries, runs, patients, steps and the like."""
    seconds: float
    verdict: Verdict
    explanation: str
    """One sentence for a person."""


def judge(lower_bound: float, ceiling: float, allowed: float) -> Verdict:
    """The verdict on a bound.

    ==============================================  =========
    case                                            result
    ==============================================  =========
    lower bound above what is allowed               failed
    not even the ceiling is above what is allowed   too-few
    otherwise                                       passed
    ==============================================  =========
    """
    if lower_bound > allowed:
        return "failed"
    return "passed" if ceiling > allowed else "too-few"


# --- one run, many canaries ------------------------------------------------------------------------------------


def one_run_p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Chance of so many correct guesses, at most, if the run were (epsilon, delta)-private.

    Theorem 5.2 of Steinke et al. 2023. Each canary was in the training set by a fair coin of its own; the auditor saw
    the run and guessed some of the coins. Private for adding or removing one record.

    Args:
        canaries: m, all canaries, guessed or not.
        guesses: r of them were guessed; r is chosen before the coins are looked at.
        correct: v of the guesses were right.

    ===========================  ====================================================
    case                         result
    ===========================  ====================================================
    no guess, or none correct    1
    delta = 0                    the binomial tail alone (Theorem 5.1)
    the formula exceeds 1        1
    ===========================  ====================================================
    """
    if correct == 0:
        return 1.0
    chance = 1 / (1 + math.exp(-epsilon))  # randomised response with this epsilon answers truly so often
    tail = float(stats.binom.sf(correct - 1, guesses, chance))
    just_below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance))
    steepest = float((just_below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * steepest)


def one_run_epsilon(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Lower bound on epsilon from one run: the largest that `one_run_p_value` still rejects, by bisection.

    ==================================================  ====================================================
    case                                                result
    ==================================================  ====================================================
    half of the guesses right, or fewer                 0.0
    2 m delta so large that delta explains everything   0.0
    all guesses right                                   finite: the ceiling, about ln(guesses / 3) at 95 %
    ==================================================  ====================================================
    """

    def rejected(epsilon: float) -> bool:
        p = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        return p <= 1 - confidence

    if not rejected(0.0):
        return 0.0
    # The claims are nested: a run that is not (epsilon, delta)-private is not so for any smaller epsilon either.
    low, high = 0.0, 1.0
    while high < MOST_EPSILON and rejected(high):
        low, high = high, high + 1
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


# --- many runs, one record -------------------------------------------------------------------------------------


def rate_limits(hits: int, trials: int, level: float) -> tuple[float, float]:
    """Clopper-Pearson limits of a rate, each wrong with chance `level` at most.

    ============  =========================
    case          result
    ============  =========================
    no trial      (0, 1)
    no hit        lower limit 0
    only hits     upper limit 1
    ============  =========================
    """
    low = float(stats.beta.ppf(level, hits, trials - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - level, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high


def many_run_epsilon(
    *, with_record: int, said_in: int, without_record: int, said_in_wrongly: int, delta: float, confidence: float
) -> float:
    """Lower bound on epsilon from many runs with and without one record (Jagielski et al. 2020).

    (epsilon, delta)-privacy says TPR <= e^epsilon FPR + delta, and the same of the true and false negatives. Two
    Clopper-Pearson limits, which hold together with `confidence`, bound all four rates.

    Args:
        with_record, without_record: runs of each kind.
        said_in: of the runs with the record, those that the attack called so; the threshold was fixed beforehand.
        said_in_wrongly: of the runs without it.

    ======================================  =================================
    case                                    result
    ======================================  =================================
    no better than chance                   0.0
    attack right every time                 finite: the ceiling
    attack wrong every time                 0.0: which answer means "in" was fixed beforehand
    runs of one kind only                   0.0
    ======================================  =================================
    """
    level = (1 - confidence) / 2
    hit_rate = rate_limits(said_in, with_record, level)[0]
    false_rate = rate_limits(said_in_wrongly, without_record, level)[1]
    return max(_log_ratio(hit_rate - delta, false_rate), _log_ratio(1 - false_rate - delta, 1 - hit_rate))


def many_run_epsilon_of_normal_noise(
    *, with_record: int, said_in: int, without_record: int, said_in_wrongly: int, delta: float, confidence: float
) -> float:
    """As `many_run_epsilon`, for a mechanism that adds normal noise and nothing else to hide a record.

    Such a mechanism is mu-Gaussian private (Dong, Roth, Su 2019, arXiv 1905.02383): its best attack has
    TPR = Phi(Phi^-1(FPR) + mu). The rates bound mu, and mu gives epsilon at `delta`. The general bound cannot see
    the small delta in a few hundred runs; this one is far nearer to the truth (Nasr et al. 2023, arXiv 2302.07956),
    under an assumption that the code was written to meet.
    """
    level = (1 - confidence) / 2
    hit_rate = rate_limits(said_in, with_record, level)[0]
    false_rate = rate_limits(said_in_wrongly, without_record, level)[1]
    if hit_rate <= false_rate:
        return 0.0
    return gaussian_epsilon(float(stats.norm.ppf(hit_rate) - stats.norm.ppf(false_rate)), delta)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon of normal noise with standard deviation sensitivity / mu (Balle, Wang 2018, Theorem 8).

    ==========================  ============
    case                        result
    ==========================  ============
    mu = 0                      0.0
    delta explains everything   0.0
    epsilon above 100           100.0
    ==========================  ============
    """

    def excess(epsilon: float) -> float:
        second = epsilon + float(stats.norm.logcdf(-epsilon / mu - mu / 2))
        return float(stats.norm.cdf(-epsilon / mu + mu / 2)) - math.exp(second) - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, MOST_EPSILON)) if excess(MOST_EPSILON) < 0 else MOST_EPSILON


def _log_ratio(larger: float, smaller: float) -> float:
    return math.log(larger / smaller) if larger > smaller > 0 else 0.0


# --- scores of members and of others ---------------------------------------------------------------------------


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Chance that a member scores higher than somebody else; ties count half (Mann, Whitney 1947)."""
    return _auc_of_places(*_places(members, others))


def auc_limits(
    members: ArrayLike, others: ArrayLike, *, lower_level: float, upper_level: float, seed: int = 0
) -> tuple[float, float, float]:
    """Lower and upper limit of the AUC, and the ceiling of the lower one, by bootstrap over patients (Efron 1979).

    Members and others are drawn anew with replacement, each on their own; the limits are percentiles. One score a
    patient: a patient with nine images is one draw.

    A bootstrap has no spread where all pairs agree. N disjoint pairs (N patients on the smaller side) are N honest
    coin flips with the AUC as their chance, so the limits never claim more than those could: lower_level^(1/N).

    Args:
        lower_level: chance, at most, that the lower limit lies above the true AUC.
        upper_level: the same of the upper limit.

    ===============================  ================================================
    case                             result
    ===============================  ================================================
    all members above all others     lower limit = ceiling, upper limit 1
    all scores equal                 both limits 0.5
    one patient on a side            ceiling = lower_level: nothing can be shown
    ===============================  ================================================
    """
    member_N, other_N, values = _places(members, others)
    rng = np.random.default_rng(seed)
    found = [
        _auc_of_places(rng.choice(member_N, len(member_N)), rng.choice(other_N, len(other_N)), values)
        for _ in range(RESAMPLES)
    ]
    pairs = min(len(member_N), len(other_N))
    ceiling, floor = lower_level ** (1 / pairs), 1 - upper_level ** (1 / pairs)
    lower, upper = np.quantile(found, lower_level), np.quantile(found, 1 - upper_level)
    return min(float(lower), ceiling), max(float(upper), floor), ceiling


def smallest_auc_found(members: int, others: int, *, level: float, power: float = 0.9) -> float:
    """The AUC that `power` of all tests of this size tell from 0.5 (normal approximation; Hanley, McNeil 1982)."""
    spread = math.sqrt((members + others + 1) / (12 * members * others))
    return min(1.0, 0.5 + float(stats.norm.isf(level) + stats.norm.ppf(power)) * spread)


def _places(members: ArrayLike, others: ArrayLike) -> tuple[Places, Places, int]:
    """Each score as its place among the different values, lowest first; and how many values there are."""
    member_N, other_N = np.asarray(members, float), np.asarray(others, float)
    values, places_N = np.unique(np.concatenate([member_N, other_N]), return_inverse=True)
    return places_N[: len(member_N)], places_N[len(member_N) :], len(values)


def _auc_of_places(member_N: Places, other_N: Places, values: int) -> float:
    others_V = np.bincount(other_N, minlength=values)
    wins_V = np.cumsum(others_V) - others_V / 2
    return float(wins_V[member_N].mean() / len(other_N))


@dataclass(frozen=True)
class Found:
    """Members found at a low false positive rate."""

    caught: int
    rate: float
    lower: float
    """Clopper-Pearson limits of the true positive rate at this threshold, each wrong with chance `level` at most."""
    upper: float
    ceiling: float
    """The lower limit if every member had been caught."""
    by_chance: float
    """Lower limit that members who score like everybody else stay at or below, but with chance `level`."""
    false_positives: int
    """Others above the threshold, at most."""


def true_positives(members: ArrayLike, others: ArrayLike, *, false_positive_rate: float, level: float) -> Found:
    """How many members score above all but `false_positive_rate` of the others.

    The threshold comes from the others, so it is itself a matter of chance. Without a leak every order of members and
    others is equally likely; the number caught then has a negative hypergeometric distribution, and `by_chance` is
    exact for any sizes. ``lower > by_chance`` is the exact test.

    ====================================  ================================================================
    case                                  result
    ====================================  ================================================================
    fewer than 100 others, 1 %            no false positive at all is allowed: stricter than asked
    ties                                  a member at the threshold is not caught
    too few to tell anything              `by_chance` is the ceiling
    ====================================  ================================================================
    """
    member_N, other_N = np.asarray(members, float), np.sort(np.asarray(others, float))[::-1]
    n, h = len(member_N), len(other_N)
    allowed = math.floor(false_positive_rate * h + 1e-9)
    caught = int((member_N > other_N[allowed]).sum())

    def chance(count: int) -> float:
        """Chance, without a leak, that at least `count` members are above the threshold."""
        return float(stats.hypergeom.cdf(allowed, n + h, h, count + allowed)) if count else 1.0

    expected = next((count - 1 for count in range(1, n + 1) if chance(count) <= level), n)
    lower, upper = rate_limits(caught, n, level)
    return Found(
        caught=caught,
        rate=caught / n,
        lower=lower,
        upper=upper,
        ceiling=rate_limits(n, n, level)[0],
        by_chance=rate_limits(expected, n, level)[0],
        false_positives=allowed,
    )
