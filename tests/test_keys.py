"""A hospital's keys on disk and in use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fedmedgan.shared.errors import CryptoError, MessageError, RunError
from fedmedgan.shared.secure_sum import keys
from fedmedgan.shared.secure_sum.keys import HospitalKeys, generate_identity, new_epoch, sign, verify

FILES = ("signing.pem", "exchange.pem", "pseudonym.key", "he-secret.key", "mac-root.key")
COMPLETE = generate_identity().with_epoch(*new_epoch())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    COMPLETE.save(tmp_path / "keys")
    return tmp_path / "keys"


def secrets_of(k: HospitalKeys) -> tuple:
    raw = (k.signing.private_bytes_raw(), k.exchange.private_bytes_raw())
    return (*raw, k.pseudonym_key, k.he_secret, k.mac_root)


def test_saved_keys_come_back(folder):
    assert secrets_of(HospitalKeys.load(folder)) == secrets_of(COMPLETE)
    COMPLETE.save(folder)  # again, which changes nothing
    assert secrets_of(HospitalKeys.load(folder)) == secrets_of(COMPLETE)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)


def test_files_are_for_the_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        COMPLETE.save(tmp_path / "keys")
    finally:
        os.umask(before)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "keys").iterdir()} == {0o600}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o601])
def test_wider_permissions_are_refused(folder, name, mode):
    (folder / name).chmod(mode)
    with pytest.raises(CryptoError, match=r"KEY_PERMISSIONS.*" + name):
        HospitalKeys.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CryptoError, match=r"KEY_MISSING.*" + name):
        HospitalKeys.load(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["empty", "cut", "junk", "large"])
def test_malformed_file(folder, name, content):
    path = folder / name
    whole = path.read_bytes()
    changed = {"empty": b"", "cut": whole[: len(whole) // 2], "junk": b"\xff" * 40, "large": bytes(2 << 20)}
    path.write_bytes(changed[content])
    with pytest.raises(CryptoError, match="KEY_FORMAT") as caught:
        HospitalKeys.load(folder)
    assert "PRIVATE KEY" not in str(caught.value)


def test_keys_of_another_kind(folder):
    signing = folder / "signing.pem"
    rsa_key = rsa.generate_private_key(65537, 2048)
    pem = (Encoding.PEM, PrivateFormat.PKCS8)
    public = COMPLETE.signing.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for content in (
        rsa_key.private_bytes(*pem, NoEncryption()),
        COMPLETE.exchange.private_bytes(*pem, NoEncryption()),
        COMPLETE.signing.private_bytes(*pem, BestAvailableEncryption(b"passphrase")),
        public,
    ):
        signing.write_bytes(content)
        with pytest.raises(CryptoError, match="KEY_FORMAT"):
            HospitalKeys.load(folder)


def test_what_is_not_a_file_does_not_hang(folder):
    (folder / "signing.pem").unlink()
    os.mkfifo(folder / "signing.pem", 0o600)
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        HospitalKeys.load(folder)


def test_identity_before_its_epoch(tmp_path):
    identity = generate_identity()
    identity.save(tmp_path)
    loaded = HospitalKeys.load(tmp_path)
    assert (loaded.he_secret, loaded.mac_root) == (b"", b"")
    with pytest.raises(CryptoError, match="KEY_MISSING"):
        _ = loaded.key_id
    first, second = new_epoch(), new_epoch()
    loaded.with_epoch(*first).save(tmp_path)
    loaded.with_epoch(*second).save(tmp_path)  # a new epoch takes the place of the old one
    assert HospitalKeys.load(tmp_path).key_id == keys.key_id(b"".join(second)) != keys.key_id(b"".join(first))


def test_an_identity_is_never_overwritten(folder):
    with pytest.raises(RunError, match="RUN_PATH"):
        generate_identity().save(folder)
    assert secrets_of(HospitalKeys.load(folder)) == secrets_of(COMPLETE)


def test_epoch_of_another_form():
    he_secret, mac_root = new_epoch()
    for bad in ((b"abc", mac_root), (he_secret, b""), (he_secret, bytes(31))):
        with pytest.raises(CryptoError, match="KEY_FORMAT"):
            generate_identity().with_epoch(*bad)


def test_printing_keys_shows_no_key():
    text = repr(COMPLETE) + str(COMPLETE)
    for secret in secrets_of(COMPLETE):
        assert secret.hex() not in text
        assert repr(secret) not in text


def test_new_keys_are_new():
    assert secrets_of(generate_identity())[:3] != secrets_of(generate_identity())[:3]
    assert new_epoch()[0] != new_epoch()[0]
    assert new_epoch()[1] != new_epoch()[1]


# ---- pairs


def test_two_hospitals_share_a_secret_that_no_third_has():
    a, b, c = (generate_identity() for _ in range(3))
    shared = a.shared_secret(b.exchange_public)
    assert shared == b.shared_secret(a.exchange_public)
    assert len(shared) == 32
    assert shared not in (c.shared_secret(a.exchange_public), c.shared_secret(b.exchange_public))


@pytest.mark.parametrize("public", ["", "zz" * 32, "ab" * 31, "00" * 32, "01" + "00" * 31, COMPLETE.exchange_public])
def test_public_keys_that_would_give_a_known_secret(public):
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        COMPLETE.shared_secret(public)


# ---- signatures


def test_signature_holds_for_its_key_message_and_purpose_alone():
    signature = sign(COMPLETE.signing, b"message", "update")
    verify(COMPLETE.signing_public, signature, b"message", "update")
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    for public, sig, message, purpose in (
        (COMPLETE.signing_public, signature, b"message", "ledger"),
        (COMPLETE.signing_public, signature, b"massage", "update"),
        (COMPLETE.signing_public, signature, b"emessage", "updat"),
        (COMPLETE.signing_public, flipped, b"message", "update"),
        (COMPLETE.signing_public, b"", b"message", "update"),
        (generate_identity().signing_public, signature, b"message", "update"),
        ("", signature, b"message", "update"),
        ("xy" * 32, signature, b"message", "update"),
    ):
        with pytest.raises(MessageError, match="MSG_SIGNATURE"):
            verify(public, sig, message, purpose)
