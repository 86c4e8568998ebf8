"""A file of private keys: for its owner alone, whole or not at all, and sealed where there is a passphrase.

    plain    canonical JSON (RFC 8785): format, kind, values, and a SHA-256 that finds damage
    sealed   8 bytes of magic | salt 16 | nonce 12 | AES-256-GCM of the plain form, the header as associated data;
             key = scrypt(passphrase, salt, n = 2^15, r = 8, p = 1)

Salt and nonce are new for every writing, so no key is used for two texts. The parameters belong to the magic: a file
cannot ask for a weaker or a huge scrypt. Sources: scrypt RFC 7914; AES-GCM NIST SP 800-38D.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedmedgan.shared.errors import CryptoError, RunError

PASSPHRASE_VARIABLE = "FEDMEDGAN_PASSPHRASE_FILE"
"""Environment variable that names the file with the passphrase."""

Value = str | int | list[str]

_FORMAT = "fedmedgan/key-file/v1"
_MAGIC = b"FMGSEAL1"
_SALT_BYTES, _NONCE_BYTES, _TAG_BYTES = 16, 12, 16
_HEADER_BYTES = len(_MAGIC) + _SALT_BYTES + _NONCE_BYTES
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**15, 8, 1
_MAX_FILE_BYTES = 1 << 20
_MAX_PASSPHRASE_BYTES = 1024


def write(path: Path, kind: str, values: Mapping[str, Value], passphrase: bytes | None = None) -> None:
    """Replace a key file, durably and atomically: after a crash it is the old one or the new one, of mode 0600.

    Args:
        kind: what the file is; `read` refuses a file of another kind.
        passphrase: seals the file; None: `passphrase_from_environment`, and a plain file if there is none either.

    Raises:
        CryptoError: KEY_PASSPHRASE, an empty or overlong passphrase.
        RunError: RUN_PATH, the folder cannot be written.
    """
    passphrase = passphrase_from_environment() if passphrase is None else passphrase
    data = _encode(kind, values)
    _replace(path, data if passphrase is None else _seal(data, passphrase))


def read(path: Path, kind: str, passphrase: bytes | None = None) -> dict[str, Value] | None:
    """The values that `write` was given; None where there is no such file.

    | case | code |
    |---|---|
    | a symbolic link, a FIFO, a folder, more than 1 MiB | KEY_FORMAT |
    | group or others may read, write or execute it | KEY_PERMISSIONS |
    | sealed, and no passphrase is known; or the wrong one; or a sealed file with any bit changed | KEY_PASSPHRASE |
    | a plain file that was cut or damaged, of another kind or version, a PEM or a public key | KEY_FORMAT |
    | plain, and a passphrase is known | read: it was written before there was one |

    Raises:
        CryptoError: the codes above; KEY_MISSING, the file cannot be read.
    """
    try:
        data = _read_private(path, os.O_NOFOLLOW, forbidden=0o077)
    except FileNotFoundError:
        return None
    if data.startswith(_MAGIC):
        data = _unseal(data, passphrase_from_environment() if passphrase is None else passphrase, path.name)
    return _decode(data, kind, path.name)


def is_sealed(path: Path) -> bool:
    """Whether a key file needs a passphrase; False where there is no such file.

    Raises:
        CryptoError: as `read`.
    """
    try:
        return _read_private(path, os.O_NOFOLLOW, forbidden=0o077).startswith(_MAGIC)
    except FileNotFoundError:
        return False


def passphrase_from_environment() -> bytes | None:
    """The first line of the file that FEDMEDGAN_PASSPHRASE_FILE names; None where the variable is not set.

    | case | what happens |
    |---|---|
    | the variable is unset or empty | None |
    | the variable is set and the file is not there, is empty or is too long | KEY_PASSPHRASE, never "no passphrase" |
    | mode 0600 or 0400 | read; symbolic links are followed, mounted secrets are links |
    | group or others may use the file | KEY_PERMISSIONS |
    | mode 0440 directly inside $CREDENTIALS_DIRECTORY | read: systemd grants its service by an access control list, |
    | | whose mask stands where the group's bits are |

    Raises:
        CryptoError: KEY_PASSPHRASE, KEY_PERMISSIONS, KEY_FORMAT.
    """
    name = os.environ.get(PASSPHRASE_VARIABLE)
    if not name:
        return None
    path = Path(name)
    by_systemd = str(path.parent) == os.environ.get("CREDENTIALS_DIRECTORY")
    try:
        data = _read_private(path, 0, forbidden=0o037 if by_systemd else 0o077)
    except FileNotFoundError:
        raise CryptoError("KEY_PASSPHRASE", f"the file that {PASSPHRASE_VARIABLE} names is not there") from None
    return _checked(data.split(b"\n", 1)[0].rstrip(b"\r"))


def _encode(kind: str, values: Mapping[str, Value]) -> bytes:
    body: dict[str, Any] = {"format": _FORMAT, "kind": kind, "values": dict(values)}
    return rfc8785.dumps({**body, "sha256": hashlib.sha256(rfc8785.dumps(body)).hexdigest()})


def _decode(data: bytes, kind: str, name: str) -> dict[str, Value]:
    try:
        values = json.loads(data)["values"]
        if _encode(kind, values) == data:  # format, kind, digest and form, all at once
            return values
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise CryptoError("KEY_FORMAT", f"damaged, or not a key file of the kind {kind!r}", name)


def _checked(passphrase: bytes) -> bytes:
    if not 0 < len(passphrase) <= _MAX_PASSPHRASE_BYTES:
        raise CryptoError("KEY_PASSPHRASE", f"a passphrase has 1 to {_MAX_PASSPHRASE_BYTES} bytes")
    return passphrase


def _cipher(passphrase: bytes, salt: bytes) -> AESGCM:
    kdf = Scrypt(salt=salt, length=32, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P)
    return AESGCM(kdf.derive(_checked(passphrase)))


def _seal(data: bytes, passphrase: bytes) -> bytes:
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    header = _MAGIC + salt + nonce
    return header + _cipher(passphrase, salt).encrypt(nonce, data, header)


def _unseal(data: bytes, passphrase: bytes | None, name: str) -> bytes:
    if len(data) < _HEADER_BYTES + _TAG_BYTES:
        raise CryptoError("KEY_FORMAT", "the sealed key file was cut", name)
    if passphrase is None:
        raise CryptoError("KEY_PASSPHRASE", "the key file is sealed and no passphrase is known", name)
    header, sealed = data[:_HEADER_BYTES], data[_HEADER_BYTES:]
    salt, nonce = header[len(_MAGIC) : -_NONCE_BYTES], header[-_NONCE_BYTES:]
    try:
        return _cipher(passphrase, salt).decrypt(nonce, sealed, header)
    except InvalidTag:
        raise CryptoError(
            "KEY_PASSPHRASE", "not the passphrase of this key file, or the file was damaged", name
        ) from None


def _read_private(path: Path, flags: int, forbidden: int) -> bytes:
    """The bytes of a regular file, none of whose `forbidden` mode bits is set.

    Raises:
        FileNotFoundError: there is nothing of that name.
        CryptoError: KEY_FORMAT, KEY_PERMISSIONS, KEY_MISSING.
    """
    if flags & os.O_NOFOLLOW and path.is_symlink():
        raise CryptoError("KEY_FORMAT", "a key file may not be a symbolic link", path.name)
    try:
        # O_NONBLOCK: opening a FIFO would wait for ever. Checks are made on the open file, which nobody can swap.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE_BYTES:
                raise CryptoError("KEY_FORMAT", "this is not a key file", path.name)
            if status.st_mode & forbidden:
                raise CryptoError("KEY_PERMISSIONS", "others than the owner may use the file", path.name)
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CryptoError("KEY_MISSING", f"the key cannot be read ({error.strerror})", path.name) from None


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        rename(new, path)
    except OSError as error:
        raise _unwritable(path, error) from None


def rename(old: Path, new: Path) -> None:
    """Give a key file another name, in place of the file that had it: atomic, and on the disk when this returns.

    Raises:
        RunError: RUN_PATH.
    """
    try:
        os.replace(old, new)
        folder = os.open(new.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _unwritable(new, error) from None


def _unwritable(path: Path, error: OSError) -> RunError:
    hint = "make the folder writable and free some disk"
    return RunError("RUN_PATH", f"keys cannot be written ({error.strerror})", path.name, hint)
