"""Slots to ciphertexts and back: exact sums of real ciphertexts, no key at the server, hostile bytes."""

from __future__ import annotations

import hashlib
import os
import struct

import numpy as np
import psutil
import pytest
import tenseal
import tenseal.sealapi as sealapi
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmedgan.shared.errors import CryptoError
from fedmedgan.shared.secure_sum import cipher
from fedmedgan.shared.secure_sum.cipher import AddOnly, HospitalCipher, frame, refuse_keys, unframe
from fedmedgan.shared.secure_sum.quantize import PLAIN_MODULUS, SlotPlan
from fedmedgan.shared.study import MAX_SITES

N = cipher.RING_DEGREE
SECRET = cipher.new_secret()
HOSPITAL = HospitalCipher(SECRET)
BINDING = {"study_hash": "ab" * 32, "round": 3, "attempt": 1, "key_id": cipher.key_id(SECRET)}


def add(*uploads: list[bytes]) -> list[bytes]:
    total = AddOnly(len(uploads[0]))
    for blobs in uploads:
        total.add(blobs)
    return total.result()


def any_slots(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, PLAIN_MODULUS, n)


# ---- exactness


@given(n_slots=st.integers(1, 9000), n_sites=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_sum_of_uniform_slots_is_exact(n_slots, n_sites, seed):
    vectors = [any_slots(n_slots, seed * 100 + i) for i in range(n_sites)]
    total = HOSPITAL.decrypt(add(*map(HOSPITAL.encrypt, vectors)), n_slots)
    assert total.dtype == np.int64
    assert np.array_equal(total, sum(vectors) % PLAIN_MODULUS)


@given(
    n_values=st.sampled_from([1, 2, 3, 4095, 4097, 12_287, 16_385]),
    bits=st.integers(4, 16),
    weights=st.lists(st.integers(1, 30), min_size=3, max_size=10),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=15)
def test_updates_of_a_cohort_end_to_end(n_values, bits, weights, seed):
    rng = np.random.default_rng(seed)
    plan = SlotPlan(n_values, bits, 0.1, sum(weights))
    updates = (rng.standard_normal((len(weights), n_values)) * 0.05).astype(np.float32)
    levels = [plan.quantize(u, rng).levels for u in updates]
    cohort = range(len(weights) - 1)  # the last site dropped out
    total = add(*(HOSPITAL.encrypt(plan.pack(levels[i], weights[i])) for i in cohort))
    sums = plan.unpack(HOSPITAL.decrypt(total, plan.n_slots), sum(weights[:-1]))
    slow = [sum(weights[i] * int(levels[i][p]) for i in cohort) for p in range(n_values)]
    assert sums.tolist() == slow


def test_one_ciphertext_added_to_itself_100_times_is_exact():
    """The worst a server can do within its bound: noise that adds up in one direction."""
    slots = np.concatenate((any_slots(N), [0, 1, PLAIN_MODULUS - 1]))
    blobs = HOSPITAL.encrypt(slots)
    total = AddOnly(2)
    for _ in range(MAX_SITES):
        total.add(blobs)
    assert np.array_equal(HOSPITAL.decrypt(total.result(), slots.size), 100 * slots % PLAIN_MODULUS)
    with pytest.raises(CryptoError, match="HE_SHAPE"):
        total.add(blobs)


def test_a_hundred_sites_with_extreme_slots_are_exact():
    slots = np.full(N, PLAIN_MODULUS - 1)
    total = add(*(HOSPITAL.encrypt(slots) for _ in range(MAX_SITES)))
    assert (HOSPITAL.decrypt(total, N) == PLAIN_MODULUS - 100).all()


def test_bytes_of_a_ciphertext():
    blobs = HOSPITAL.encrypt(any_slots(N + 1))
    assert [len(b) for b in blobs] == [32_972, 32_972]
    assert [len(b) for b in add(blobs, blobs)] == [65_659, 65_659]
    assert HOSPITAL.encrypt(any_slots(N)) != HOSPITAL.encrypt(any_slots(N)), "encryption is randomised"


def test_nothing_is_printed(capfd):
    HOSPITAL.decrypt(add(HOSPITAL.encrypt(any_slots(3 * N))), 3 * N)
    assert capfd.readouterr() == ("", "")


# ---- the hospital


@pytest.mark.parametrize(
    ("slots", "code"),
    [
        (np.array([-1]), "HE_RANGE"),
        (np.array([PLAIN_MODULUS]), "HE_RANGE"),
        (np.array([0, 2**62]), "HE_RANGE"),
        (np.array([1.7]), "HE_RANGE"),
        (np.array([], dtype=np.int64), "HE_SHAPE"),
        (np.zeros((2, 2), dtype=np.int64), "HE_SHAPE"),
    ],
)
def test_slots_that_seal_would_wrap_or_cut(slots, code):
    with pytest.raises(CryptoError, match=code):
        HOSPITAL.encrypt(slots)


def test_another_key_decrypts_to_other_numbers_without_complaint():
    """Why `proof` exists: BFV itself does not tell."""
    slots = any_slots(10)
    other = HospitalCipher(cipher.new_secret())
    assert not np.array_equal(other.decrypt(add(HOSPITAL.encrypt(slots)), 10), slots)


@pytest.mark.parametrize("secret", [b"", b"abc", SECRET[:-1], SECRET[: len(SECRET) // 2], bytes(46_258)])
def test_not_a_secret_key(secret):
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        HospitalCipher(secret)


def test_key_id_names_the_key():
    assert cipher.key_id(SECRET) == cipher.key_id(SECRET)
    assert cipher.key_id(SECRET) != cipher.key_id(cipher.new_secret())
    assert len(bytes.fromhex(cipher.key_id(SECRET))) == 16


def test_another_number_of_ciphertexts():
    blobs = HOSPITAL.encrypt(any_slots(N))
    for n_slots in (0, N + 1):
        with pytest.raises(CryptoError, match="HE_SHAPE"):
            HOSPITAL.decrypt(blobs, n_slots)
    total = AddOnly(2)
    for wrong in ([], blobs, 3 * blobs):
        with pytest.raises(CryptoError, match="HE_SHAPE"):
            total.add(wrong)


# ---- the server


def test_security_level_is_enforced():
    """Third-party behaviour that is relied on: SEAL says that 110 bits are too many for N = 4096."""
    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
    parameters.set_poly_modulus_degree(N)
    parameters.set_coeff_modulus(sealapi.CoeffModulus.Create(N, [60, 50]))
    parameters.set_plain_modulus(PLAIN_MODULUS)
    assert not sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128).parameters_set()
    assert sum(cipher.COEFF_MODULUS_BITS) <= sealapi.CoeffModulus.MaxBitCount(N, sealapi.SEC_LEVEL_TYPE.TC128)


def test_memory_of_the_sum_does_not_grow():
    blobs = HOSPITAL.encrypt(any_slots(64 * N))  # 4 MiB expanded
    total, process = AddOnly(64), psutil.Process()
    for _ in range(3):
        total.add(blobs)
    before = process.memory_info().rss
    for _ in range(60):
        total.add(blobs)
    assert process.memory_info().rss - before < 8 << 20


def an_evaluator() -> sealapi.Evaluator:
    return sealapi.Evaluator(cipher._context())


def changed(blob: bytes, change: str) -> bytes:
    """A ciphertext as a dishonest party could make it."""
    context = cipher._context()
    with cipher._Scratch() as scratch:
        item = scratch.load(sealapi.Ciphertext(context), blob)
        if change == "negated":
            an_evaluator().negate_inplace(item)
        elif change == "three polynomials":
            an_evaluator().square_inplace(item)
        elif change == "transparent":
            item = sealapi.Ciphertext(context)
            item.resize(context, context.first_parms_id(), 2)
        made = scratch.save(item)
        # SEAL itself takes all of these: only our own check refuses them.
        scratch.load(sealapi.Ciphertext(context), made)
        return made


def foreign(scheme: sealapi.SCHEME_TYPE, degree: int, bits: list[int], plain_bits: int = 0) -> bytes:
    """A ciphertext of other parameters."""
    parameters = sealapi.EncryptionParameters(scheme)
    parameters.set_poly_modulus_degree(degree)
    parameters.set_coeff_modulus(sealapi.CoeffModulus.Create(degree, bits))
    if plain_bits:
        parameters.set_plain_modulus(sealapi.PlainModulus.Batching(degree, plain_bits))
    context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    encryptor = sealapi.Encryptor(context, sealapi.KeyGenerator(context).secret_key())
    with cipher._Scratch() as scratch:
        return scratch.save(encryptor.encrypt_zero_symmetric())


def bad_blobs() -> dict[str, bytes]:
    good = HOSPITAL.encrypt(any_slots(N))[0]
    return {
        "empty": b"",
        "random": os.urandom(len(good)),
        "cut": good[:-1],
        "half": good[: len(good) // 2],
        "other modulus": foreign(sealapi.SCHEME_TYPE.BFV, N, [36, 36, 37], 46),
        "other plain modulus": foreign(sealapi.SCHEME_TYPE.BFV, N, [60, 20], 45),
        "other degree": foreign(sealapi.SCHEME_TYPE.BFV, 8192, [60, 20], 46),
        "CKKS": foreign(sealapi.SCHEME_TYPE.CKKS, N, [60, 20]),
        "three polynomials": changed(good, "three polynomials"),
        "transparent": changed(good, "transparent"),
        "secret key": SECRET,
    }


@pytest.mark.parametrize("name", bad_blobs())
def test_bad_ciphertext_is_refused_and_the_sum_is_as_before(name):
    slots = any_slots(2 * N)
    total = AddOnly(2)
    total.add(HOSPITAL.encrypt(slots))
    good = HOSPITAL.encrypt(any_slots(N))[0]
    bad = bad_blobs()[name]
    with pytest.raises(CryptoError, match="HE_PARAMS_MISMATCH"):
        total.add([good, bad])
    with pytest.raises(CryptoError, match="HE_PARAMS_MISMATCH"):
        HOSPITAL.decrypt([good, bad], 2 * N)
    assert total.count == 1
    assert np.array_equal(HOSPITAL.decrypt(total.result(), 2 * N), slots)


def test_an_upload_that_cancels_the_sum_is_refused_and_the_sum_is_as_before():
    slots = any_slots(2 * N)
    total = AddOnly(2)
    blobs = HOSPITAL.encrypt(slots)
    total.add(blobs)
    with pytest.raises(CryptoError, match="ROUND_REJECTED"):
        total.add([HOSPITAL.encrypt(any_slots(N))[0], changed(blobs[1], "negated")])
    assert np.array_equal(HOSPITAL.decrypt(total.result(), 2 * N), slots)


def test_a_sum_of_nothing():
    with pytest.raises(CryptoError, match="HE_CT_EMPTY"):
        AddOnly(1).result()
    with pytest.raises(CryptoError, match="HE_SHAPE"):
        AddOnly(0)


def test_flipped_ciphertexts_never_crash_a_parser():
    good = HOSPITAL.encrypt(any_slots(N))[0]
    rng, codes = np.random.default_rng(1), set()
    for _ in range(300):
        raw = bytearray(good)
        place = int(rng.choice([rng.integers(len(raw)), rng.integers(150)]))
        raw[place] ^= 1 << int(rng.integers(8))
        try:
            HOSPITAL.decrypt(add([bytes(raw)]), N)
        except CryptoError as error:
            codes.add(error.code)
    assert codes == {"HE_PARAMS_MISMATCH"}


def test_the_server_refuses_every_context_with_a_key():
    context = tenseal.context(tenseal.SCHEME_TYPE.BFV, N, plain_modulus=PLAIN_MODULUS, coeff_mod_bit_sizes=[60, 20])
    nothing = dict.fromkeys(("save_public_key", "save_secret_key", "save_galois_keys", "save_relin_keys"), False)
    refuse_keys(context.serialize(**nothing))  # parameters only
    for key in ("save_public_key", "save_secret_key", "save_relin_keys"):
        with pytest.raises(CryptoError, match="HE_SECRET_AT_SERVER"):
            refuse_keys(context.serialize(**{**nothing, key: True}))
    with pytest.raises(CryptoError, match="HE_SECRET_AT_SERVER"):
        refuse_keys(SECRET)


def test_the_server_refuses_what_is_not_our_context():
    other = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40])
    parameters = other.serialize(save_public_key=False, save_relin_keys=False)
    for data in (b"", b"abc", os.urandom(84), parameters):
        with pytest.raises(CryptoError, match="HE_PARAMS_MISMATCH"):
            refuse_keys(data)


# ---- the frame


def a_frame(n_blobs: int = 2) -> tuple[list[bytes], bytes]:
    blobs = HOSPITAL.encrypt(any_slots(n_blobs * N))
    return blobs, frame(blobs, kind="update", **BINDING)


def opened(data: bytes, **change) -> list[bytes]:
    return unframe(data, **{**BINDING, "kind": "update", "n_blobs": 2, **change})


def test_frame_carries_the_ciphertexts():
    blobs, data = a_frame()
    assert opened(data) == blobs
    assert len(data) - sum(map(len, blobs)) < 200, "the frame costs next to nothing"
    assert len(data) <= cipher.max_frame_bytes(2, "update")
    total = add(blobs, blobs)
    assert opened(frame(total, kind="sum", **BINDING), kind="sum") == total


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"study_hash": "cd" * 32}, "HE_CT_STUDY"),
        ({"round": 4}, "HE_CT_STUDY"),
        ({"attempt": 2}, "HE_CT_STUDY"),
        ({"key_id": "00" * 16}, "HE_CT_STUDY"),
        ({"kind": "sum"}, "HE_CT_STUDY"),
        ({"n_blobs": 1}, "HE_SHAPE"),
        ({"n_blobs": 3}, "HE_SHAPE"),
    ],
)
def test_frame_of_something_else(change, code):
    with pytest.raises(CryptoError, match=code):
        opened(a_frame()[1], **change)


def redigested(body: bytes) -> bytes:
    """What a sender could make who lies and computes the digest of the lie."""
    return body + hashlib.sha256(body).digest()


def test_damaged_frames():
    blobs, data = a_frame()
    body, lengths_at = data[:-32], cipher._HEADER.size

    def lying(*lengths: int) -> bytes:
        return redigested(body[:lengths_at] + struct.pack("<II", *lengths) + body[lengths_at + 8 :])

    bad = {
        "empty": (b"", "HE_CT_EMPTY"),
        "one byte": (b"\0", "HE_CT_SIZE"),
        "random": (os.urandom(len(data)), "HE_CT_HASH"),
        "cut by one": (data[:-1], "HE_CT_SIZE"),
        "half": (data[: len(data) // 2], "HE_CT_SIZE"),
        "header only": (data[: lengths_at + 33], "HE_CT_SIZE"),
        "padded": (data + b"\0", "HE_CT_SIZE"),
        "two in one": (data + data, "HE_CT_SIZE"),
        "lengths that do not add up": (lying(len(blobs[0]), len(blobs[1]) - 1), "HE_CT_SIZE"),
        "huge lengths": (lying(2**32 - 1, 2**32 - 1), "HE_CT_SIZE"),
        "right by overflow": (lying(2**32 - 1, 2 * len(blobs[0]) + 1), "HE_CT_SIZE"),
        "a large ciphertext": (frame([bytes(99_999), blobs[1]], kind="update", **BINDING), "HE_CT_SIZE"),
        "a full one for a seeded one": (frame(add(blobs), kind="update", **BINDING), "HE_CT_SIZE"),
        "a small ciphertext": (frame([b"", blobs[1]], kind="update", **BINDING), "HE_CT_SIZE"),
        "swapped": (body[: lengths_at + 8] + blobs[1] + blobs[0] + data[-32:], "HE_CT_HASH"),
        "version": (redigested(body[:8] + b"\x02" + body[9:]), "HE_PARAMS_MISMATCH"),
        "parameters": (redigested(body[:12] + bytes(16) + body[28:]), "HE_PARAMS_MISMATCH"),
    }
    for name, (raw, code) in bad.items():
        with pytest.raises(CryptoError) as caught:
            opened(raw)
        assert caught.value.code == code, name


def test_a_boundary_moved_by_a_byte_is_refused_by_the_parser():
    """The one lie that a frame cannot see: every length in its bounds, and their sum right."""
    joined = b"".join(a_frame()[0])
    middle = len(joined) // 2 + 1
    moved = opened(frame([joined[:middle], joined[middle:]], kind="update", **BINDING))
    with pytest.raises(CryptoError, match="HE_PARAMS_MISMATCH"):
        AddOnly(2).add(moved)


@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=300)
def test_no_flipped_bit_is_accepted(place, bit):
    data = bytearray(FRAME)
    place %= 400 if place % 2 else len(data)
    data[place] ^= 1 << bit
    with pytest.raises(CryptoError):
        opened(bytes(data))


FRAME = a_frame()[1]


@pytest.mark.parametrize("change", [{"study_hash": "ab"}, {"study_hash": "xy" * 32}, {"key_id": "abc"}, {"round": -1}])
def test_binding_that_does_not_fit_its_field(change):
    with pytest.raises(CryptoError, match="HE_CT_STUDY"):
        frame([b"x"], kind="update", **{**BINDING, **change})
    with pytest.raises(CryptoError, match="HE_CT_STUDY"):
        opened(FRAME, **change)
