"""The proof inside the plaintext: everything that a server can do to real ciphertexts is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tenseal.sealapi as sealapi
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmedgan.shared.errors import CryptoError
from fedmedgan.shared.secure_sum import cipher, proof
from fedmedgan.shared.secure_sum.cipher import AddOnly, HospitalCipher
from fedmedgan.shared.secure_sum.quantize import PLAIN_MODULUS, SlotPlan
from fedmedgan.shared.study import from_dict

N_SITES, P = 4, 9000
WEIGHTS = [1, 2, 1, 3]
PLAN = SlotPlan(P, 16, 0.1, sum(WEIGHTS))
N_SLOTS = PLAN.n_slots + proof.extra_slots(N_SITES)
COHORT = {0: 1, 1: 2, 2: 1}  # site 3 dropped out
SECRET, ROOT = cipher.new_secret(), b"r" * 32
HOSPITAL, STRANGER = HospitalCipher(SECRET), HospitalCipher(cipher.new_secret())
KEY_ID, STUDY = cipher.key_id(SECRET), "ab" * 32


def mac_key(round: int = 7, attempt: int = 1) -> bytes:
    return proof.derive_mac_key(ROOT, STUDY, KEY_ID, round, attempt)


def levels(site: int, round: int = 7) -> np.ndarray:
    return np.random.default_rng([site, round]).integers(0, PLAN.levels, P)


def sealed(site: int, round: int = 7, attempt: int = 1, weight: int = 0) -> np.ndarray:
    weight = weight or WEIGHTS[site]
    packed = PLAN.pack(levels(site, round), weight)
    key = mac_key(round, attempt)
    return proof.seal(packed, n_sites=N_SITES, site_index=site, weight=weight, mac_key=key)


def upload(site: int, **how: int) -> list[bytes]:
    return HOSPITAL.encrypt(sealed(site, **how))


def add(*uploads: list[bytes]) -> list[bytes]:
    total = AddOnly(len(uploads[0]))
    for blobs in uploads:
        total.add(blobs)
    return total.result()


def open_(blobs: list[bytes]) -> np.ndarray:
    """What a hospital does: data slots, or CryptoError."""
    total = HOSPITAL.decrypt(blobs, N_SLOTS)
    return proof.open_sum(total, n_sites=N_SITES, weights=COHORT, mac_key=mac_key())


def with_change(blobs: list[bytes], changes: dict[int, int]) -> list[bytes]:
    """Add numbers to slots of encrypted vectors, as the server can without any key."""
    delta = np.zeros(len(blobs) * cipher.RING_DEGREE, dtype=np.int64)
    for slot, change in changes.items():
        delta[slot] = change % PLAIN_MODULUS
    context, plain, out = cipher._context(), sealapi.Plaintext(), []
    evaluator, encoder = sealapi.Evaluator(context), sealapi.BatchEncoder(context)
    with cipher._Scratch() as scratch:
        for blob, row in zip(blobs, delta.reshape(len(blobs), -1), strict=True):
            item = scratch.load_ciphertext(blob)
            encoder.encode(row.tolist(), plain)
            evaluator.add_plain_inplace(item, plain)
            out.append(scratch.save(item))
    return out


def scaled(blobs: list[bytes], by: int) -> list[bytes]:
    """Every slot times a number, without any key."""
    context, plain, out = cipher._context(), sealapi.Plaintext(), []
    evaluator, encoder = sealapi.Evaluator(context), sealapi.BatchEncoder(context)
    encoder.encode([by] * cipher.RING_DEGREE, plain)
    with cipher._Scratch() as scratch:
        for blob in blobs:
            item = scratch.load_ciphertext(blob)
            evaluator.multiply_plain_inplace(item, plain)
            out.append(scratch.save(item))
    return out


def flipped(blobs: list[bytes]) -> list[bytes]:
    """One bit of one coefficient; which is still a ciphertext."""
    raw = bytearray(blobs[0])
    raw[20_000] ^= 4
    return [bytes(raw), *blobs[1:]]


PRESENCE = PLAN.n_slots  # slot of site 0's presence
TAGS = PRESENCE + N_SITES


def honest() -> list[bytes]:
    return add(*(upload(i) for i in COHORT))


def zeros() -> list[bytes]:
    return add(HOSPITAL.encrypt(np.zeros(N_SLOTS, dtype=np.int64)))


# name -> (what is sent instead of the honest sum, which check alone finds it)
MANIPULATIONS: dict[str, tuple[Callable[[], list[bytes]], str]] = {
    "one added to a weight": (lambda: with_change(honest(), {5: 1}), "tags"),
    "one taken from the last weight": (lambda: with_change(honest(), {PRESENCE - 1: -1}), "tags"),
    "a change that is undone in another slot": (lambda: with_change(honest(), {5: 1, 6: -1}), "tags"),
    "a tag changed": (lambda: with_change(honest(), {TAGS: 1}), "tags"),
    "a hospital left out": (lambda: add(upload(0), upload(1)), "presence"),
    "a hospital counted twice": (lambda: add(*(upload(i) for i in (0, 1, 2, 1))), "presence"),
    "one left out, another of equal weight twice": (lambda: add(upload(0), upload(1), upload(0)), "presence"),
    "a hospital that is not in the cohort": (lambda: add(*(upload(i) for i in range(4))), "presence"),
    "another weight than agreed": (lambda: add(upload(0), upload(1), upload(2, weight=3)), "presence"),
    "the whole sum twice": (lambda: add(honest_upload(), honest_upload()), "presence"),
    "the sum times five": (lambda: scaled(honest(), 5), "presence"),
    "all zero": (zeros, "both"),
    "left out, and presence forged": (
        lambda: with_change(add(upload(0), upload(1)), {PRESENCE + 2: 1}),
        "tags",
    ),
    "last round's sum": (lambda: add(*(upload(i, round=6) for i in COHORT)), "tags"),
    "the sum of an earlier attempt": (lambda: add(*(upload(i, attempt=2) for i in COHORT)), "tags"),
    "one hospital's update of last round": (lambda: add(upload(0), upload(1), upload(2, round=6)), "tags"),
    "an upload under another key": (
        lambda: add(upload(0), upload(1), STRANGER.encrypt(sealed(2))),
        "both",
    ),
    "ciphertexts swapped": (lambda: honest()[::-1], "both"),
    "first ciphertext in place of the last": (lambda: [honest()[0]] * 2, "both"),
    "ciphertexts of two rounds mixed": (
        lambda: [add(*(upload(i, round=6) for i in COHORT))[0], honest()[1]],
        "tags",
    ),
    "a bit flipped in the sum": (lambda: flipped(honest()), "both"),
    "a bit flipped in one upload": (lambda: add(flipped(upload(0)), upload(1), upload(2)), "both"),
}


def honest_upload() -> list[bytes]:
    """The honest sum once more, as a seeded upload of somebody who has the key."""
    return HOSPITAL.encrypt(sum(sealed(i) for i in COHORT) % PLAIN_MODULUS)


def true_sums() -> np.ndarray:
    return sum(WEIGHTS[i] * levels(i) for i in COHORT)


def test_the_honest_sum_is_opened():
    sums = PLAN.unpack(open_(honest()), sum(COHORT.values()))
    assert np.array_equal(sums, true_sums())


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_manipulation_is_refused(name):
    with pytest.raises(CryptoError) as caught:
        open_(MANIPULATIONS[name][0]())
    assert str(caught.value) == str(CryptoError("ROUND_REJECTED", proof.REJECTED)), "no slot, no site, no reason"


@pytest.mark.parametrize("name", [n for n, (_, check) in MANIPULATIONS.items() if check == "tags"])
def test_without_tags_the_manipulation_would_go_through(name, monkeypatch):
    """So the refusal above is the work of the tags and of nothing else."""
    total = HOSPITAL.decrypt(MANIPULATIONS[name][0](), N_SLOTS)
    monkeypatch.setattr(proof, "_tags", lambda body, key: total[-proof.N_TAGS :])
    proof.open_sum(total, n_sites=N_SITES, weights=COHORT, mac_key=mac_key())


@pytest.mark.parametrize("name", [n for n, (_, check) in MANIPULATIONS.items() if check == "presence"])
def test_without_presence_the_manipulation_would_go_through(name):
    """Its tags are right, and it says who is in it: somebody else than the cohort."""
    total = HOSPITAL.decrypt(MANIPULATIONS[name][0](), N_SLOTS)
    present = {i: int(w) for i, w in enumerate(total[PRESENCE:TAGS]) if w}
    assert present != COHORT
    proof.open_sum(total, n_sites=N_SITES, weights=present, mac_key=mac_key())


def test_without_the_proof_a_changed_sum_would_become_the_model():
    """The digits of a sum with one added are as good as any: only the proof tells."""
    blobs = with_change(honest(), {5: 1})
    unchecked = HOSPITAL.decrypt(blobs, N_SLOTS)[: PLAN.n_slots]
    sums = PLAN.unpack(unchecked, sum(COHORT.values()))
    assert np.abs(sums - true_sums()).sum() == 1


@given(
    slots=st.lists(st.integers(0, PLAIN_MODULUS - 1), min_size=1, max_size=40),
    place=st.integers(0, 1000),
    change=st.integers(1, PLAIN_MODULUS - 1),
    sites=st.integers(1, 6),
)
@settings(deadline=None, max_examples=200)
def test_any_change_of_any_slot_is_refused(slots, place, change, sites):
    vector = proof.seal(np.array(slots), n_sites=sites, site_index=sites - 1, weight=3, mac_key=mac_key())
    how = {"n_sites": sites, "weights": {sites - 1: 3}, "mac_key": mac_key()}
    assert proof.open_sum(vector, **how).tolist() == slots
    vector[place % vector.size] = (int(vector[place % vector.size]) + change) % PLAIN_MODULUS
    with pytest.raises(CryptoError, match="ROUND_REJECTED"):
        proof.open_sum(vector, **how)


@given(st.lists(st.sampled_from([0, 1, 2**23, 2**46 - 2**24, PLAIN_MODULUS - 1]), min_size=1, max_size=50))
@settings(deadline=None, max_examples=50)
def test_tags_are_what_big_integers_say(body):
    alphas = np.concatenate(list(proof._coefficients(mac_key(), len(body))), axis=1)
    assert alphas.shape == (proof.N_TAGS, len(body))
    slow = [sum(int(a) * v for a, v in zip(row, body, strict=True)) % PLAIN_MODULUS for row in alphas]
    assert proof._tags(np.array(body), mac_key()).tolist() == slow


def test_tags_of_a_long_vector_of_largest_values(monkeypatch):
    n = 3 * proof.BLOCK + 5
    largest = [np.full((proof.N_TAGS, size), 2**16 - 1) for size in [proof.BLOCK] * 3 + [5]]
    monkeypatch.setattr(proof, "_coefficients", lambda key, n: largest)
    tags = proof._tags(np.full(n, PLAIN_MODULUS - 1), mac_key())
    assert tags.tolist() == [(2**16 - 1) * (PLAIN_MODULUS - 1) * n % PLAIN_MODULUS] * proof.N_TAGS


def test_every_slot_of_a_long_vector_counts():
    n = 2 * proof.BLOCK + 3
    zero = proof._tags(np.zeros(n, dtype=np.int64), mac_key())
    for place in (0, proof.BLOCK - 1, proof.BLOCK, 2 * proof.BLOCK, n - 1):
        body = np.zeros(n, dtype=np.int64)
        body[place] = 1
        assert (proof._tags(body, mac_key()) != zero).any()


def test_coefficients_are_uniform_16_bit():
    drawn = np.concatenate(list(proof._coefficients(mac_key(), 100_000)), axis=1)
    assert (drawn.min(), drawn.max()) == (0, 2**16 - 1)
    counts = np.bincount(drawn.reshape(-1) >> 8, minlength=256)
    expected = drawn.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 350  # chi-square with 255 degrees: p = 7e-5


def test_every_binding_gives_another_key():
    base = (ROOT, STUDY, KEY_ID, 7, 1)
    keys = {proof.derive_mac_key(*base)}
    for place, other in enumerate((b"s" * 32, "cd" * 32, "00" * 16, 71, 2)):
        changed = list(base)
        changed[place] = other
        keys.add(proof.derive_mac_key(*changed))
    keys.add(proof.derive_mac_key(ROOT, STUDY, KEY_ID, 1, 71))
    assert len(keys) == 7
    assert {len(k) for k in keys} == {32}


@pytest.mark.parametrize("change", [{"site_index": 4}, {"site_index": -1}, {"weight": 0}])
def test_seal_outside_its_range(change):
    how = {"n_sites": 4, "site_index": 0, "weight": 1, "mac_key": mac_key(), **change}
    with pytest.raises(CryptoError, match="HE_RANGE"):
        proof.seal(np.array([1]), **how)
    for slot in (-1, PLAIN_MODULUS):
        with pytest.raises(CryptoError, match="HE_RANGE"):
            proof.seal(np.array([slot]), **{**how, "site_index": 0, "weight": 1})


@pytest.mark.parametrize("weights", [{}, {0: 0}, {9: 1}, {-1: 1}])
def test_a_cohort_that_cannot_be(weights):
    zero = np.zeros(20, dtype=np.int64)
    with pytest.raises(CryptoError, match="ROUND_REJECTED"):
        proof.open_sum(zero, n_sites=4, weights=weights, mac_key=mac_key())


@pytest.mark.parametrize("size", [0, 1, 8])
def test_a_vector_without_room_for_data(size):
    with pytest.raises(CryptoError, match="ROUND_REJECTED"):
        proof.open_sum(np.zeros(size, dtype=np.int64), n_sites=4, weights={0: 1}, mac_key=mac_key())


def test_the_server_knows_how_many_ciphertexts_to_expect():
    sites = [{"name": f"site-{i}", "patients": 100} for i in range(3)]
    study = from_dict({"name": "a", "sites": sites})
    assert proof.update_blobs(study, 1) == 1
    # 8 bits, weights of 3 in all: 4 values a slot. 4096 slots less 3 for presence and 4 for tags.
    assert proof.update_blobs(study, 4 * 4089) == 1
    assert proof.update_blobs(study, 4 * 4089 + 1) == 2
