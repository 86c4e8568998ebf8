"""Pairwise masks: exact cancelling in the whole cohort, and nothing to see in any part of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmedgan.shared.errors import CryptoError, MessageError, RunError
from fedmedgan.shared.secure_sum import masks, proof
from fedmedgan.shared.secure_sum.cipher import AddOnly, HospitalCipher, new_secret
from fedmedgan.shared.secure_sum.keys import generate_identity
from fedmedgan.shared.secure_sum.quantize import PLAIN_MODULUS

SITES = [generate_identity() for _ in range(6)]
SECRETS = [{j: a.shared_secret(b.exchange_public) for j, b in enumerate(SITES) if j != i} for i, a in enumerate(SITES)]
CONTEXT = b"study|key|7|1"


def masked(slots: np.ndarray, site: int, cohort: tuple[int, ...], context: bytes = CONTEXT) -> np.ndarray:
    return masks.mask(slots, site_index=site, cohort=cohort, shared_secrets=SECRETS[site], context=context)


def chi_square(values: np.ndarray, modulus: int = PLAIN_MODULUS, bins: int = 64) -> float:
    """Of 63 degrees of freedom: above 150 by chance once in 10^8 times."""
    counts = np.bincount((values.astype(object) * bins // modulus).astype(int), minlength=bins)
    return float(((counts - values.size / bins) ** 2 / (values.size / bins)).sum())


@given(
    cohort=st.sets(st.integers(0, 5), min_size=3).map(lambda s: tuple(sorted(s))),
    n=st.integers(1, 300),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_masks_cancel_exactly(cohort, n, seed):
    slots = np.random.default_rng(seed).integers(0, PLAIN_MODULUS, (6, n))
    total = sum(masked(slots[i], i, cohort) for i in cohort) % PLAIN_MODULUS
    assert np.array_equal(total, slots[list(cohort)].sum(axis=0) % PLAIN_MODULUS)


def test_masks_cancel_under_encryption():
    rng, hospital = np.random.default_rng(0), HospitalCipher(new_secret())
    slots, cohort = rng.integers(0, PLAIN_MODULUS, (6, 5000)), (0, 2, 3, 5)
    total = AddOnly(2)
    for i in cohort:
        total.add(hospital.encrypt(masked(slots[i], i, cohort)))
    opened = hospital.decrypt(total.result(), 5000)
    assert np.array_equal(opened, slots[list(cohort)].sum(axis=0) % PLAIN_MODULUS)


def test_what_the_server_and_one_hospital_see_of_another_is_uniform():
    """Site 0's all-zero vector; site 1 helps the server and takes its mask away; site 2's remains."""
    zero, cohort = np.zeros(20_000, dtype=np.int64), (0, 1, 2)
    seen = masked(zero, 0, cohort)
    key = masks._pair_key(SECRETS[1][0], 1, 0, cohort, CONTEXT)
    seen = (seen - masks.uniform_slots(key, zero.size)) % PLAIN_MODULUS
    assert chi_square(seen) < 150
    assert np.unique(seen).size == seen.size
    # Without masks the same test fails loudly.
    assert chi_square(zero) > 1000


def test_part_of_a_cohort_is_uniform():
    zero, cohort = np.zeros(20_000, dtype=np.int64), (0, 1, 2, 3)
    part = sum(masked(zero, i, cohort) for i in (0, 1, 3)) % PLAIN_MODULUS
    assert chi_square(part) < 150


@pytest.mark.parametrize(
    ("cohort", "context"), [((0, 1, 2, 3), CONTEXT), ((0, 1, 2), b"study|key|7|2"), ((0, 1, 2), b"")]
)
def test_masks_of_another_attempt_do_not_cancel(cohort, context):
    zero = np.zeros(500, dtype=np.int64)
    total = masked(zero, 0, (0, 1, 2)) + masked(zero, 1, (0, 1, 2)) + masked(zero, 2, cohort, context)
    total %= PLAIN_MODULUS
    assert np.count_nonzero(total) == 500


def test_two_cohorts_of_one_attempt_share_no_stream():
    """Else a server that opens an attempt twice could take one upload from the other and find masks gone."""
    streams = {masks._pair_key(SECRETS[0][1], 0, 1, cohort, CONTEXT) for cohort in ((0, 1, 2), (0, 1, 3))}
    assert len(streams) == 2


def test_a_sum_with_one_hospital_missing_does_not_open():
    key, cohort = b"k" * 32, (0, 1, 2)
    sealed = [proof.seal(np.arange(50), n_sites=3, site_index=i, weight=1, mac_key=key) for i in cohort]
    hidden = [masked(vector, i, cohort) for i, vector in enumerate(sealed)]
    how = {"n_sites": 3, "mac_key": key}
    whole = proof.open_sum(sum(hidden) % PLAIN_MODULUS, weights={0: 1, 1: 1, 2: 1}, **how)
    assert whole.tolist() == [3 * i for i in range(50)]
    with pytest.raises(CryptoError, match="ROUND_REJECTED"):
        proof.open_sum(sum(hidden[:2]) % PLAIN_MODULUS, weights={0: 1, 1: 1}, **how)


@given(modulus=st.sampled_from([1, 2, 3, 5, 2**45 + 1, 2**46 - 1, PLAIN_MODULUS]), n=st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_stream_is_below_any_modulus_and_repeats(modulus, n):
    key = b"x" * 32
    values = masks.uniform_slots(key, n, modulus)
    assert values.shape == (n,)
    assert values.dtype == np.int64
    assert values.min() >= 0
    assert values.max() < modulus
    assert np.array_equal(values, masks.uniform_slots(key, n, modulus))


@pytest.mark.parametrize("modulus", [3, 2**45 + 1, PLAIN_MODULUS])
def test_stream_is_uniform_where_half_of_the_draws_are_rejected(modulus):
    """2^45 + 1 rejects nearly half, t about one of 10^8: the same code, tried where it works hardest."""
    values = masks.uniform_slots(b"y" * 32, 60_000, modulus)
    bins = min(64, modulus)
    assert chi_square(values, modulus, bins) < 150


def test_bad_cohorts():
    slots = np.array([1])
    with pytest.raises(RunError, match="RUN_QUORUM"):
        masked(slots, 0, (0, 1))
    with pytest.raises(MessageError, match="MSG_SENDER"):
        masked(slots, 0, (1, 2, 3))
    for cohort in ((2, 1, 0), (0, 0, 1, 2)):
        with pytest.raises(MessageError, match="MSG_FORMAT"):
            masked(slots, 0, cohort)
    with pytest.raises(CryptoError, match="KEY_MISSING"):
        masked(slots, 0, (0, 1, 7))
    for slot in (-1, PLAIN_MODULUS):
        with pytest.raises(CryptoError, match="HE_RANGE"):
            masked(np.array([slot]), 0, (0, 1, 2))
