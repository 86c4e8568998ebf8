"""How a key epoch gets from the hospital that made it to the others, by way of a server that must not learn it.

    leader     wrap(epoch, ...) for each member        HPKE (RFC 9180) to the member's public key of the study
    member     unwrap(keys, blob, ...)                 opens it, checks it, keeps it as its next epoch
    member     confirmation(epoch, ...)                HMAC-SHA256 (RFC 2104) under the MAC root
    everybody  check_confirmation(...) of each member  all hold the same keys: the next epoch may be used

The KEM is hybrid, ML-KEM-768 (FIPS 203) with X25519: what a server keeps today stays closed unless both are broken.
HPKE's base mode does not say who sealed: the leader's signature over the message does (`messages`), and the name that
it was checked against is bound here. Why a leader, and what stays open: docs/decisions/0007-keys-and-epochs.md.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import numpy as np
import rfc8785
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PublicKey, Suite

from fedmedgan.shared.errors import CryptoError
from fedmedgan.shared.secure_sum.cipher import RING_DEGREE, HospitalCipher
from fedmedgan.shared.secure_sum.keys import Epoch, HospitalKeys
from fedmedgan.shared.secure_sum.quantize import PLAIN_MODULUS

MAX_BLOB_BYTES = 64 * 1024
"""A wrapped epoch has 47 kB: 46 kB of SEAL's secret key, 32 bytes of MAC root, 1,136 bytes of HPKE."""

_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_MLKEM_PUBLIC_BYTES = 1184
_ROOT_BYTES = 32


def wrap(epoch: Epoch, wrapping_public: str, *, study_hash: str, sender: str, recipient: str) -> bytes:
    """An epoch for one member: nobody else can open it, and it opens for nothing else.

    | case | code |
    |---|---|
    | sender or recipient is not a member of the epoch | KEY_EPOCH |
    | no public key, one that was cut or is of another kind, an X25519 half of small order | KEY_FORMAT |

    Args:
        wrapping_public: the recipient's `wrapping_key` of the study, 2432 hex digits.
        study_hash: 64 hex digits.
        sender: the site that made the epoch, and that signs the message with it.
        recipient: the site that the public key belongs to.

    Returns:
        47 kB, at most `MAX_BLOB_BYTES`.

    Raises:
        CryptoError: the codes above.
    """
    if not {sender, recipient} <= set(epoch.members):
        raise CryptoError("KEY_EPOCH", "sender and recipient of a key epoch must both be members of it")
    info = _info(study_hash, epoch.number, epoch.key_id, epoch.members, sender, recipient)
    try:
        public = bytes.fromhex(wrapping_public)
        halves = public[:_MLKEM_PUBLIC_BYTES], public[_MLKEM_PUBLIC_BYTES:]
        pair = MLKEM768PublicKey.from_public_bytes(halves[0]), X25519PublicKey.from_public_bytes(halves[1])
        return _SUITE.encrypt(epoch.mac_root + epoch.he_secret, MLKEM768X25519PublicKey(*pair), info=info)
    except ValueError:
        raise CryptoError("KEY_FORMAT", "a site's wrapping key is not a public key for HPKE", recipient) from None


def unwrap(
    keys: HospitalKeys,
    blob: bytes,
    *,
    study_hash: str,
    number: int,
    key_id: str,
    members: tuple[str, ...],
    sender: str,
    recipient: str,
) -> Epoch:
    """Open what `wrap` made for this hospital, and check that it is what the leader's signed message says.

    | case | code |
    |---|---|
    | made for another hospital, study, number, key id, set of members, or by another sender | KEY_UNWRAP |
    | any bit changed, cut, padded, empty, 10 bytes, over 64 KiB | KEY_UNWRAP |
    | opens, and the keys are not those of the key id, or do not encrypt and decrypt | KEY_UNWRAP |
    | sender or recipient is not a member | KEY_UNWRAP |
    | the same blob a second time | opens: that numbers only go up is up to `keys.store_next` |

    Args:
        study_hash: 64 hex digits.
        number, key_id, members: of the leader's message, whose signature was checked. The members are sorted.
        sender: the leader.
        recipient: this hospital.

    Raises:
        CryptoError: KEY_UNWRAP.
    """
    try:
        if len(blob) > MAX_BLOB_BYTES or not {sender, recipient} <= set(members):
            raise ValueError
        info = _info(study_hash, number, key_id, members, sender, recipient)
        opened = _SUITE.decrypt(blob, keys.wrapping, info=info)
        epoch = Epoch(number, opened[_ROOT_BYTES:], opened[:_ROOT_BYTES], members)
        if epoch.key_id != key_id or not _works(epoch):
            raise ValueError
    except (InvalidTag, ValueError, CryptoError):  # one text for all: the sender learns nothing from it
        raise CryptoError("KEY_UNWRAP", "what came is not this key epoch for this hospital", recipient) from None
    return epoch


def confirmation(epoch: Epoch, *, study_hash: str, hospital: str) -> str:
    """64 hex digits that only somebody who holds the epoch can make: this hospital has these keys.

    HMAC-SHA256 under the MAC root over study, number, key id, members and hospital. The key id is a hash of both
    keys, so equal confirmations mean equal keys.
    """
    return _confirmation(epoch, study_hash, hospital)


def check_confirmation(epoch: Epoch, *, study_hash: str, hospital: str, confirmation: str) -> None:
    """Check another hospital's confirmation against one's own epoch, in constant time.

    | case | code |
    |---|---|
    | other keys, number, members or study | KEY_CONFIRM |
    | another hospital's confirmation, one's own sent back, empty, not hex | KEY_CONFIRM |
    | a right one of somebody who is not a member | KEY_CONFIRM |

    Raises:
        CryptoError: KEY_CONFIRM.
    """
    expected = _confirmation(epoch, study_hash, hospital)
    same = hmac.compare_digest(expected.encode(), confirmation.encode(errors="replace"))
    if not same or hospital not in epoch.members:
        raise CryptoError("KEY_CONFIRM", f"the hospital does not hold the keys of epoch {epoch.number}", hospital)


def _confirmation(epoch: Epoch, study_hash: str, hospital: str) -> str:
    about: dict[str, Any] = {
        "study": study_hash,
        "number": epoch.number,
        "key_id": epoch.key_id,
        "members": list(epoch.members),
        "hospital": hospital,
    }
    message = b"fedmedgan/epoch-confirmation/v1\0" + rfc8785.dumps(about)
    return hmac.new(epoch.mac_root, message, hashlib.sha256).hexdigest()


def _info(study_hash: str, number: int, key_id: str, members: tuple[str, ...], sender: str, recipient: str) -> bytes:
    """What a wrapped epoch is bound to, in one unambiguous form."""
    about: dict[str, Any] = {
        "study": study_hash,
        "number": number,
        "key_id": key_id,
        "members": list(members),
        "sender": sender,
        "recipient": recipient,
    }
    return b"fedmedgan/epoch/v1\0" + rfc8785.dumps(about)


def _works(epoch: Epoch) -> bool:
    """Whether the secret key decrypts what it encrypts, over the whole range of a slot."""
    cipher = HospitalCipher(epoch.he_secret)
    slots = np.linspace(0, PLAIN_MODULUS - 1, RING_DEGREE).astype(np.int64)
    return bool(np.array_equal(cipher.decrypt(cipher.encrypt(slots), RING_DEGREE), slots))
