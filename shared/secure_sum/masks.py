"""Pairwise masks modulo t: what a hospital that works with the server learns about another one is nothing.

All hospitals share the decryption key, so the server and one dishonest hospital together could decrypt a
single upload. Before encryption each site therefore adds, for every other site of the cohort, a stream that
only those two can compute: the one earlier in the roster adds it, the other subtracts it. In the sum of the
whole cohort the masks cancel exactly; any proper part of it stays uniform as long as two honest hospitals are
on different sides of the cut. Additive masking follows Bonawitz et al., CCS 2017, without its recovery
shares: when a site drops out, the round is attempted again with the smaller cohort and new masks of the same
update. The sum itself is still revealed, which is what differential privacy is for.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmedgan.shared.errors import CryptoError, MessageError, RunError
from fedmedgan.shared.secure_sum.quantize import BLOCK, PLAIN_MODULUS, Slots
from fedmedgan.shared.study import MIN_SITES


def mask(
    slots: Slots,
    *,
    site_index: int,
    cohort: tuple[int, ...],
    shared_secrets: Mapping[int, bytes],
    context: bytes,
) -> Slots:
    """Slots with this site's masks of this attempt, int64 (S,), each in [0, t).

    Args:
        slots: int64 (S,), each in [0, t), proof included.
        site_index: this site's place in the roster.
        cohort: places of all sites of this attempt, increasing, this one included.
        shared_secrets: place of a peer -> 32 bytes that only the two know (`HospitalKeys.shared_secret`).
        context: names study, key, round and attempt, so that no mask is ever used twice.

    | case | what happens |
    |---|---|
    | every site of the cohort is in the sum once | masks cancel exactly |
    | one is missing, or used another cohort, round, attempt or key | a uniform sum: ROUND_REJECTED |
    | fewer than three sites: each could subtract its own update | RUN_QUORUM |
    | this site is not in the cohort | MSG_SENDER |
    | the cohort is not increasing: a place twice, another order | MSG_FORMAT |
    | no secret with a peer | KEY_MISSING |

    Raises:
        RunError: RUN_QUORUM. MessageError: MSG_SENDER, MSG_FORMAT. CryptoError: KEY_MISSING, HE_RANGE.
    """
    if list(cohort) != sorted(set(cohort)):
        raise MessageError("MSG_FORMAT", "the cohort is not in the order of the roster")
    if len(cohort) < MIN_SITES:
        raise RunError("RUN_QUORUM", f"a cohort of {len(cohort)}")
    if site_index not in cohort:
        raise MessageError("MSG_SENDER", "this site is not in the cohort")
    if slots.min() < 0 or slots.max() >= PLAIN_MODULUS:
        raise CryptoError("HE_RANGE", "a slot is not in [0, t)")
    masked = slots.astype(np.int64)
    for peer in cohort:
        if peer == site_index:
            continue
        if peer not in shared_secrets:
            raise CryptoError("KEY_MISSING", "no shared secret with a site of the cohort", f"site {peer}")
        key = _pair_key(shared_secrets[peer], site_index, peer, cohort, context)
        # 46-bit values: 2^17 of them add up in int64 before one reduction is needed.
        combine = np.add if site_index < peer else np.subtract
        combine(masked, uniform_slots(key, slots.size), out=masked)
    masked %= PLAIN_MODULUS
    return masked


def _pair_key(secret: bytes, site: int, peer: int, cohort: tuple[int, ...], context: bytes) -> bytes:
    """Key of one pair's stream in one attempt: HKDF-SHA256 (RFC 5869), the same on both sides."""
    places = struct.pack(f"<III{len(cohort)}I", min(site, peer), max(site, peer), len(cohort), *cohort)
    info = b"fedmedgan/pair-mask/v1\0" + struct.pack("<I", len(context)) + context + places
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)


def uniform_slots(key: bytes, n: int, modulus: int = PLAIN_MODULUS) -> Slots:
    """n values uniform in [0, modulus), int64, from the AES-256-CTR stream of a key that is used once.

    Exactly uniform: values of modulus.bit_length() bits that are not below the modulus are drawn again, in
    order.
    """
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    bits = (1 << modulus.bit_length()) - 1
    values = np.empty(n, dtype=np.int64)
    for start in range(0, n, BLOCK):
        block = values[start : start + BLOCK]
        block[:] = np.frombuffer(stream.update(bytes(8 * block.size)), dtype="<i8") & bits
        again = np.flatnonzero(block >= modulus)
        while again.size:
            block[again] = np.frombuffer(stream.update(bytes(8 * again.size)), dtype="<i8") & bits
            again = again[block[again] >= modulus]
    return values
