"""Was this really the sum of us? A linear MAC and presence slots, inside the plaintext.

BFV ciphertexts are malleable: the server, or anybody on the way, could add to a sum, leave a hospital out,
count one twice, or send last round's sum. So a hospital appends to its data slots

    presence   one slot a site: its own integer weight in its own slot, 0 elsewhere
    tags       four slots: tag_r = sum_i alpha_{r,i} * body_i mod t, body = data and presence, r = 1..4

where the coefficients alpha come from a key that only hospitals know, fresh for every round and attempt.
Everything is linear, so the sum of honest vectors carries its own valid tags, and its presence slots say who
is in it, how often and with which weight: the hospitals compare that with what they signed.

Why forging fails: t is prime and alpha_{r,i} is uniform in [0, 2^16), so for any change of the body that is
not zero, whatever it is, a given shift of one tag is right with probability at most 2^-16, and of all four at
most 2^-64. One refusal teaches a forger at most that one guess was wrong. (Four 16-bit tags, not two of 32
bits: products with a limb of a slot then stay below 2^39, and a block of them sums in 64 bits.) A linear
homomorphic MAC in the sense of Catalano and Fiore (Eurocrypt 2013), degree one, with a one-time key. The
construction has had no outside review, and it does not bind a hospital: one that gives its key to the server
can forge (docs/decisions/0003-mac-presence-masks.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedmedgan.shared.errors import CryptoError
from fedmedgan.shared.secure_sum.cipher import blobs_for
from fedmedgan.shared.secure_sum.quantize import BLOCK, PLAIN_MODULUS, REJECTED, Slots, plan_for
from fedmedgan.shared.study import Study

N_TAGS = 4
_LIMB_BITS = 23
"""A slot of 46 bits as two limbs, so that sums of products with 16-bit coefficients are exact in int64."""


def derive_mac_key(root: bytes, study_hash: str, key_id: str, round: int, attempt: int) -> bytes:
    """The 32-byte MAC key of one round and attempt: HKDF-SHA256 (RFC 5869) of the hospitals' root key.

    Used for one vector of each hospital and one check. What was made under another key fails.
    """
    info = f"fedmedgan/mac-key/v1|{study_hash}|{key_id}|{round}|{attempt}".encode()
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(root)


def extra_slots(n_sites: int) -> int:
    """Slots that the proof adds to the data."""
    return n_sites + N_TAGS


def update_blobs(study: Study, n_values: int) -> int:
    """Ciphertexts of one update of a study, proof included: the one number that the server expects.

    Raises:
        StudyError: STUDY_OVERFLOW, CONFIG_RANGE.
    """
    return blobs_for(plan_for(study, n_values).n_slots + extra_slots(len(study.sites)))


def seal(slots: Slots, *, n_sites: int, site_index: int, weight: int, mac_key: bytes) -> Slots:
    """Append presence and tags to data slots: int64 (n_slots,) to int64 (n_slots + n_sites + 4,).

    Args:
        slots: each in [0, t).
        n_sites: sites of the study, present or not.
        site_index: this site's place in the study's roster.
        weight: this site's integer weight, the one that `slots` were multiplied by.

    Raises:
        CryptoError: HE_RANGE, a slot is outside [0, t), or the index or the weight is outside its range.
    """
    if not (0 <= site_index < n_sites and 1 <= weight < PLAIN_MODULUS):
        raise CryptoError("HE_RANGE", "the site's place or weight is outside its range")
    if slots.min() < 0 or slots.max() >= PLAIN_MODULUS:
        raise CryptoError("HE_RANGE", "a slot is not in [0, t)")
    presence = np.zeros(n_sites, dtype=np.int64)
    presence[site_index] = weight
    body = np.concatenate((slots, presence))
    return np.concatenate((body, _tags(body, mac_key)))


def open_sum(total: Slots, *, n_sites: int, weights: Mapping[int, int], mac_key: bytes) -> Slots:
    """Check a decrypted sum and return its data slots.

    Args:
        total: int64 (n_slots + n_sites + 4,), each in [0, t).
        n_sites: sites of the study, present or not.
        weights: place in the roster -> weight, of every site of the cohort that was signed.

    | case | what happens |
    |---|---|
    | the sum of exactly the cohort, each once, this round | data slots |
    | a site left out, counted twice, of another weight, or not in the cohort | ROUND_REJECTED (presence) |
    | anything added, scaled, moved, cut, flipped; another round, attempt or key | ROUND_REJECTED (tags) |
    | all zero, which has valid tags | ROUND_REJECTED (presence) |
    | an empty cohort, or a vector without room for data | ROUND_REJECTED |
    | a hospital that sends false data with a valid proof | accepted: only `SlotPlan.unpack` bounds it |

    Raises:
        CryptoError: ROUND_REJECTED, always with the same text, after every check was made: a caller that
        forwards it
            tells the server one bit.
    """
    n_slots = total.size - extra_slots(n_sites)
    cohort = bool(weights) and all(0 <= i < n_sites and w >= 1 for i, w in weights.items())
    if n_slots < 1 or not cohort or total.min() < 0 or total.max() >= PLAIN_MODULUS:
        raise CryptoError("ROUND_REJECTED", REJECTED)
    expected = [weights.get(place, 0) for place in range(n_sites)]
    body, tags = total[:-N_TAGS], total[-N_TAGS:]
    proven = np.array_equal(_tags(body, mac_key), tags)
    present = body[n_slots:].tolist() == expected
    if not (proven and present):
        raise CryptoError("ROUND_REJECTED", REJECTED)
    return body[:n_slots]


def _tags(body: Slots, mac_key: bytes) -> Slots:
    """The four tags of a body, int64 (4,)."""
    tags, start = [0] * N_TAGS, 0
    for coefficients in _coefficients(mac_key, body.size):
        block = body[start : start + BLOCK]
        low, high = block & ((1 << _LIMB_BITS) - 1), block >> _LIMB_BITS
        for r, alpha in enumerate(coefficients):
            tags[r] += int(alpha @ low) + (int(alpha @ high) << _LIMB_BITS)
        start += BLOCK
    return np.array([tag % PLAIN_MODULUS for tag in tags], dtype=np.int64)


def _coefficients(mac_key: bytes, n: int) -> Iterator[NDArray[np.int64]]:
    """alpha in blocks, int64 (4, up to BLOCK), uniform in [0, 2^16): the AES-256-CTR stream of a key."""
    stream = Cipher(algorithms.AES256(mac_key), modes.CTR(bytes(16))).encryptor()
    for start in range(0, n, BLOCK):
        drawn = stream.update(bytes(2 * N_TAGS * min(BLOCK, n - start)))
        yield np.frombuffer(drawn, dtype="<u2").reshape(N_TAGS, -1).astype(np.int64)
