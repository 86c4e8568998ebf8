"""The data owner: the one person who may allow a second ledger on the same patients.

All studies of the same patients share one budget (client/budget_book.py), so a hospital cannot begin a second ledger on
them by itself. The data owner reads which ledgers there are, writes down a reason, and signs it on a machine of their
own with an Ed25519 key (RFC 8032). The hospital's policy.toml holds the public half; the statement goes into the new
ledger as an `override` record, where any auditor can check it:

    "fedmedgan ledger override 1\\n" + RFC 8785 of {"book", "ledger", "others" (sorted), "reason"}

The override lets the second ledger in; it adds no budget. What both spend is still counted together.

    case                                                   result
    the same others in another order, or one named twice   the same statement
    another book, another ledger, a ledger more or less    LEDGER_OVERRIDE
    another reason, even by one letter                     LEDGER_OVERRIDE
    signed by another key                                  LEDGER_OVERRIDE
    the hospital's policy names no data owner              LEDGER_OVERRIDE
    the data owner's key is the key that signs the ledger  LEDGER_OVERRIDE: nobody allows it to themselves
    nobody is named, or the ledger itself, or no reason    LEDGER_OVERRIDE
    an empty passphrase, one of less than 12 bytes         KEY_PASSPHRASE
    a wrong passphrase, or a damaged file                  KEY_PASSPHRASE
    a key that is not sealed, not Ed25519, or no PEM       KEY_FORMAT
    others than its owner may use the key's file           KEY_PERMISSIONS
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from fedmedgan.shared.errors import CryptoError, PrivacyError, RunError
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.records import canonical

DOMAIN = b"fedmedgan ledger override 1\n"
MAX_REASON = 200
MIN_PASSPHRASE_BYTES, MAX_PASSPHRASE_BYTES = 12, 1023
"""OpenSSL stretches a passphrase of a PEM with only 2,048 rounds of PBKDF2, and takes no longer one."""
_MAX_KEY_FILE = 1 << 16
_SEALED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def owner_statement(book_id: str, ledger_id: str, others: Iterable[str], reason: str) -> bytes:
    """The bytes that the data owner signs.

    Args:
        book_id: public id of the hospital's budget book, 64 hex digits.
        ledger_id: the ledger that is let in, 64 hex digits.
        others: the ledgers beside which it is let in, 64 hex digits each.
        reason: one line of 1 to 200 characters that names no patient; it stands in the ledger.

    Raises:
        PrivacyError: LEDGER_OVERRIDE.
    """
    named = sorted(set(others))
    if not named or not all(re.fullmatch("[0-9a-f]{64}", name) for name in (book_id, ledger_id, *named)):
        raise _refused("book and ledgers are named by 64 hex digits each, and there is at least one other ledger")
    if ledger_id in named:
        raise _refused("a ledger needs no permission beside itself")
    if not (0 < len(reason) <= MAX_REASON and reason.isprintable() and reason.strip()):
        raise _refused(f"the reason is one line of 1 to {MAX_REASON} characters")
    return DOMAIN + canonical({"book": book_id, "ledger": ledger_id, "others": named, "reason": reason})


def sign_override(
    private: Ed25519PrivateKey, *, book_id: str, ledger_id: str, others: Iterable[str], reason: str
) -> dict[str, Any]:
    """The data owner allows a ledger beside others: the four fields of its `override` record.

    Returns:
        ledgers (sorted), reason, owner_key and owner_signature, as `Ledger.override` takes them.

    Raises:
        PrivacyError: LEDGER_OVERRIDE.
    """
    others = sorted(set(others))
    signature = private.sign(owner_statement(book_id, ledger_id, others, reason))
    return {
        "ledgers": others,
        "reason": reason,
        "owner_key": private.public_key().public_bytes_raw().hex(),
        "owner_signature": signature.hex(),
    }


def check_override(fields: Mapping[str, Any], history: History, owner_key: str) -> None:
    """Check that the data owner allows a ledger beside the others that an override names.

    Args:
        fields: what `sign_override` returned, or the body of an `override` record.
        history: of the ledger that is let in.
        owner_key: the data owner's public key, from policy.toml; empty where the policy names none.

    Raises:
        PrivacyError: LEDGER_OVERRIDE.
    """
    if not owner_key:
        raise _refused("the hospital's policy names no data owner")
    if owner_key == history.signing_key:
        raise _refused("the policy names the key of the ledger itself as the data owner's")
    if fields["owner_key"] != owner_key:
        raise _refused("it is not signed by the data owner of the hospital's policy")
    statement = owner_statement(history.book, history.ledger_id, fields["ledgers"], fields["reason"])
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(owner_key))
        public.verify(bytes.fromhex(fields["owner_signature"]), statement)
    except (InvalidSignature, ValueError):
        raise _refused("the data owner did not sign just this: this ledger, these others, this reason") from None


def allowed_by_owner(history: History, owner_key: str) -> frozenset[str]:
    """Ids of the ledgers beside which the data owner allows this one; only valid overrides count."""
    named: set[str] = set()
    for body in history.overrides:
        with suppress(PrivacyError):
            check_override(body, history, owner_key)
            named |= set(body["ledgers"])
    return frozenset(named)


def make_owner_key(path: Path, passphrase: bytes) -> str:
    """Make the data owner's key, on a machine of the data owner, as a sealed PEM (PKCS 8, mode 0600).

    Returns:
        The public half, 64 hex digits, for `data_owner_key` in the hospital's policy.toml.

    Raises:
        CryptoError: KEY_PASSPHRASE.
        RunError: RUN_PATH, the file is there already or cannot be written. A key is never replaced.
    """
    if not MIN_PASSPHRASE_BYTES <= len(passphrase) <= MAX_PASSPHRASE_BYTES:
        what = f"the passphrase has {MIN_PASSPHRASE_BYTES} to {MAX_PASSPHRASE_BYTES} bytes"
        raise CryptoError("KEY_PASSPHRASE", what, path.name, hint="choose several random words")
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        hint = "choose a new file: a key is never replaced"
        raise RunError("RUN_PATH", "there is a file of that name already", path.name, hint) from None
    except OSError as error:
        raise RunError("RUN_PATH", f"the key cannot be written ({error.strerror})", path.name) from None
    return private.public_key().public_bytes_raw().hex()


def load_owner_key(path: Path, passphrase: bytes) -> Ed25519PrivateKey:
    """Read what `make_owner_key` wrote.

    Raises:
        CryptoError: KEY_MISSING, KEY_PERMISSIONS, KEY_FORMAT, KEY_PASSPHRASE.
    """
    data = _read_private(path)
    if not data.lstrip().startswith(_SEALED):
        raise CryptoError("KEY_FORMAT", "this is no PEM of a private key that is sealed with a passphrase", path.name)
    try:
        private = load_pem_private_key(data, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        what = "not the passphrase of the data owner's key, or the file was damaged"
        raise CryptoError("KEY_PASSPHRASE", what, path.name, hint="type the passphrase again") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise CryptoError("KEY_FORMAT", "the data owner's key is an Ed25519 key", path.name)
    return private


def _read_private(path: Path) -> bytes:
    try:
        # O_NONBLOCK: opening a FIFO would wait for ever. The mode is that of the open file, which nobody can swap.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_KEY_FILE:
                raise CryptoError("KEY_FORMAT", "this is not a key file", path.name)
            if status.st_mode & 0o077:
                raise CryptoError("KEY_PERMISSIONS", "others than the owner may use the file", path.name)
            return file.read()
    except OSError as error:
        what = f"the data owner's key cannot be read ({error.strerror})"
        raise CryptoError(
            "KEY_MISSING", what, path.name, hint="give the file that holds the data owner's key"
        ) from None


def _refused(what: str) -> PrivacyError:
    return PrivacyError("LEDGER_OVERRIDE", what, "override")
