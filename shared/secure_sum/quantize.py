"""Floats to packed integer slots and back, so that a sum of integers is a mean of floats.

An update is a vector of float32. Each value becomes one of L levels by stochastic rounding, which is
unbiased; k levels are packed into one slot in mixed radix R, wide enough for the weighted sum of every site,
so digits never carry:

    slot = w * (q_0 + q_1 R + ... + q_{k-1} R^{k-1}),   R = (sum of all weights) * (L - 1) + 1,   R^k <= t

Sums of slots below the plaintext modulus t are then exact, whoever takes part. Packing several quantised
values into one plaintext follows BatchCrypt (Zhang et al., USENIX ATC 2020) and FedBit (arXiv 2509.23091);
mixed radix, not bit fields, because L - 1 times the weights is rarely just below a power of two. Plain numpy;
nothing here is secret.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmedgan.shared.errors import CryptoError, StudyError
from fedmedgan.shared.study import Study

PLAIN_MODULUS = 70_368_743_669_761
"""t: the largest 46-bit prime that is 1 modulo 8192, so that BFV with N = 4096 has one slot a coefficient."""

REJECTED = "the decrypted sum failed its check"
"""The one text of a refused sum: the server may learn that it was refused, never by which check or slot."""

Slots = NDArray[np.int64]

BLOCK = 1 << 15
"""Long vectors are worked on in blocks that stay in the processor's cache."""


@dataclass(frozen=True)
class Quantized:
    """One quantised update."""

    levels: NDArray[np.int64]
    """(P,), each in [0, L - 1]."""
    saturated: int
    """How many values lay outside the range and were limited. It depends on patients: it stays here."""


@dataclass(frozen=True)
class SlotPlan:
    """How P values of one update become slots. Public, and the same at every site.

    Raises:
        StudyError: CONFIG_RANGE for a field outside its range; STUDY_OVERFLOW if one value's sum does not fit
        a slot.
    """

    n_values: int
    """P, values of one update."""
    bits: int
    """Bits of one quantised value, 2 to 32."""
    value_range: float
    """Values are limited to [-value_range, value_range]."""
    total_weight: int
    """Sum of the weights of ALL sites of the study, present in a round or not."""

    def __post_init__(self) -> None:
        for name, low, high in (("n_values", 1, 2**40), ("bits", 2, 32), ("total_weight", 1, 2**40)):
            if not low <= getattr(self, name) <= high:
                raise StudyError("CONFIG_RANGE", f"{name} is not between {low} and {high}", "secure_sum")
        if not (math.isfinite(self.value_range) and self.value_range > 0):
            raise StudyError("CONFIG_RANGE", "the range is not a positive number", "secure_sum.update_range")
        if self.per_slot < 1:
            raise StudyError(
                "STUDY_OVERFLOW",
                f"{self.bits} bits with weights that sum to {self.total_weight} do not fit a 46-bit slot",
                "secure_sum.bits",
            )

    @property
    def levels(self) -> int:
        """L = 2^bits - 1: odd, so that zero is a level and a weight that did not change stays the same."""
        return int(2**self.bits - 1)

    @property
    def radix(self) -> int:
        """R: one more than the largest weighted sum of one value over all sites."""
        return self.total_weight * (self.levels - 1) + 1

    @property
    def per_slot(self) -> int:
        """k: how many values share a slot, the largest with R^k <= t; at most P."""
        k = 0
        while k < self.n_values and self.radix ** (k + 1) <= PLAIN_MODULUS:
            k += 1
        return k

    @property
    def n_slots(self) -> int:
        """Slots of one update."""
        return -(-self.n_values // self.per_slot)

    @property
    def step(self) -> float:
        """Distance of two neighbouring levels, in units of the update."""
        return 2 * self.value_range / (self.levels - 1)

    def quantize(self, update: NDArray[np.float32], rng: np.random.Generator) -> Quantized:
        """Round each value up or down at random, so that its expectation is the value itself.

        Args:
            update: float32 (P,).
            rng: a fresh generator of the operating system's entropy outside tests.

        | case | what happens |
        |---|---|
        | NaN or infinity anywhere | HE_NOT_FINITE; nothing is rounded |
        | outside the range | limited to it and counted in `saturated` |
        | zero | the middle level, with certainty: `mean` gives back exactly zero |
        | another shape or dtype | HE_SHAPE |

        Raises:
            CryptoError: HE_SHAPE, HE_NOT_FINITE.
        """
        if update.shape != (self.n_values,) or update.dtype != np.float32:
            raise CryptoError("HE_SHAPE", f"the update is not float32 of {self.n_values} values")
        if not np.isfinite(update).all():
            raise CryptoError("HE_NOT_FINITE", "the update is not finite")
        middle = (self.levels - 1) // 2
        levels, saturated = np.empty(self.n_values, dtype=np.int64), 0
        for start in range(0, self.n_values, BLOCK):
            # float64: in float32 a 16-bit level has 8 bits left for its fraction, which would bias rounding.
            values = update[start : start + BLOCK].astype(np.float64)
            saturated += int(np.count_nonzero(np.abs(values) > self.value_range))
            scaled = np.clip(values * (middle / self.value_range), -middle, middle)
            lower = np.floor(scaled)
            up = rng.random(values.size) < scaled - lower
            levels[start : start + BLOCK] = lower + (up + middle)
        return Quantized(levels, saturated)

    def pack(self, levels: NDArray[np.int64], weight: int) -> Slots:
        """Weighted levels (P,) to slots int64 (n_slots,), each in [0, t).

        Value j * n_slots + i is digit j of slot i.

        Raises:
            CryptoError: HE_SHAPE, HE_RANGE: a level or the weight is outside the plan.
        """
        if levels.shape != (self.n_values,) or levels.dtype != np.int64:
            raise CryptoError("HE_SHAPE", f"the levels are not int64 of {self.n_values} values")
        if not 1 <= weight <= self.total_weight or levels.min() < 0 or levels.max() >= self.levels:
            raise CryptoError("HE_RANGE", "a level or the weight is outside the plan")
        digits = np.zeros(self.per_slot * self.n_slots, dtype=np.int64)
        np.multiply(levels, weight, out=digits[: self.n_values])
        rows = digits.reshape(self.per_slot, self.n_slots)
        slots = rows[-1].copy()
        for digit in rows[-2::-1]:
            slots *= self.radix
            slots += digit
        return slots

    def unpack(self, slots: Slots, cohort_weight: int) -> NDArray[np.int64]:
        """Summed slots (n_slots,) to weighted sums of levels, int64 (P,).

        Args:
            cohort_weight: sum of the weights of the sites that are in this sum.

        | case | what happens |
        |---|---|
        | something left above the last digit | ROUND_REJECTED |
        | a digit above cohort_weight * (L - 1): more than the cohort can send | ROUND_REJECTED |
        | a padding digit that is not zero | ROUND_REJECTED |
        | cohort_weight not in [1, total_weight], another shape | ROUND_REJECTED |

        Raises:
            CryptoError: ROUND_REJECTED, always with the same text.
        """
        if slots.shape != (self.n_slots,) or not 1 <= cohort_weight <= self.total_weight or slots.min() < 0:
            raise CryptoError("ROUND_REJECTED", REJECTED)
        digits = np.empty((self.per_slot, self.n_slots), dtype=np.int64)
        rest = slots.astype(np.int64)
        for row in digits:
            higher = rest // self.radix
            np.subtract(rest, higher * self.radix, out=row)
            rest = higher
        sums = digits.reshape(-1)[: self.n_values]
        padding = digits.reshape(-1)[self.n_values :]
        if rest.any() or padding.any() or sums.max() > cohort_weight * (self.levels - 1):
            raise CryptoError("ROUND_REJECTED", REJECTED)
        return sums

    def mean(self, sums: NDArray[np.int64], cohort_weight: int) -> NDArray[np.float32]:
        """Weighted sums of levels (P,) to the weighted mean of the updates, float32 (P,).

        The divisor is the weight that is really in the sum, so a site that dropped out does not shrink the
        mean. Exact integers, then float64, then one rounding to float32: every site computes the same bits.
        """
        centred = sums - cohort_weight * ((self.levels - 1) // 2)
        return (centred.astype(np.float64) * (self.step / cohort_weight)).astype(np.float32)


def plan_for(study: Study, n_values: int) -> SlotPlan:
    """The plan of a study whose update has `n_values` values; refuses an overflow before anything runs.

    Raises:
        StudyError: STUDY_OVERFLOW, CONFIG_RANGE.
    """
    total_weight = sum(site.weight for site in study.sites)
    return SlotPlan(n_values, study.secure_sum.bits, study.secure_sum.update_range, total_weight)
