"""Epsilon from events, and the noise that a whole study needs.

Google's dp-accounting computes the privacy loss distribution (PLD; Koskela et al. 2020, Doroshenko et al.
2022) and Renyi differential privacy (RDP; Mironov et al. 2019). Opacus' PRV accountant is the independent
second opinion: it needs torch, so it lives at the hospital (client/training/accountant.py). What is enforced
is the larger of the two. The Gaussian (CLT) accountant is not offered: it says 8.4 where 9.95 is spent.

Every function takes events that were validated when they were made, so no accountant ever sees NaN, a
negative number of steps or delta = 2: they answer such input with nonsense, or hang.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.events import (
    MAX_NOISE,
    MIN_NOISE,
    TrainingSteps,
    check_delta,
    merge,
    real,
)

Accountant = Callable[[Iterable[TrainingSteps], float], float]

HOPELESS_EPSILON = 300.0
"""Where RDP says more than this, PLD and PRV return RDP's bound: their own grids are too large."""
_ADD_OR_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
_REPLACE = dp_accounting.NeighboringRelation.REPLACE_ONE
_FEW_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def epsilon_pld(events: Iterable[TrainingSteps], delta: float) -> float:
    """Epsilon by privacy loss distributions: an upper bound, tight to about 1%.

    Args:
        events: everything that was done, in any order.
        delta: 1e-10 to 0.1.

    Raises:
        PrivacyError: PRIVACY_RANGE.

    ==========================  =========================================================
    case                        result
    ==========================  =========================================================
    no events, or 0 steps       0.0
    several (sigma, q)          composed
    RDP's bound exceeds 300     RDP's bound, which is larger
    delta outside its range     PRIVACY_RANGE, before an accountant sees it
    ==========================  =========================================================
    """
    return _epsilon_pld(tuple(merge(events)), check_delta(delta))


def epsilon_rdp(events: Iterable[TrainingSteps], delta: float) -> float:
    """Epsilon by Renyi differential privacy: looser (6 to 15%, far more at small epsilon), for comparison.

    Cases and errors as `epsilon_pld`.
    """
    return _epsilon_rdp(tuple(merge(events)), check_delta(delta))


def epsilon_replace_one(events: Iterable[TrainingSteps], delta: float) -> float:
    """Epsilon of the same events where one patient is REPLACED by another, by PLD: printed, never enforced.

    A patient's gradient of norm C may turn into its opposite, so it is 1.25 to 2.5 times that of adding or
    removing one; the ceilings are about add or remove, as in Opacus and in most papers.

    Args:
        events: everything that was done, in any order.
        delta: 1e-10 to 0.1.

    Raises:
        PrivacyError: PRIVACY_RANGE.

    ================================  =================================================================
    case                              result
    ================================  =================================================================
    no events, or 0 steps             0.0
    RDP's bound (add or remove)       a closed bound, which is larger: everybody in every step, distance
    exceeds 300                       2C, zero-concentrated privacy (Bun, Steinke 2016, Prop. 1.3)
    ================================  =================================================================
    """
    return _epsilon_replace_one(tuple(merge(events)), check_delta(delta))


def is_hopeless(events: Iterable[TrainingSteps], delta: float) -> bool:
    """Whether RDP's bound exceeds `HOPELESS_EPSILON`; mostly known in milliseconds, from a few orders."""
    return _rough_bound(events, delta) > HOPELESS_EPSILON and epsilon_rdp(events, delta) > HOPELESS_EPSILON


def accountant_error(epsilon: float, steps: int) -> float:
    """How finely a numerical accountant is asked to work, in units of epsilon.

    0.01 for the epsilons of practice (1 to 10), 1% below and 0.1% above. Never finer than 2e-6 * sqrt(steps):
    the number of grid points grows with sqrt(steps) / error, and finer grids take minutes and gigabytes.
    """
    wanted = max(min(epsilon / 100, 0.01), epsilon / 1000, 1e-4)
    return max(wanted, 2e-6 * math.sqrt(steps))


def calibrate_noise(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier that keeps ALL steps of a study within epsilon, rounded up to 3 decimals.

    Calibrating round by round instead makes 50 rounds of "epsilon 8" cost 40. PLD is asked, less a margin of
    twice `accountant_error`, since Opacus' PRV adds that error once to its answer: both accountants then stay
    within epsilon. The search runs over whole thousandths, so two machines find the same number. It takes
    seconds.

    Args:
        epsilon: the ceiling over all steps, 0.01 or more.
        delta: 1e-10 to 0.1.
        sampling_rate: q, above 0, at most 1.
        steps: all steps of the study, 1 or more.

    Raises:
        PrivacyError: PRIVACY_RANGE, also when no noise multiplier up to 1000 is enough.

    ===========================================  =================================================
    case                                         result
    ===========================================  =================================================
    the least noise allowed (0.3) is enough      0.3
    even 1000 is not enough                      PRIVACY_RANGE
    more steps, or a higher q, all else equal    never less noise
    ===========================================  =================================================
    """
    target, delta = real(epsilon, "epsilon"), check_delta(delta)
    if target < 0.01:
        raise PrivacyError("PRIVACY_RANGE", f"{target} is below 0.01", "epsilon")
    if TrainingSteps(1.0, sampling_rate, steps).steps == 0:
        raise PrivacyError("PRIVACY_RANGE", "there is nothing to calibrate for", "steps")
    target -= 2 * accountant_error(target, steps)

    def enough(thousandths: int, accountant: Accountant = epsilon_pld) -> bool:
        return accountant([TrainingSteps(thousandths / 1000, sampling_rate, steps)], delta) <= target

    least, most = round(MIN_NOISE * 1000), round(MAX_NOISE * 1000)
    # The rough bound is never below PLD and is far faster: where it is content, the search begins, downwards.
    high = _smallest(lambda thousandths: enough(thousandths, _rough_bound), least - 1, most)
    if not enough(high):
        raise PrivacyError("PRIVACY_RANGE", f"even noise {MAX_NOISE:g} does not keep epsilon {epsilon}", "epsilon")
    stride = max(1, high // 32)
    low = high - stride
    while low >= least and enough(low):
        high, stride = low, 2 * stride
        low = high - stride
    low = max(low, least - 1)
    return _smallest(enough, low, high) / 1000


def epsilon_after_rounds(
    one_round: TrainingSteps, rounds: Sequence[int], delta: float, accountant: Accountant = epsilon_pld
) -> list[tuple[int, float]]:
    """The curve of a study: (k, epsilon after k rounds) for each k of `rounds`. Raises PRIVACY_RANGE."""
    return [(k, accountant([one_round.with_steps(k * one_round.steps)], delta)) for k in rounds]


def _rough_bound(events: Iterable[TrainingSteps], delta: float) -> float:
    """Epsilon by RDP at a few whole orders: never below RDP's answer, and found in milliseconds."""
    return _epsilon_rdp(tuple(merge(events)), check_delta(delta), _FEW_ORDERS)


def _smallest(enough: Callable[[int], bool], low: int, high: int) -> int:
    """Bisection: the smallest k in (low, high] with enough(k), where enough(high) is taken for granted."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _epsilon_pld(events: tuple[TrainingSteps, ...], delta: float) -> float:
    if not events or is_hopeless(events, delta):
        return epsilon_rdp(events, delta)
    return _compose(PLDAccountant(_ADD_OR_REMOVE, _interval(events)), events, delta)


@lru_cache(maxsize=1024)
def _epsilon_replace_one(events: tuple[TrainingSteps, ...], delta: float) -> float:
    if not events:
        return 0.0
    if is_hopeless(events, delta):
        rho = sum(2 * event.steps / event.noise_multiplier**2 for event in events)
        return rho + 2 * math.sqrt(rho * math.log(1 / delta))
    return _compose(PLDAccountant(_REPLACE, _interval(events)), events, delta)


@lru_cache(maxsize=4096)
def _epsilon_rdp(events: tuple[TrainingSteps, ...], delta: float, orders: tuple[int, ...] | None = None) -> float:
    if not events:
        return 0.0
    accountant = RdpAccountant(orders, _ADD_OR_REMOVE)
    with _quiet():
        return _compose(accountant, events, delta)


def _compose(accountant: dp_accounting.PrivacyAccountant, events: tuple[TrainingSteps, ...], delta: float) -> float:
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        one_step = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
        accountant.compose(dp_accounting.SelfComposedDpEvent(one_step, event.steps))
    return max(0.0, float(accountant.get_epsilon(delta)))


def _interval(events: tuple[TrainingSteps, ...]) -> float:
    """Grid width of the privacy loss.

    A patient's loss in one step is about q / sigma wide, and a grid coarser than that overstates epsilon (3%
    for q = 0.002, sigma = 1 on a grid of 1e-3). Little noise spreads the loss over a wide range, where a fine
    grid is slow.
    """
    finest = 1e-5 if all(event.noise_multiplier >= 2 for event in events) else 1e-4
    narrowest = min(event.sampling_rate / event.noise_multiplier for event in events)
    return min(1e-3, max(finest, narrowest / 20))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide dp-accounting's log lines about orders it leaves out: leaving one out only loosens the bound."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
