"""A hospital's keys: who it is, and what it shares with the other hospitals. The server has none of these.

    identity, made once by each hospital itself            key epoch, shared by the hospitals that are its members
      signing    Ed25519 (RFC 8032): messages, records       he_secret  the BFV secret key
      exchange   X25519 (RFC 7748): masks of two             mac_root   32 bytes, root of the MAC keys
      wrapping   ML-KEM-768 (FIPS 203) with X25519: HPKE
                 (RFC 9180) sends it key epochs (`epochs`)

The public halves of an identity go into the study, whose hash every hospital signs and compares out of band. On disk
(`keys/`) each group is one file (`key_file`), so there is never half an identity or half an epoch:

    identity.key      never replaced
    next-epoch.key    an epoch that this hospital was given, until all members confirmed that they have the same one
    epoch.key         the epoch in use; `activate_next` puts the next one in its place by one rename

A key file is plain (the disk should be encrypted then) or sealed with a passphrase.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmedgan.shared.errors import CryptoError, MessageError, RunError
from fedmedgan.shared.secure_sum import cipher, key_file
from fedmedgan.shared.secure_sum.key_file import passphrase_from_environment as passphrase_from_environment

MAX_EPOCHS = 10_000

_IDENTITY, _EPOCH, _NEXT_EPOCH = "identity.key", "epoch.key", "next-epoch.key"
_SEED_BYTES = 64
"""An ML-KEM-768 private key as its seed d || z (FIPS 203, section 7.1)."""


@dataclass(frozen=True)
class Epoch:
    """The keys that some hospitals share from one round on. Printing it shows no key.

    | case | code |
    |---|---|
    | a number outside 1 to 10,000, a first round below 1 | KEY_FORMAT |
    | no members, members that are not sorted or are named twice | KEY_FORMAT |
    | `he_secret` is not a secret key of our parameters, `mac_root` is not of 32 bytes | KEY_FORMAT |

    Raises:
        CryptoError: KEY_FORMAT.
    """

    number: int
    """1 to 10,000, one more with every epoch of a study."""
    he_secret: bytes = field(repr=False)
    """The BFV secret key as SEAL serialises it, 46 kB."""
    mac_root: bytes = field(repr=False)
    """32 bytes."""
    members: tuple[str, ...]
    """The sites that were given it, sorted."""
    since_round: int = 1
    """The first round under these keys."""

    def __post_init__(self) -> None:
        numbers = all(type(n) is int for n in (self.number, self.since_round))
        if not numbers or not 1 <= self.number <= MAX_EPOCHS or self.since_round < 1:
            raise CryptoError("KEY_FORMAT", "the number or the first round of a key epoch is out of range")
        if not self.members or list(self.members) != sorted(set(self.members)):
            raise CryptoError("KEY_FORMAT", "the members of a key epoch are not a sorted list of names")
        if len(self.mac_root) != 32:
            raise CryptoError("KEY_FORMAT", "the MAC root is not of 32 bytes")
        cipher.HospitalCipher(self.he_secret)  # raises KEY_FORMAT

    @property
    def key_id(self) -> str:
        """Public name of the two keys, 32 hex digits."""
        return cipher.key_id(self.he_secret + self.mac_root)

    def same_keys(self, other: Epoch) -> bool:
        """Whether number, keys and members are the same; the first round is only settled on activation."""
        return replace(self, since_round=1) == replace(other, since_round=1)


@dataclass(frozen=True)
class HospitalKeys:
    """All private keys of one hospital. Printing it shows no key."""

    signing: Ed25519PrivateKey = field(repr=False)
    exchange: X25519PrivateKey = field(repr=False)
    wrapping_seed: bytes = field(repr=False)
    """96 bytes: seed of the ML-KEM-768 key (64), private key of X25519 (32)."""
    epoch: Epoch | None = None
    """The epoch in use; None until the first one was confirmed by all its members."""
    next_epoch: Epoch | None = None
    """An epoch that is not yet confirmed by all its members."""

    @property
    def signing_public(self) -> str:
        """64 hex digits, `signing_key` of the study."""
        return self.signing.public_key().public_bytes_raw().hex()

    @property
    def exchange_public(self) -> str:
        """64 hex digits, `exchange_key` of the study."""
        return self.exchange.public_key().public_bytes_raw().hex()

    @property
    def wrapping_public(self) -> str:
        """2432 hex digits, `wrapping_key` of the study: ML-KEM-768 (1184 bytes), then X25519 (32 bytes)."""
        mlkem, x25519 = self._wrapping_pair()
        return (mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()).hex()

    @property
    def wrapping(self) -> MLKEM768X25519PrivateKey:
        """The HPKE private key."""
        return MLKEM768X25519PrivateKey(*self._wrapping_pair())

    def _wrapping_pair(self) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
        seed, scalar = self.wrapping_seed[:_SEED_BYTES], self.wrapping_seed[_SEED_BYTES:]
        return MLKEM768PrivateKey.from_seed_bytes(seed), X25519PrivateKey.from_private_bytes(scalar)

    @property
    def he_secret(self) -> bytes:
        """The BFV secret key of the epoch in use.

        Raises:
            CryptoError: KEY_MISSING.
        """
        return self._current().he_secret

    @property
    def mac_root(self) -> bytes:
        """The MAC root of the epoch in use, 32 bytes.

        Raises:
            CryptoError: KEY_MISSING.
        """
        return self._current().mac_root

    @property
    def key_id(self) -> str:
        """Public name of the keys of the epoch in use, 32 hex digits.

        Raises:
            CryptoError: KEY_MISSING.
        """
        return self._current().key_id

    def _current(self) -> Epoch:
        if self.epoch is None:
            raise CryptoError("KEY_MISSING", "this hospital does not have the study's encryption key yet")
        return self.epoch

    def shared_secret(self, peer_public: str) -> bytes:
        """32 bytes that only these two hospitals can compute: X25519 (RFC 7748), then HKDF-SHA256 (RFC 5869).

        Args:
            peer_public: the other hospital's `exchange_public`, from the study.

        Raises:
            CryptoError: KEY_FORMAT, not a public key, a point of small order, or this hospital's own key.
        """
        own = self.exchange.public_key().public_bytes_raw()
        try:
            peer = bytes.fromhex(peer_public)
            shared = self.exchange.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise CryptoError("KEY_FORMAT", "a site's exchange key is not an X25519 public key") from None
        if peer == own:
            raise CryptoError("KEY_FORMAT", "two sites have the same exchange key")
        info = b"fedmedgan/pair-secret/v1\0" + b"".join(sorted((own, peer)))
        return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(shared)

    def save(self, folder: Path, passphrase: bytes | None = None) -> None:
        """Write every group of keys that is there, each a file of mode 0600 in a folder of mode 0700.

        | case | what happens |
        |---|---|
        | the folder holds this identity already | its file is left as it is |
        | the folder holds another identity, or a damaged one | RUN_PATH, or what `load` says; nothing is written |
        | the folder holds a later epoch, or another one of the same number | KEY_EPOCH; it stays |
        | the folder is sealed and no passphrase is known | KEY_PASSPHRASE; no key is ever written in the clear there |

        Args:
            passphrase: seals the files; None: that of the environment, if there is one.

        Raises:
            RunError: RUN_PATH, as above, or the folder cannot be written.
            CryptoError: KEY_EPOCH, KEY_PASSPHRASE, and the codes of `load`.
        """
        _save_once(folder / _IDENTITY, "identity", self._identity(), passphrase)
        for name, epoch in ((_EPOCH, self.epoch), (_NEXT_EPOCH, self.next_epoch)):
            if epoch is not None:
                _save_epoch(folder, name, epoch, passphrase)

    def _identity(self) -> dict[str, key_file.Value]:
        return {
            "signing": _text(self.signing.private_bytes_raw()),
            "exchange": _text(self.exchange.private_bytes_raw()),
            "wrapping": _text(self.wrapping_seed),
        }

    @staticmethod
    def load(folder: Path, passphrase: bytes | None = None) -> HospitalKeys:
        """Read what `save`, `store_next` and `activate_next` wrote.

        | case | code |
        |---|---|
        | there is no identity | KEY_MISSING |
        | no epoch, no next epoch | loads, with None |
        | group or others may read, write or execute a file | KEY_PERMISSIONS |
        | a file is sealed and no passphrase, or the wrong one, is known; a sealed file was altered | KEY_PASSPHRASE |
        | a damaged or cut plain file, a PEM (RSA or other), a public key, a link, not a regular file | KEY_FORMAT |
        | one file in the place of another | KEY_FORMAT |
        | the next epoch is not later than the epoch in use: an old file was put back | KEY_EPOCH |

        Args:
            passphrase: None: that of the environment, if there is one.

        Raises:
            CryptoError: the codes above.
        """
        values = key_file.read(folder / _IDENTITY, "identity", passphrase)
        if values is None:
            raise CryptoError("KEY_MISSING", "this hospital has no identity yet", _IDENTITY)
        keys = HospitalKeys(
            Ed25519PrivateKey.from_private_bytes(_raw(values, "signing", 32)),
            X25519PrivateKey.from_private_bytes(_raw(values, "exchange", 32)),
            _raw(values, "wrapping", _SEED_BYTES + 32),
            _load_epoch(folder / _EPOCH, passphrase),
            _load_epoch(folder / _NEXT_EPOCH, passphrase),
        )
        if keys.epoch and keys.next_epoch and keys.next_epoch.number <= keys.epoch.number:
            raise CryptoError("KEY_EPOCH", "the next key epoch is not later than the one in use", _NEXT_EPOCH)
        return keys


def generate_identity() -> HospitalKeys:
    """A new identity, without an epoch."""
    wrapping = MLKEM768PrivateKey.generate().private_bytes_raw() + X25519PrivateKey.generate().private_bytes_raw()
    return HospitalKeys(Ed25519PrivateKey.generate(), X25519PrivateKey.generate(), wrapping)


def new_epoch(number: int, members: tuple[str, ...], since_round: int = 1) -> Epoch:
    """New keys for an epoch, made by one hospital for all its members.

    Raises:
        CryptoError: KEY_FORMAT.
    """
    return Epoch(number, cipher.new_secret(), secrets.token_bytes(32), tuple(sorted(members)), since_round)


def store_next(folder: Path, epoch: Epoch, passphrase: bytes | None = None) -> None:
    """Keep an epoch until all its members confirmed it. It is on the disk when this returns.

    | case | what happens |
    |---|---|
    | the same epoch again, also when it is in use by now | nothing changes |
    | a later epoch than the stored next one | takes its place: that one was never confirmed |
    | an earlier number than a stored one, or the same number with other keys or members | KEY_EPOCH |

    Raises:
        CryptoError: KEY_EPOCH; KEY_PASSPHRASE, the folder is sealed; and the codes of `HospitalKeys.load`.
        RunError: RUN_PATH, the folder cannot be written.
    """
    current = _load_epoch(folder / _EPOCH, passphrase)
    if current is None or epoch.number > current.number:
        _save_epoch(folder, _NEXT_EPOCH, epoch, passphrase)
    elif not current.same_keys(epoch):
        raise CryptoError("KEY_EPOCH", f"key epoch {epoch.number} is not later than the one in use", _EPOCH)


def activate_next(folder: Path, since_round: int, passphrase: bytes | None = None) -> Epoch:
    """Make the next epoch the one in use, from that round on. The file of the old one is gone.

    | case | what happens |
    |---|---|
    | a crash at any moment | the old epoch is in use and the next one still stored, or the next one is in use |
    | called again with the same round after it was done | returns the epoch in use |
    | there is no next epoch | KEY_EPOCH |
    | the round lies before the first round of the epoch in use | KEY_EPOCH |

    The old secret's blocks may live on in a flash disk or a backup: encrypt the disk, or seal the keys.

    Raises:
        CryptoError: KEY_EPOCH; KEY_PASSPHRASE, the folder is sealed; and the codes of `HospitalKeys.load`.
        RunError: RUN_PATH, the folder cannot be written.
    """
    current = _load_epoch(folder / _EPOCH, passphrase)
    following = _load_epoch(folder / _NEXT_EPOCH, passphrase)
    if following is None and current is not None and current.since_round == since_round:
        return current
    if following is None:
        raise CryptoError("KEY_EPOCH", "there is no next key epoch", _NEXT_EPOCH)
    if current is not None and (following.number <= current.number or since_round < current.since_round):
        raise CryptoError("KEY_EPOCH", "the next key epoch does not follow the one in use", _NEXT_EPOCH)
    following = replace(following, since_round=since_round)
    _write_epoch(folder, _NEXT_EPOCH, following, passphrase)
    key_file.rename(folder / _NEXT_EPOCH, folder / _EPOCH)
    return following


def save_signing_key(path: Path, private: Ed25519PrivateKey, passphrase: bytes | None = None) -> None:
    """Write the coordinator's signing key, mode 0600. Another key is never replaced.

    Raises:
        RunError: RUN_PATH, the file holds another key or cannot be written.
        CryptoError: as `load_signing_key`, of a file that is there already.
    """
    _save_once(path, "signing", {"signing": _text(private.private_bytes_raw())}, passphrase)


def load_signing_key(path: Path, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """Read what `save_signing_key` wrote. A hospital's identity is refused: the coordinator may not hold one.

    Raises:
        CryptoError: KEY_MISSING, KEY_PERMISSIONS, KEY_PASSPHRASE, KEY_FORMAT, as `HospitalKeys.load`.
    """
    values = key_file.read(path, "signing", passphrase)
    if values is None:
        raise CryptoError("KEY_MISSING", "there is no signing key", path.name)
    return Ed25519PrivateKey.from_private_bytes(_raw(values, "signing", 32))


def fingerprint(name: str, signing: str, exchange: str, wrapping: str) -> str:
    """All public keys of a site in 40 hex digits, to be read out on the telephone: ``ab12 cd34 ...``.

    160 bits of SHA-256 over the name and the three keys: nobody finds other keys of the same fingerprint.

    Args:
        name: the site.
        signing, exchange, wrapping: hex digits, as in the study; their case does not matter.
    """
    keys = [name, signing.lower(), exchange.lower(), wrapping.lower()]
    digits = hashlib.sha256(b"fedmedgan/fingerprint/v1\0" + rfc8785.dumps(keys)).hexdigest()[:40]
    return " ".join(digits[i : i + 4] for i in range(0, 40, 4))


def sign(private: Ed25519PrivateKey, message: bytes, purpose: str) -> bytes:
    """Ed25519 signature (RFC 8032), 64 bytes. A signature for one purpose is never valid for another."""
    return private.sign(_to_sign(message, purpose))


def verify(public: str, signature: bytes, message: bytes, purpose: str) -> None:
    """Check a signature against a public key of 64 hex digits.

    Raises:
        MessageError: MSG_SIGNATURE, whatever is wrong with key, signature, message or purpose.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(signature, _to_sign(message, purpose))
    except (InvalidSignature, ValueError):
        raise MessageError("MSG_SIGNATURE", "the signature is not valid") from None


def verify_hex(public: str, signature: str, message: bytes, purpose: str) -> None:
    """Check a signature of 128 lower-case hex digits, the one form that it is written in.

    `bytes.fromhex` also takes capitals and spaces: one signature in many spellings, each with another hash.

    Raises:
        MessageError: MSG_SIGNATURE.
    """
    if re.fullmatch("[0-9a-f]{128}", signature) is None:
        raise MessageError("MSG_SIGNATURE", "the signature is not 128 hex digits")
    verify(public, bytes.fromhex(signature), message, purpose)


def _to_sign(message: bytes, purpose: str) -> bytes:
    # The purpose is hashed to a fixed length, so no purpose and message run into each other.
    return b"fedmedgan/sign/v1\0" + hashlib.sha256(purpose.encode()).digest() + message


def _save_once(path: Path, kind: str, values: Mapping[str, key_file.Value], passphrase: bytes | None) -> None:
    """Write a file that is never replaced."""
    stored = key_file.read(path, kind, passphrase)
    if stored is None:
        key_file.write(path, kind, values, passphrase)
    elif stored != values:
        raise RunError("RUN_PATH", "the folder holds another identity", path.name)


def _save_epoch(folder: Path, name: str, epoch: Epoch, passphrase: bytes | None) -> None:
    """Write an epoch, unless the file holds the same one already, or one that it may not replace."""
    stored = _load_epoch(folder / name, passphrase)
    if stored is not None and stored.same_keys(epoch):
        return
    if stored is not None and stored.number >= epoch.number:
        raise CryptoError("KEY_EPOCH", f"the stored key epoch {stored.number} may not be replaced", name)
    _write_epoch(folder, name, epoch, passphrase)


def _write_epoch(folder: Path, name: str, epoch: Epoch, passphrase: bytes | None) -> None:
    known = passphrase is not None or passphrase_from_environment() is not None
    if not known and key_file.is_sealed(folder / _IDENTITY):
        raise CryptoError("KEY_PASSPHRASE", "keys are sealed in this folder and no passphrase is known", name)
    values: dict[str, key_file.Value] = {
        "number": epoch.number,
        "he_secret": _text(epoch.he_secret),
        "mac_root": _text(epoch.mac_root),
        "members": list(epoch.members),
        "since_round": epoch.since_round,
    }
    key_file.write(folder / name, "epoch", values, passphrase)


def _load_epoch(path: Path, passphrase: bytes | None) -> Epoch | None:
    values = key_file.read(path, "epoch", passphrase)
    if values is None:
        return None
    try:
        number, members, since_round = (values[key] for key in ("number", "members", "since_round"))
        he_secret, mac_root = _raw(values, "he_secret"), _raw(values, "mac_root", 32)
        return Epoch(number, he_secret, mac_root, tuple(members), since_round)  # type: ignore[arg-type]
    except (KeyError, TypeError):
        raise CryptoError("KEY_FORMAT", "this is not a key epoch", path.name) from None


def _text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def _raw(values: Mapping[str, key_file.Value], name: str, length: int | None = None) -> bytes:
    try:
        key = base64.b64decode(values[name], validate=True)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        key = b""
    if not key or length not in (None, len(key)):
        raise CryptoError("KEY_FORMAT", "a key is missing or not of its length", name)
    return key
