"""A hospital's keys: who it is, and what it shares with the other hospitals. The server has none of these.

    identity, made once by each hospital itself        epoch, shared by all hospitals of a study
      signing    Ed25519: signs messages and records     he_secret  the BFV secret key
      exchange   X25519: secrets of two for the masks    mac_root   32 bytes, root of the MAC keys
      pseudonym  32 bytes: names patients in records

The public halves go into the study, whose hash every hospital compares out of band. Private keys are files
that only their owner may read; they are not encrypted, so the disk should be.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedmedgan.shared.errors import CryptoError, MessageError, RunError
from fedmedgan.shared.secure_sum.cipher import HospitalCipher, key_id, new_secret

_FILES = {
    "signing": "signing.pem",
    "exchange": "exchange.pem",
    "pseudonym_key": "pseudonym.key",
    "he_secret": "he-secret.key",
    "mac_root": "mac-root.key",
}
_EPOCH = ("he_secret", "mac_root")
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class HospitalKeys:
    """All private keys of one hospital. Printing it shows public halves only."""

    signing: Ed25519PrivateKey = field(repr=False)
    exchange: X25519PrivateKey = field(repr=False)
    pseudonym_key: bytes = field(repr=False)
    """32 bytes of this hospital alone: HMAC key of the names that patients have in its records."""
    he_secret: bytes = field(default=b"", repr=False)
    """The BFV secret key as SEAL serialises it; empty until the hospital has the epoch."""
    mac_root: bytes = field(default=b"", repr=False)
    """32 bytes shared by the hospitals; empty until the hospital has the epoch."""

    @property
    def signing_public(self) -> str:
        """64 hex digits, `signing_key` of the study."""
        return self.signing.public_key().public_bytes_raw().hex()

    @property
    def exchange_public(self) -> str:
        """64 hex digits, `exchange_key` of the study."""
        return self.exchange.public_key().public_bytes_raw().hex()

    @property
    def key_id(self) -> str:
        """Public name of the epoch's secret key, 32 hex digits.

        Raises:
            CryptoError: KEY_MISSING, this hospital has no epoch yet.
        """
        if not self.he_secret:
            raise CryptoError("KEY_MISSING", "this hospital does not have the study's encryption key yet")
        return key_id(self.he_secret + self.mac_root)

    def with_epoch(self, he_secret: bytes, mac_root: bytes) -> HospitalKeys:
        """The same identity with the keys of an epoch.

        Raises:
            CryptoError: KEY_FORMAT.
        """
        HospitalCipher(he_secret)  # raises KEY_FORMAT
        if len(mac_root) != 32:
            raise CryptoError("KEY_FORMAT", "the MAC root is not of 32 bytes")
        return replace(self, he_secret=he_secret, mac_root=mac_root)

    def shared_secret(self, peer_public: str) -> bytes:
        """32 bytes that only these two hospitals can compute: X25519 (RFC 7748), then HKDF-SHA256.

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

    def save(self, folder: Path) -> None:
        """Write every key that is there, each a file of mode 0600 in a folder of mode 0700.

        Keys of an epoch replace those of an earlier one; an identity is never replaced.

        Raises:
            RunError: RUN_PATH, the folder holds another identity or cannot be written.
        """
        contents = {
            "signing": _to_pem(self.signing),
            "exchange": _to_pem(self.exchange),
            "pseudonym_key": self.pseudonym_key,
            "he_secret": self.he_secret,
            "mac_root": self.mac_root,
        }
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, data in contents.items():
                path = folder / _FILES[name]
                if name not in _EPOCH and path.exists() and path.read_bytes() != data:
                    raise RunError("RUN_PATH", "the folder holds another identity", str(folder))
            for name, data in contents.items():
                if data:
                    _write_private(folder / _FILES[name], data)
        except OSError as error:
            raise RunError("RUN_PATH", f"keys cannot be written ({error.strerror})", str(folder)) from None

    @staticmethod
    def load(folder: Path) -> HospitalKeys:
        """Read what `save` wrote.

        | case | code |
        |---|---|
        | a file of the identity is not there, or half of an epoch | KEY_MISSING |
        | no epoch at all | loads, `he_secret` is empty |
        | group or others may read or write a file | KEY_PERMISSIONS |
        | a public, RSA, encrypted or cut key, a wrong length, not a regular file | KEY_FORMAT |

        Raises:
            CryptoError: KEY_MISSING, KEY_PERMISSIONS, KEY_FORMAT.
        """
        signing = _from_pem(folder / _FILES["signing"])
        exchange = _from_pem(folder / _FILES["exchange"])
        if not isinstance(signing, Ed25519PrivateKey):
            raise CryptoError("KEY_FORMAT", "this is not an Ed25519 private key", _FILES["signing"])
        if not isinstance(exchange, X25519PrivateKey):
            raise CryptoError("KEY_FORMAT", "this is not an X25519 private key", _FILES["exchange"])
        pseudonym_key = _read_private(folder / _FILES["pseudonym_key"])
        if len(pseudonym_key) != 32:
            raise CryptoError("KEY_FORMAT", "the key is not of 32 bytes", _FILES["pseudonym_key"])
        keys = HospitalKeys(signing, exchange, pseudonym_key)
        if not any((folder / _FILES[name]).exists() for name in _EPOCH):
            return keys
        return keys.with_epoch(*(_read_private(folder / _FILES[name]) for name in _EPOCH))


def generate_identity() -> HospitalKeys:
    """A new identity, without an epoch."""
    return HospitalKeys(Ed25519PrivateKey.generate(), X25519PrivateKey.generate(), secrets.token_bytes(32))


def new_epoch() -> tuple[bytes, bytes]:
    """(he_secret, mac_root) of a new epoch, made by one hospital for all of them."""
    return new_secret(), secrets.token_bytes(32)


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


def _to_sign(message: bytes, purpose: str) -> bytes:
    # The purpose is hashed to a fixed length, so no purpose and message run into each other.
    return b"fedmedgan/sign/v1\0" + hashlib.sha256(purpose.encode()).digest() + message


def _to_pem(key: Ed25519PrivateKey | X25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _from_pem(path: Path) -> object:
    try:
        return load_pem_private_key(_read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the library's own text may quote the file
        raise CryptoError("KEY_FORMAT", "not an unencrypted private key in PEM", path.name) from None


def _read_private(path: Path) -> bytes:
    try:
        # Checked on the open file, so that it cannot be swapped between the check and the reading.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE_BYTES:
                raise CryptoError("KEY_FORMAT", "this is not a key file", path.name)
            if status.st_mode & 0o077:
                raise CryptoError("KEY_PERMISSIONS", "others than the owner may read the key", path.name)
            return file.read()
    except OSError as error:
        raise CryptoError("KEY_MISSING", f"the key cannot be read ({error.strerror})", path.name) from None


def _write_private(path: Path, data: bytes) -> None:
    """Replace a file by a new one of mode 0600, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    os.replace(new, path)
