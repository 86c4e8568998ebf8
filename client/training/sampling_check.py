"""Was it Poisson sampling? Judged from who was drawn: with chance q each patient, in each step, independently.

Draws are a table of steps x patients of independent coins. Under Poisson sampling

- the number of coins that show heads is Binomial(T N, q): a wrong rate shows, in both tails;
- batch sizes are T independent Binomial(N, q): batches of one size vary too little;
- how often each patient was drawn are N independent Binomial(T, q): the same patients again vary too much, shuffled
  epochs (each patient once before anyone twice) too little.

How much counts vary is S = the sum of (count - mean)^2. Its p-value is Chernoff's bound over the exact binomial,
P(S >= s) <= exp(n log E exp(x (count - mean)^2) - x s) for every x > 0, and for S <= s with x < 0: never too small,
also for a hospital with ten patients, where a chi-square approximation would be.

Counts are private. They stay in this object, and only the verdict leaves. "too-few" depends on public numbers alone.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betainc, gammaln, logsumexp, xlog1py, xlogy

ALPHA = 3e-7
"""Chance of a false alarm at one verdict; a third for each of the three statistics."""
_TILTS = np.logspace(-4, 4, 65)


class SamplingCheck:
    """Collects who was drawn.

    Args:
        patients: N, how many there are to draw from.
        declared: N of the study, which is public: "too-few" is decided with it.
        rate: q.

    ================================================  =========================================
    case                                              result
    ================================================  =========================================
    a patient is twice in a batch, or does not exist  fails
    q = 1                                             fails if anyone was ever left out
    batches of one size could not be told yet         "too-few", unless it failed
    ================================================  =========================================
    """

    def __init__(self, *, patients: int, declared: int, rate: float) -> None:
        self._patients, self._declared, self._rate = patients, declared, rate
        self._sizes: list[int] = []
        self._drawn_N = np.zeros(patients, dtype=np.int64)
        self._impossible = False

    def see(self, drawn: np.ndarray) -> None:
        """The patients of one batch, 0..N-1 in any order."""
        self._sizes.append(len(drawn))
        times_N = np.bincount(drawn, minlength=self._patients)
        self._impossible |= len(times_N) > self._patients or bool((times_N > 1).any())
        self._drawn_N += times_N[: self._patients]

    def verdict(self) -> str:
        """passed, failed, too-few or not-run."""
        steps, n, q = len(self._sizes), self._patients, self._rate
        if steps == 0:
            return "not-run"
        p = min(
            binomial_p(sum(self._sizes), steps * n, q),
            dispersion_p(np.array(self._sizes), n, q),
            dispersion_p(self._drawn_N, steps, q),
        )
        if self._impossible or p < ALPHA / 3:
            return "failed"
        likely = int((self._declared + 1) * q)  # batches that always have the most likely size: would they be seen?
        fixed_p = dispersion_p(np.full(steps, likely), self._declared, q)
        return "passed" if q == 1 or fixed_p < ALPHA / 3 else "too-few"


def binomial_p(heads: int, coins: int, q: float) -> float:
    """Two-sided p-value of `heads` among `coins` that each show heads with chance q."""
    at_least = float(betainc(heads, coins - heads + 1, q)) if heads else 1.0
    at_most = float(betainc(coins - heads, heads + 1, 1 - q)) if heads < coins else 1.0
    return min(1.0, 2 * min(at_least, at_most))


def dispersion_p(counts: np.ndarray, coins: int, q: float) -> float:
    """Upper bound of the two-sided p-value of how much independent Binomial(coins, q) counts vary."""
    mean, variance = coins * q, coins * q * (1 - q)
    if variance == 0:
        return float((counts == mean).all())
    # Counts outside of this window, whose chance is below e^-100, are moved to its edge.
    reach = 15 * math.sqrt(variance) + 60
    low, high = max(0, math.floor(mean - reach)), min(coins, math.ceil(mean + reach))
    values = np.arange(low, high + 1)
    log_chance = _log_binomial(values, coins, q)
    deviation = (values - mean) ** 2 / variance
    total = float(((np.clip(counts, low, high) - mean) ** 2).sum() / variance)

    def bound(tilts: np.ndarray) -> float:
        log_mean_exp = logsumexp(log_chance + tilts[:, None] * deviation, axis=1)
        return math.exp(min(0.0, float((len(counts) * log_mean_exp - tilts * total).min())))

    return min(1.0, 2 * min(bound(_TILTS), bound(-_TILTS)))


def _log_binomial(k: np.ndarray, n: int, q: float) -> np.ndarray:
    choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return np.asarray(choose + xlogy(k, q) + xlog1py(n - k, -q))
