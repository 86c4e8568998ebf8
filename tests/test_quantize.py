"""Floats to packed integers and back: exact sums, unbiased rounding, tight bounds."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmedgan.shared.errors import CryptoError, StudyError
from fedmedgan.shared.secure_sum.quantize import PLAIN_MODULUS, SlotPlan, plan_for
from fedmedgan.shared.study import from_dict


def a_plan(n_values: int = 100, bits: int = 8, value_range: float = 0.1, total_weight: int = 5) -> SlotPlan:
    return SlotPlan(n_values, bits, value_range, total_weight)


def is_prime(n: int) -> bool:
    return all(n % d for d in range(2, int(n**0.5) + 1))


def test_modulus_is_the_largest_46_bit_prime_with_one_slot_a_coefficient():
    assert PLAIN_MODULUS % 8192 == 1
    assert is_prime(PLAIN_MODULUS)
    above = range(PLAIN_MODULUS + 8192, 2**46, 8192)
    assert not any(is_prime(n) for n in above)


@given(
    n_values=st.integers(1, 60),
    bits=st.integers(2, 16),
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_sum_of_any_cohort_is_exact(n_values, bits, weights, data):
    plan = a_plan(n_values, bits, total_weight=sum(weights))
    cohort = data.draw(st.sets(st.integers(0, len(weights) - 1), min_size=1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    levels = rng.integers(0, plan.levels, (len(weights), n_values))
    total = sum(plan.pack(levels[i], weights[i]) for i in cohort) % PLAIN_MODULUS
    slow = [sum(weights[i] * int(levels[i, p]) for i in cohort) for p in range(n_values)]
    assert plan.unpack(total, sum(weights[i] for i in cohort)).tolist() == slow


@given(bits=st.integers(2, 16), total_weight=st.integers(1, 100_000))
@settings(deadline=None, max_examples=200)
def test_overflow_bound_is_tight(bits, total_weight):
    plan = a_plan(1000, bits, total_weight=total_weight)
    # Everybody sends the top level in every value: the largest sum there is fills the slot and does not wrap.
    top = plan.pack(np.full(1000, plan.levels - 1), 1)
    assert int(top.max()) * total_weight == plan.radix**plan.per_slot - 1 < PLAIN_MODULUS
    # One more value in a slot would wrap.
    assert plan.radix ** (plan.per_slot + 1) > PLAIN_MODULUS


@pytest.mark.parametrize(
    ("bits", "weight", "per_slot"),
    [
        (8, 10, 4),
        (8, 11, 4),
        (8, 12, 3),
        (8, 162, 3),
        (8, 163, 2),
        (16, 128, 2),
        (16, 129, 1),
        (16, 100_000, 1),
    ],
)
def test_values_in_a_slot(bits, weight, per_slot):
    assert a_plan(1000, bits, total_weight=weight).per_slot == per_slot


def test_one_value():
    plan = a_plan(1)
    assert (plan.per_slot, plan.n_slots) == (1, 1)
    assert plan.unpack(plan.pack(np.array([7]), 5), 5).tolist() == [35]


def test_a_sum_that_cannot_fit_is_refused_when_the_study_is_checked():
    with pytest.raises(StudyError, match="STUDY_OVERFLOW"):
        a_plan(bits=32, total_weight=2**15)
    sites = [{"name": f"site-{i}", "patients": 100, "weight": i + 1} for i in range(4)]
    study = from_dict({"name": "a", "sites": sites, "secure_sum": {"bits": 16, "update_range": 0.2}})
    assert plan_for(study, 77) == SlotPlan(77, 16, 0.2, 10)


@pytest.mark.parametrize("change", [{"n_values": 0}, {"bits": 1}, {"bits": 33}, {"total_weight": 0}])
def test_plan_outside_its_range(change):
    with pytest.raises(StudyError, match="CONFIG_RANGE"):
        a_plan(**change)


@pytest.mark.parametrize("value_range", [0.0, -1.0, float("nan"), float("inf")])
def test_range_must_be_positive_and_finite(value_range):
    with pytest.raises(StudyError, match="CONFIG_RANGE"):
        a_plan(value_range=value_range)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("value", [-0.0999, -0.01234, 1e-9, 0.05678, 0.0999])
def test_rounding_is_unbiased(bits, value):
    n = 200_000
    plan = a_plan(n, bits)
    update = np.full(n, value, dtype=np.float32)
    levels = plan.quantize(update, np.random.default_rng(3)).levels
    exact = Fraction(float(np.float32(value))) / Fraction(plan.step) + (plan.levels - 1) // 2
    assert levels.min() >= int(exact)
    assert levels.max() <= int(exact) + 1
    fraction = float(exact - int(exact))
    spread = (fraction * (1 - fraction) / n) ** 0.5
    assert abs(levels.mean() - float(exact)) <= 5 * spread + 1e-9


def test_rounding_keeps_fractions_that_float32_would_lose():
    """Near the end of 16 bits a float32 level has steps of 1/512: a fraction of 0.0007 would never round up."""
    n, plan = 400_000, a_plan(400_000, 16)
    middle = (plan.levels - 1) // 2
    for k in range(middle - 1, 0, -1):
        value = np.float32(k * plan.step)
        exact = Fraction(float(value)) * middle / Fraction(plan.value_range)
        if Fraction(5, 10_000) < exact - k < Fraction(9, 10_000):
            break
    expected = float(exact - k) * n
    levels = plan.quantize(np.full(n, value), np.random.default_rng(4)).levels
    assert abs(np.count_nonzero(levels == k + 1 + middle) - expected) < 5 * expected**0.5


def test_zero_stays_exactly_zero():
    plan = a_plan(1001)
    quantized = plan.quantize(np.zeros(1001, dtype=np.float32), np.random.default_rng())
    total = 5 * quantized.levels
    assert not plan.mean(total, 5).any()
    assert quantized.saturated == 0


def test_values_outside_the_range_are_limited_and_counted():
    plan = a_plan(4)
    update = np.array([0.1001, -5.0, 0.0999, 0.0], dtype=np.float32)
    quantized = plan.quantize(update, np.random.default_rng(0))
    assert quantized.saturated == 2
    assert quantized.levels[0] == plan.levels - 1
    assert quantized.levels[1] == 0
    assert plan.mean(quantized.levels, 1)[:2].tolist() == pytest.approx([0.1, -0.1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(bad):
    update = np.zeros(100, dtype=np.float32)
    update[7] = bad
    with pytest.raises(CryptoError, match="HE_NOT_FINITE"):
        a_plan().quantize(update, np.random.default_rng())


@pytest.mark.parametrize(
    "update", [np.zeros(99, np.float32), np.zeros(100, np.float64), np.zeros((10, 10), np.float32)]
)
def test_update_of_another_shape_or_type(update):
    with pytest.raises(CryptoError, match="HE_SHAPE"):
        a_plan().quantize(update, np.random.default_rng())


@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    bits=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_mean_is_that_of_the_sites_that_are_in(weights, bits, seed):
    rng = np.random.default_rng(seed)
    plan = a_plan(50, bits, total_weight=sum(weights) + 7)  # somebody of weight 7 is absent
    updates = (rng.standard_normal((len(weights), 50)) * 0.03).clip(-0.1, 0.1).astype(np.float32)
    sums = sum(w * plan.quantize(u, rng).levels for w, u in zip(weights, updates, strict=True))
    mean = plan.mean(sums, sum(weights))
    assert mean.dtype == np.float32
    true = np.average(updates.astype(np.float64), axis=0, weights=weights)
    assert np.abs(mean - true).max() <= plan.step * (1 + 1e-6)
    # The slow way, one value at a time, gives the same bits.
    middle = (plan.levels - 1) // 2
    slow = [np.float32(float(int(s) - sum(weights) * middle) * (plan.step / sum(weights))) for s in sums.tolist()]
    assert mean.tolist() == [float(v) for v in slow]


def test_levels_and_weight_outside_the_plan():
    plan = a_plan(3)
    for levels, weight in (([0, 0, 255], 1), ([-1, 0, 0], 1), ([0, 0, 0], 0), ([0, 0, 0], 6)):
        with pytest.raises(CryptoError, match="HE_RANGE"):
            plan.pack(np.array(levels), weight)
    with pytest.raises(CryptoError, match="HE_SHAPE"):
        plan.pack(np.zeros(4, np.int64), 1)


def test_sums_that_no_cohort_can_have_sent():
    odd = a_plan(2 * a_plan().per_slot + 1)  # the last digits of slots 1 and 2 are padding
    top = odd.pack(np.full(odd.n_values, odd.levels - 1), 2)
    assert odd.unpack(top, 2).max() == 2 * (odd.levels - 1)
    bad = {
        "a digit above what weight 1 can send": (top, 1),
        "a digit one above": (top + 1, 2),
        "something above the last digit": (top + odd.radix**odd.per_slot, 2),
        "padding that is not zero": (top + np.array([0, 0, odd.radix ** (odd.per_slot - 1)]), 2),
        "negative": (-top, 2),
        "too short": (top[:-1], 2),
        "too long": (np.append(top, 0), 2),
        "nobody": (np.zeros_like(top), 0),
        "more than everybody": (top, odd.total_weight + 1),
    }
    texts = set()
    for slots, weight in bad.values():
        with pytest.raises(CryptoError, match="ROUND_REJECTED") as caught:
            odd.unpack(slots, weight)
        texts.add(str(caught.value))
    assert len(texts) == 1, "the text must not say which check failed"
