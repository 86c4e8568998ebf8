"""Was the noise there? Judged from the noise itself, z = (noised sum - clipped sum) / (sigma C), step by step.

If the mechanism ran as declared, all values of z are independent standard Gaussians. Every statistic below then has
an exact distribution, so its p-value is exact at any size:

- size: the sum of z^2 is chi-square distributed; both tails (too little noise, and another mechanism);
- shape: the number of |z| < 1/2 is binomial. Uniform, Laplace or rounded noise of the right variance shows in it;
- mean: the sum of z over sqrt(d) is N(0, 1);
- neighbours in a step: sum over odd j of z_j (z_{j-1} + z_{j+1}), over the root of sum (z_{j-1} + z_{j+1})^2, is
  N(0, 1), because given the even values it is a weighted sum of the odd ones. Lag-1 correlation shows in it;
- correlation with the step before, and with a fingerprint of every step that is remembered: N(0, 1) for the same
  reason. A seed that repeats shows in it;
- two layers of a step: their first values are compared alike. A seed that is set again for each layer shows in it.

Size, mean and the correlation with the step before are taken for each layer (weight tensor) and for all together, the
others for all together. Sums over all steps are judged as well: there small deviations and layers of few values add up.

False alarms: p-values are multiplied by how many there were (Bonferroni), in three families with ALPHA / 3 each.
However long it runs, an honest run is called failed with a chance of at most ALPHA at each verdict.
"""

from __future__ import annotations

import numpy as np
from scipy.special import erf, erfc, gammainc, gammaincc

from fedmedgan.client.training.randomness import SystemRandom
from fedmedgan.client.training.sampling_check import binomial_p

ALPHA = 6e-7
"""Chance of a false alarm at one verdict."""
SMALL_LAYER = 8
"""Sums of fewer squares are not judged: noise is rounded, so one value is exactly zero about once in 10^6 times."""
CHANCE_OF_SMALL = float(erf(0.5 / np.sqrt(2)))
"""That |z| < 1/2."""
ENOUGH_VALUES = 4000
"""So many values tell sigma x 0.9 from sigma in more than 99.9 % of runs, at the strictest threshold of one test."""
FINGERPRINT = 256
"""Values of a step that are remembered. The same noise again gives 16 standard deviations."""
REMEMBERED_STEPS = 16_384
"""Of a longer run the latest: 17 MB of memory, never written anywhere."""


class NoiseCheck:
    """Collects the noise of step after step.

    ==================================  ==================================================
    case                                result
    ==================================  ==================================================
    no noise (z = 0), in one layer too  fails at that step; a layer of few values: later
    z is NaN or infinite                fails at that step
    sigma x 0.9, at least 1e4 values    fails at that step
    noise of an earlier step again      fails at that step, whichever step it was
    fewer than ENOUGH_VALUES in all     "too-few", unless it failed
    ==================================  ==================================================
    """

    def __init__(self) -> None:
        self._steps = self._n_small = 0
        self._each_step, self._reuse = _SmallestP(), _SmallestP()
        self._last_D = self._last_squares = self._squares = self._normal = np.empty(0)

    def see(self, z_D: np.ndarray, sizes_L: np.ndarray) -> None:
        """One step's noise, float64, layer after layer, and the number of values in each layer (always the same)."""
        if self._steps == 0:
            self._begin(sizes_L)
        with np.errstate(all="ignore"):  # a value that is not finite becomes p = 0
            squares, sums, products = self._by_layer(np.stack([z_D * z_D, z_D, z_D * self._last_D]))
            before = np.zeros_like(products)  # stays 0 in the first step, and for a small layer that was rounded to 0
            np.divide(products, np.sqrt(self._last_squares), out=before, where=self._last_squares > 0)
            normal = np.concatenate([before, sums / np.sqrt(self._sizes), [_neighbours(z_D)]])
            self._squares += squares
            self._normal += normal
            n_small = int((np.abs(z_D) < 0.5).sum())
            self._n_small += n_small
            self._each_step.add(
                _chi_square_p(squares[self._is_large], self._sizes[self._is_large]),
                _normal_p(normal),
                np.array(binomial_p(n_small, len(z_D), CHANCE_OF_SMALL)),
            )
            self._see_reuse(z_D)
        self._last_D, self._last_squares = z_D, squares
        self._steps += 1

    def verdict(self) -> str:
        """passed, failed, too-few or not-run."""
        if self._steps == 0:
            return "not-run"
        together, values = _SmallestP(), self._steps * self._sizes
        enough = values >= SMALL_LAYER
        n_sums = np.where(np.arange(len(self._normal)) < len(values), max(1, self._steps - 1), self._steps)
        with np.errstate(all="ignore"):
            together.add(
                _chi_square_p(self._squares[enough], values[enough]),
                _normal_p(self._normal / np.sqrt(n_sums)),
                np.array(binomial_p(self._n_small, int(values[-1]), CHANCE_OF_SMALL)),
            )
        if min(family.corrected() for family in (self._each_step, self._reuse, together)) < ALPHA / 3:
            return "failed"
        return "passed" if values[-1] >= ENOUGH_VALUES else "too-few"

    def _begin(self, sizes_L: np.ndarray) -> None:
        n = int(sizes_L.sum())
        self._starts = np.cumsum(sizes_L) - sizes_L
        self._sizes = np.append(sizes_L, n)
        self._is_large = self._sizes >= SMALL_LAYER
        self._last_D, self._last_squares = np.zeros(n), np.zeros(len(self._sizes))
        self._squares, self._normal = np.zeros(len(self._sizes)), np.zeros(2 * len(self._sizes) + 1)
        self._kept = np.unique(SystemRandom().integers(FINGERPRINT, n).numpy())
        self._memory = np.zeros((64, len(self._kept)), np.float32)  # doubled when it is full
        # The first values of each layer, (L, K); where a layer is shorter, `_has` is 0.
        offset = np.arange(min(FINGERPRINT, int(sizes_L.max())))
        self._has = (offset < sizes_L[:, None]).astype(float)
        self._heads = np.minimum(self._starts[:, None] + offset, n - 1)
        self._pairs = np.triu_indices(len(sizes_L), 1)

    def _by_layer(self, values_SD: np.ndarray) -> np.ndarray:
        """Sums of each layer, and of all at the end: (S, L + 1)."""
        sums = np.add.reduceat(values_SD, self._starts, axis=1)
        return np.concatenate([sums, sums.sum(axis=1, keepdims=True)], axis=1)

    def _see_reuse(self, z_D: np.ndarray) -> None:
        kept = z_D[self._kept].astype(np.float32)
        memory = self._memory[: min(self._steps, REMEMBERED_STEPS)]
        with_earlier = memory @ kept / np.linalg.norm(kept)
        if self._steps == len(self._memory) < REMEMBERED_STEPS:
            self._memory = np.concatenate([self._memory, np.zeros_like(self._memory)])
        self._memory[self._steps % REMEMBERED_STEPS] = kept
        heads = z_D[self._heads] * self._has
        sizes = ((heads * heads) @ self._has.T)[self._pairs]
        with_layers = (heads @ heads.T)[self._pairs] / np.sqrt(np.where(sizes > 0, sizes, 1))
        self._reuse.add(_normal_p(with_earlier), _normal_p(with_layers))


class _SmallestP:
    """The smallest of many p-values, corrected for their number."""

    def __init__(self) -> None:
        self.smallest, self.count = 1.0, 0

    def add(self, *p_values: np.ndarray) -> None:
        for p in p_values:
            self.count += p.size
            smallest = float(p.min(initial=1.0))  # NaN if any is
            self.smallest = min(self.smallest, smallest if smallest >= 0 else 0.0)

    def corrected(self) -> float:
        return min(1.0, self.smallest * max(1, self.count))


def _neighbours(z_D: np.ndarray) -> float:
    around = z_D[:-2:2] + z_D[2::2]
    return float(z_D[1:-1:2] @ around / np.sqrt(around @ around)) if len(around) else 0.0


def _normal_p(r: np.ndarray) -> np.ndarray:
    """Two-sided p-values of N(0, 1)."""
    return np.asarray(erfc(np.abs(r) / np.sqrt(2)))


def _chi_square_p(sums: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Two-sided p-values of chi-square sums."""
    return np.minimum(1, 2 * np.minimum(gammainc(degrees / 2, sums / 2), gammaincc(degrees / 2, sums / 2)))
