"""Slots to BFV ciphertexts and back: a hospital encrypts and decrypts, the server only adds.

BFV (Fan and Vercauteren, eprint 2012/144) with N = 4096, coefficient modulus [60, 20] bits and a 46-bit prime
t, 128-bit security by SEAL's table (which follows the Homomorphic Encryption Standard). Why BFV and not CKKS,
and why these numbers: docs/decisions/0002-bfv-not-ckks.md. Nothing here can be set: two parties of one
version always agree.

Ciphertexts are seeded and symmetric: the uniform half is sent as its 64-byte seed, so an upload is half as
large, and the noise is bounded: every coefficient of a fresh ciphertext is off by at most 21.5 and decryption
is right up to q / 2t = 2^13, so any sum of up to 381 ciphertexts decrypts exactly, the same one added 381
times included. Studies have at most 100 sites. The hospitals' common key is the only key there is; without it
nobody can make a ciphertext.

BFV is malleable and not CCA secure: who may add is settled by signatures, what was added by `proof`. Noise
budgets are never computed. The bindings hold the interpreter lock through every call: use processes, not
threads. SEAL reads and writes files only; an anonymous memory file (Linux) keeps keys and ciphertexts off
every disk.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import struct
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tenseal
import tenseal.sealapi as seal

from fedmedgan.shared.errors import CryptoError
from fedmedgan.shared.secure_sum.quantize import PLAIN_MODULUS, Slots
from fedmedgan.shared.study import MAX_SITES

RING_DEGREE = 4096
"""N: the degree of the ring, and the number of slots of one ciphertext."""
COEFF_MODULUS_BITS = (60, 20)
"""One data prime of 60 bits, and the special prime that SEAL always wants, as small as it may be."""

Kind = Literal["update", "sum"]
_BLOB_BYTES: dict[Kind, tuple[int, int]] = {"update": (32_768, 33_792), "sum": (65_536, 67_584)}
"""Bounds of a serialised ciphertext: seeded 32,972 and full 65,659 bytes with SEAL 4.1, and some room."""

_SEAL_ERRORS = (RuntimeError, ValueError, MemoryError, IndexError, TypeError, OverflowError)


def blobs_for(n_slots: int) -> int:
    """How many ciphertexts carry that many slots."""
    return -(-n_slots // RING_DEGREE)


@functools.cache
def _context() -> Any:
    """SEAL's context: parameters only, no key of any kind."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    parameters.set_poly_modulus_degree(RING_DEGREE)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(RING_DEGREE, list(COEFF_MODULUS_BITS)))
    parameters.set_plain_modulus(PLAIN_MODULUS)
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():  # SEAL does not raise when parameters are below 128 bits
        raise CryptoError("HE_PARAMS_MISMATCH", context.parameters_error_message())
    return context


class _Scratch:
    """A file in memory that SEAL saves to and loads from. Gone when the block ends."""

    def __enter__(self) -> _Scratch:
        self._fd = os.memfd_create("seal")
        self._path = f"/proc/self/fd/{self._fd}"
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def save(self, item: Any) -> bytes:
        os.ftruncate(self._fd, 0)
        item.save(self._path)
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def load(self, item: Any, data: bytes) -> Any:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        item.load(_context(), self._path)
        return item

    def load_ciphertext(self, blob: bytes) -> Any:
        """A ciphertext of our parameters with two polynomials, not transparent. SEAL itself allows more.

        Only coefficients and seed are left to SEAL's parser. Damage before them makes it decompress, and after some of
        that it ends the whole process.
        """
        if not _well_formed(blob):
            raise CryptoError("HE_PARAMS_MISMATCH", "this is not a ciphertext of the study's parameters")
        try:
            item = self.load(seal.Ciphertext(_context()), blob)
            fits = item.size() == 2 and item.parms_id() == _context().first_parms_id()
            if fits and not item.is_ntt_form() and not item.is_transparent():
                return item
        except _SEAL_ERRORS:
            pass
        raise CryptoError("HE_PARAMS_MISMATCH", "this is not a ciphertext of the study's parameters")


_PREFIX_BYTES, _SEED_BYTES = 123, 64
_SEED_AT = _PREFIX_BYTES + 8 * RING_DEGREE
_SEEDED_BYTES, _FULL_BYTES = _SEED_AT + 17 + _SEED_BYTES, _PREFIX_BYTES + 16 * RING_DEGREE


def _well_formed(blob: bytes) -> bool:
    """Whether everything in a serialised ciphertext but its coefficients and its seed is what it has to be."""
    if len(blob) == _SEEDED_BYTES:
        return (blob[:_PREFIX_BYTES], blob[_SEED_AT:-_SEED_BYTES]) == _around(_SEEDED_BYTES, RING_DEGREE)
    return len(blob) == _FULL_BYTES and blob[:_PREFIX_BYTES] == _around(_FULL_BYTES, 2 * RING_DEGREE)[0]


@functools.cache
def _around(size: int, numbers: int) -> tuple[bytes, bytes]:
    """What SEAL writes before the coefficients, and between them and the seed.

    All of it is known: coefficients are uniform, so the compression (Zstandard, RFC 8878) always gives up and stores
    one raw block.

    Args:
        size: bytes of the whole ciphertext.
        numbers: how many coefficients it has.
    """

    def seal_header(compression: int, length: int) -> bytes:
        return struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, compression, 0, length)

    raw = size - 26
    zstandard = b"\x28\xb5\x2f\xfd\x60" + struct.pack("<H", raw - 256) + struct.pack("<I", raw << 3 | 1)[:3]
    # Parameters, not in NTT form, two polynomials of N coefficients of one prime, scale 1, correction 1.
    about = struct.pack("<4QBQQQdQ", *_context().first_parms_id(), 0, 2, RING_DEGREE, 1, 1.0, 1)
    array = seal_header(0, 24 + 8 * numbers) + struct.pack("<Q", numbers)
    return seal_header(2, size) + zstandard + about + array, seal_header(0, 17 + _SEED_BYTES) + b"\x01"


def new_secret() -> bytes:
    """A new secret key, as SEAL serialises it. SEAL draws it from the operating system's randomness."""
    with _Scratch() as scratch:
        return scratch.save(seal.KeyGenerator(_context()).secret_key())


def key_id(secret: bytes) -> str:
    """Public name of a secret key, 32 hex digits: which key, and nothing else about it."""
    return hashlib.sha256(b"fedmedgan/he-key-id/v1\0" + secret).hexdigest()[:32]


def _load_secret(secret: bytes) -> Any:
    try:
        with _Scratch() as scratch:
            return scratch.load(seal.SecretKey(), secret)
    except _SEAL_ERRORS:
        raise CryptoError("KEY_FORMAT", "this is not a secret key of the study's parameters") from None


class HospitalCipher:
    """What a hospital does with the secret key that all hospitals of a study share. Never made at the server.

    Raises:
        CryptoError: KEY_FORMAT, the bytes are not a secret key of these parameters.
    """

    def __init__(self, secret: bytes) -> None:
        key = _load_secret(secret)
        self._encoder = seal.BatchEncoder(_context())
        self._encryptor = seal.Encryptor(_context(), key)
        self._decryptor = seal.Decryptor(_context(), key)

    def encrypt(self, slots: Slots) -> list[bytes]:
        """Slots int64 (S,), each in [0, t), to ceil(S / 4096) seeded ciphertexts of 33 kB.

        | case | what happens |
        |---|---|
        | a value outside [0, t): SEAL would wrap it silently | HE_RANGE |
        | floats, which SEAL would truncate silently | HE_RANGE |
        | S not a multiple of 4096 | the last ciphertext is filled with zeros |
        | S = 0, or more than one dimension | HE_SHAPE |

        Raises:
            CryptoError: HE_RANGE, HE_SHAPE.
        """
        if slots.ndim != 1 or slots.size == 0:
            raise CryptoError("HE_SHAPE", "slots are not a vector")
        if slots.dtype != np.int64 or slots.min() < 0 or slots.max() >= PLAIN_MODULUS:
            raise CryptoError("HE_RANGE", "a slot is not an integer in [0, t)")
        plain, blobs = seal.Plaintext(), []
        with _Scratch() as scratch:
            for start in range(0, slots.size, RING_DEGREE):
                self._encoder.encode(slots[start : start + RING_DEGREE].tolist(), plain)
                blobs.append(scratch.save(self._encryptor.encrypt_symmetric(plain)))
        return blobs

    def decrypt(self, blobs: Sequence[bytes], n_slots: int) -> Slots:
        """Ciphertexts to the first `n_slots` slots, int64 (n_slots,), each in [0, t).

        A ciphertext of another key, or one that was altered, decrypts without complaint to other numbers:
        `proof` tells.

        Raises:
            CryptoError: HE_SHAPE, the number of ciphertexts is not right; HE_PARAMS_MISMATCH, one cannot be
            read.
        """
        if n_slots < 1 or len(blobs) != blobs_for(n_slots):
            raise CryptoError("HE_SHAPE", f"{len(blobs)} ciphertexts for {n_slots} slots")
        slots, plain = np.empty((len(blobs), RING_DEGREE), dtype=np.int64), seal.Plaintext()
        with _Scratch() as scratch:
            for row, blob in zip(slots, blobs, strict=True):
                self._decryptor.decrypt(scratch.load_ciphertext(blob), plain)
                row[:] = self._encoder.decode_uint64(plain)
        return slots.reshape(-1)[:n_slots]


class AddOnly:
    """The server's running sum: it holds parameters and ciphertexts, and no key, public ones included.

    Memory is that of two vectors of ciphertexts, however many hospitals are added.
    """

    def __init__(self, n_blobs: int) -> None:
        if n_blobs < 1:
            raise CryptoError("HE_SHAPE", "a sum needs at least one ciphertext")
        self.n_blobs = n_blobs
        self.count = 0
        """Uploads added so far."""
        self._sum: list[Any] = []
        self._evaluator = seal.Evaluator(_context())

    def add(self, blobs: Sequence[bytes]) -> None:
        """Add one hospital's ciphertexts. On any error the sum is what it was.

        | case | what happens |
        |---|---|
        | another number of ciphertexts | HE_SHAPE |
        | a ciphertext of other parameters, of three polynomials, or transparent | HE_PARAMS_MISMATCH |
        | the upload cancels the sum, which SEAL refuses as transparent | ROUND_REJECTED |
        | more than 100 uploads: the bound up to which sums are exact | HE_SHAPE |
        | the same upload again, another key's upload | added: signatures and `proof` deal with those |

        Raises:
            CryptoError: HE_SHAPE, HE_PARAMS_MISMATCH, ROUND_REJECTED.
        """
        if len(blobs) != self.n_blobs:
            raise CryptoError("HE_SHAPE", f"{len(blobs)} ciphertexts, {self.n_blobs} are expected")
        if self.count >= MAX_SITES:
            raise CryptoError("HE_SHAPE", f"a sum of more than {MAX_SITES} uploads is not sure to be exact")
        with _Scratch() as scratch:
            incoming = [scratch.load_ciphertext(blob) for blob in blobs]
        try:
            if self.count:
                for new, old in zip(incoming, self._sum, strict=True):
                    self._evaluator.add_inplace(new, old)
        except _SEAL_ERRORS:
            raise CryptoError("ROUND_REJECTED", "an upload cancels the sum of the others") from None
        self._sum = incoming
        self.count += 1

    def result(self) -> list[bytes]:
        """The sum so far, `n_blobs` ciphertexts of 66 kB.

        Raises:
            CryptoError: HE_CT_EMPTY, nothing was added.
        """
        if not self._sum:
            raise CryptoError("HE_CT_EMPTY", "nothing was added")
        with _Scratch() as scratch:
            return [scratch.save(item) for item in self._sum]


def refuse_keys(context: bytes) -> None:
    """Check a serialised TenSEAL context that somebody hands to the server: our parameters, and no key in it.

    Raises:
        CryptoError: HE_SECRET_AT_SERVER for a context with any key, public ones included, and for a bare
        secret key;
            HE_PARAMS_MISMATCH for anything else that is not a context of our parameters.
    """
    try:
        _load_secret(context)
    except CryptoError:
        pass  # as it should be
    else:
        raise CryptoError("HE_SECRET_AT_SERVER", "this is a secret key")
    try:
        loaded = tenseal.context_from(context)
        ours = loaded.seal_context().data.first_parms_id() == _context().first_parms_id()
    except _SEAL_ERRORS:
        raise CryptoError("HE_PARAMS_MISMATCH", "this is not a TenSEAL context") from None
    holds = ("has_secret_key", "has_public_key", "has_relin_keys", "has_galois_keys")
    if any(getattr(loaded, name)() for name in holds):
        raise CryptoError("HE_SECRET_AT_SERVER", "this context holds a key")
    if not ours:
        raise CryptoError("HE_PARAMS_MISMATCH", "this context has other parameters")


_MAGIC = b"FMGCIPHR"
_VERSION = 1
_KINDS: dict[Kind, int] = {"update": 1, "sum": 2}
_HEADER = struct.Struct("<8sHH16s32s16sIII")
"""Magic, version, kind, fingerprint of the parameters, study hash, key id, round, attempt, count."""
_DIGEST_BYTES = 32
_PARAMETERS = f"BFV {RING_DEGREE} {COEFF_MODULUS_BITS} {PLAIN_MODULUS}"
_FINGERPRINT = hashlib.sha256(_PARAMETERS.encode()).digest()[:16]


def _binding(study_hash: str, key_id: str, round: int, attempt: int) -> tuple[bytes, bytes, int, int]:
    """What a message belongs to, as it stands in the header."""
    try:
        study, key = bytes.fromhex(study_hash), bytes.fromhex(key_id)
    except ValueError:
        study = key = b""
    numbers = all(0 <= n < 2**32 for n in (round, attempt))
    if len(study) != 32 or len(key) != 16 or not numbers:  # struct would cut or pad them silently
        raise CryptoError("HE_CT_STUDY", "a study hash, key id, round or attempt is not of its form")
    return study, key, round, attempt


def max_frame_bytes(n_blobs: int, kind: Kind) -> int:
    """Largest frame of that many ciphertexts: what a transport needs to let through, and no more."""
    return _HEADER.size + n_blobs * (4 + _BLOB_BYTES[kind][1]) + _DIGEST_BYTES


def frame(blobs: Sequence[bytes], *, study_hash: str, round: int, attempt: int, key_id: str, kind: Kind) -> bytes:
    """Ciphertexts as one message: header, lengths, ciphertexts, SHA-256 over all of it (FIPS 180-4).

    The digest finds damage; that nobody else made the message is for the signature over it.

    Args:
        study_hash: 64 hex digits.
        key_id: 32 hex digits.
        kind: "update" from a hospital (seeded), "sum" from the server (full).

    Raises:
        CryptoError: HE_CT_STUDY, a hash or a number is not of its form.
    """
    binding = _binding(study_hash, key_id, round, attempt)
    header = _HEADER.pack(_MAGIC, _VERSION, _KINDS[kind], _FINGERPRINT, *binding, len(blobs))
    lengths = struct.pack(f"<{len(blobs)}I", *(len(b) for b in blobs))
    body = b"".join((header, lengths, *blobs))
    return body + hashlib.sha256(body).digest()


def unframe(
    data: bytes, *, study_hash: str, round: int, attempt: int, key_id: str, kind: Kind, n_blobs: int
) -> list[bytes]:
    """The ciphertexts of a message, after every check that can be made before a parser sees a byte of them.

    | case, in the order of checking | code |
    |---|---|
    | no bytes | HE_CT_EMPTY |
    | shorter than a header | HE_CT_SIZE |
    | not one of our messages at all | HE_CT_HASH |
    | another version, other encryption parameters | HE_PARAMS_MISMATCH |
    | an update where a sum is expected, or the reverse | HE_CT_STUDY |
    | another number of ciphertexts | HE_SHAPE |
    | a length outside its bounds, or lengths that do not add up to the message | HE_CT_SIZE |
    | the digest differs | HE_CT_HASH |
    | another study, key, round or attempt | HE_CT_STUDY |

    Raises:
        CryptoError: the codes above.
    """
    if not data:
        raise CryptoError("HE_CT_EMPTY", "an empty message")
    if len(data) < _HEADER.size + _DIGEST_BYTES:
        raise CryptoError("HE_CT_SIZE", f"a message of {len(data)} bytes")
    magic, version, kind_code, fingerprint, *binding, count = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise CryptoError("HE_CT_HASH", "this is not a message with ciphertexts")
    if version != _VERSION or fingerprint != _FINGERPRINT:
        raise CryptoError("HE_PARAMS_MISMATCH", "the message is of another version or other parameters")
    if kind_code != _KINDS[kind]:
        raise CryptoError("HE_CT_STUDY", f"the message is not of the kind {kind!r}")
    if count != n_blobs:
        raise CryptoError("HE_SHAPE", f"{count} ciphertexts, {n_blobs} are expected")
    start = _HEADER.size + 4 * count
    if len(data) < start + _DIGEST_BYTES:
        raise CryptoError("HE_CT_SIZE", "the message was cut")
    lengths = struct.unpack_from(f"<{count}I", data, _HEADER.size)
    smallest, largest = _BLOB_BYTES[kind]
    fits = start + sum(lengths) + _DIGEST_BYTES == len(data)
    if not fits or any(not smallest <= n <= largest for n in lengths):
        raise CryptoError("HE_CT_SIZE", "the lengths in the message do not fit it")
    digest = hashlib.sha256(memoryview(data)[:-_DIGEST_BYTES]).digest()
    if not hmac.compare_digest(digest, data[-_DIGEST_BYTES:]):
        raise CryptoError("HE_CT_HASH", "the digest differs")
    if tuple(binding) != _binding(study_hash, key_id, round, attempt):
        raise CryptoError("HE_CT_STUDY", "made for another study, key, round or attempt")
    blobs = []
    for length in lengths:
        blobs.append(data[start : start + length])
        start += length
    return blobs
