"""A hospital's keys on disk and in use."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PublicKey, Suite
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fedmedgan.shared.errors import CryptoError, MessageError, RunError
from fedmedgan.shared.secure_sum import key_file
from fedmedgan.shared.secure_sum.keys import (
    HospitalKeys,
    activate_next,
    fingerprint,
    generate_identity,
    load_signing_key,
    new_epoch,
    passphrase_from_environment,
    save_signing_key,
    sign,
    store_next,
    verify,
)

FILES = ("identity.key", "epoch.key", "next-epoch.key")
MEMBERS = ("aachen", "bonn", "celle")
FIRST, SECOND, THIRD = (new_epoch(number, MEMBERS) for number in (1, 2, 3))
COMPLETE = replace(generate_identity(), epoch=FIRST, next_epoch=SECOND)
PASSPHRASE = b"correct horse battery staple"


@pytest.fixture(autouse=True)
def _no_passphrase_around(monkeypatch):
    monkeypatch.delenv(key_file.PASSPHRASE_VARIABLE, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    COMPLETE.save(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def weak_scrypt(monkeypatch):
    """Sealing costs 0.1 s on purpose; tests that open hundreds of files turn it down."""
    monkeypatch.setattr(key_file, "_SCRYPT_N", 2)


def secrets_of(k: HospitalKeys) -> list[bytes]:
    found = [k.signing.private_bytes_raw(), k.exchange.private_bytes_raw(), k.wrapping_seed]
    for epoch in (k.epoch, k.next_epoch):
        found += [epoch.he_secret, epoch.mac_root] if epoch else []
    return found


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


# ---- what is written, and read again


def test_saved_keys_come_back(folder):
    assert secrets_of(HospitalKeys.load(folder)) == secrets_of(COMPLETE)
    assert (HospitalKeys.load(folder).epoch, HospitalKeys.load(folder).next_epoch) == (FIRST, SECOND)
    before = everything_in(folder)
    COMPLETE.save(folder)  # again, which changes nothing
    assert everything_in(folder) == before
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
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604, 0o601])
def test_wider_permissions_are_refused(folder, name, mode):
    (folder / name).chmod(mode)
    with pytest.raises(CryptoError, match=r"KEY_PERMISSIONS.*" + name):
        HospitalKeys.load(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(CryptoError, match="KEY_MISSING"):
        HospitalKeys.load(tmp_path / "nowhere")
    for name in ("next-epoch.key", "epoch.key"):
        (folder / name).unlink()
    without = HospitalKeys.load(folder)
    assert without.epoch is None and without.next_epoch is None
    for name in ("key_id", "he_secret", "mac_root"):
        with pytest.raises(CryptoError, match="KEY_MISSING"):
            getattr(without, name)
    (folder / "identity.key").unlink()
    with pytest.raises(CryptoError, match=r"KEY_MISSING.*identity.key"):
        HospitalKeys.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_plain_file_that_was_altered_or_cut(folder, name):
    path = folder / name
    whole = path.read_bytes()
    step = max(1, len(whole) // 60)
    wrong = [whole[:n] for n in range(0, len(whole), step)]
    wrong += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), step)]
    wrong += [whole + b"\n", b" " + whole, b"\xff" * 40, b"[" * 100_000]
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(CryptoError, match="KEY_FORMAT") as caught:
            HospitalKeys.load(folder)
        assert not any(base64.b64encode(s).decode()[:20] in str(caught.value) for s in secrets_of(COMPLETE))


def test_a_large_file_is_not_read(folder):
    with open(folder / "identity.key", "ab") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(CryptoError, match=r"KEY_FORMAT.*this is not a key file"):
        HospitalKeys.load(folder)


def test_keys_of_another_kind(folder):
    path = folder / "identity.key"
    rsa_key = rsa.generate_private_key(65537, 2048)
    pem = (Encoding.PEM, PrivateFormat.PKCS8)
    public = COMPLETE.signing.public_key()
    for content in (
        rsa_key.private_bytes(*pem, NoEncryption()),
        COMPLETE.signing.private_bytes(*pem, NoEncryption()),
        COMPLETE.signing.private_bytes(*pem, BestAvailableEncryption(b"passphrase")),
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes_raw(),
        COMPLETE.signing_public.encode(),
        json.dumps({"signing_key": COMPLETE.signing_public, "exchange_key": COMPLETE.exchange_public}).encode(),
    ):
        path.write_bytes(content)
        with pytest.raises(CryptoError, match="KEY_FORMAT"):
            HospitalKeys.load(folder)


@pytest.mark.parametrize("missing", ["signing", "exchange", "wrapping"])
@pytest.mark.parametrize("other", [None, "", "AAAA", "not base64", "A" * 43 + "=!", 7, COMPLETE.wrapping_public])
def test_an_identity_of_another_form(folder, missing, other):
    values = COMPLETE._identity() | {missing: other}
    if other is None:
        del values[missing]
    key_file.write(folder / "identity.key", "identity", values)
    with pytest.raises(CryptoError, match=r"KEY_FORMAT.*" + missing):
        HospitalKeys.load(folder)


def test_one_file_in_the_place_of_another(folder, tmp_path):
    save_signing_key(tmp_path / "coordinator.key", COMPLETE.signing)
    for target, source in (
        ("identity.key", folder / "epoch.key"),
        ("epoch.key", folder / "identity.key"),
        ("identity.key", tmp_path / "coordinator.key"),
    ):
        kept = (folder / target).read_bytes()
        (folder / target).write_bytes(source.read_bytes())
        with pytest.raises(CryptoError, match="KEY_FORMAT"):
            HospitalKeys.load(folder)
        (folder / target).write_bytes(kept)
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        load_signing_key(folder / "identity.key")


def test_an_old_epoch_put_back_as_the_next_one(folder):
    old = (folder / "epoch.key").read_bytes()
    activate_next(folder, since_round=5)
    (folder / "next-epoch.key").write_bytes(old)
    (folder / "next-epoch.key").chmod(0o600)
    with pytest.raises(CryptoError, match="KEY_EPOCH"):
        HospitalKeys.load(folder)
    with pytest.raises(CryptoError, match="KEY_EPOCH"):
        activate_next(folder, since_round=9)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "dangling link"])
def test_what_is_not_a_file_is_refused_and_does_not_hang(folder, tmp_path, name, kind):
    path = folder / name
    path.rename(tmp_path / "elsewhere")
    make = {
        "fifo": lambda: os.mkfifo(path, 0o600),
        "folder": lambda: path.mkdir(0o700),
        "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
        "dangling link": lambda: path.symlink_to(tmp_path / "nowhere"),
    }
    make[kind]()
    with pytest.raises(CryptoError, match=r"KEY_FORMAT.*" + name):
        HospitalKeys.load(folder)


def test_an_identity_is_never_overwritten(folder):
    before = everything_in(folder)
    with pytest.raises(RunError, match="RUN_PATH"):
        generate_identity().save(folder)
    assert everything_in(folder) == before
    (folder / "identity.key").write_bytes(b"damaged")
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        COMPLETE.save(folder)
    assert (folder / "identity.key").read_bytes() == b"damaged"


def test_an_epoch_is_never_replaced_by_an_older_one(folder):
    replace(COMPLETE, epoch=THIRD, next_epoch=None).save(folder)
    for stale in (FIRST, replace(THIRD, mac_root=bytes(32)), replace(THIRD, members=("aachen", "bonn"))):
        with pytest.raises(CryptoError, match="KEY_EPOCH"):
            replace(COMPLETE, epoch=stale, next_epoch=None).save(folder)


def test_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises((RunError, CryptoError), match=r"RUN_PATH|KEY_MISSING"):
        COMPLETE.save(tmp_path / "file" / "keys")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = HospitalKeys.load(folder)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"RUN_PATH.*No space"):
        store_next(folder, THIRD)
    with pytest.raises(RunError, match=r"RUN_PATH.*No space"):
        activate_next(folder, 2)
    monkeypatch.undo()
    assert secrets_of(HospitalKeys.load(folder)) == secrets_of(before)


def test_printing_keys_shows_no_key():
    text = repr(COMPLETE) + str(COMPLETE) + repr(FIRST)
    for secret in secrets_of(COMPLETE):
        assert secret.hex() not in text
        assert repr(secret) not in text
    assert repr(FIRST) == f"Epoch(number=1, members={MEMBERS!r}, since_round=1)"


def test_new_keys_are_new():
    first, second = secrets_of(generate_identity()), secrets_of(generate_identity())
    assert not set(first) & set(second)
    assert new_epoch(1, MEMBERS).he_secret != FIRST.he_secret
    assert new_epoch(1, MEMBERS).mac_root != FIRST.mac_root


# ---- sealed with a passphrase


def test_sealed_keys_come_back_with_their_passphrase_alone(tmp_path):
    COMPLETE.save(tmp_path, PASSPHRASE)
    assert secrets_of(HospitalKeys.load(tmp_path, PASSPHRASE)) == secrets_of(COMPLETE)
    for wrong in (None, b"", b"Correct horse battery staple", PASSPHRASE + b"\n"):
        with pytest.raises(CryptoError, match=r"KEY_PASSPHRASE") as caught:
            HospitalKeys.load(tmp_path, wrong)
        assert PASSPHRASE.decode() not in str(caught.value)
    text = everything_in(tmp_path)
    for secret in secrets_of(COMPLETE):
        assert secret not in text and base64.b64encode(secret)[:20] not in text


def test_a_sealed_file_is_what_the_page_says(tmp_path):
    """Opened by hand: hashlib's scrypt (OpenSSL) and AES-GCM, with the parameters of the decision page."""
    save_signing_key(tmp_path / "sealed", COMPLETE.signing, PASSPHRASE)
    save_signing_key(tmp_path / "plain", COMPLETE.signing)
    data = (tmp_path / "sealed").read_bytes()
    magic, salt, nonce, sealed = data[:8], data[8:24], data[24:36], data[36:]
    key = hashlib.scrypt(PASSPHRASE, salt=salt, n=2**15, r=8, p=1, maxmem=2**26, dklen=32)
    assert magic == b"FMGSEAL1"
    opened = AESGCM(key).decrypt(nonce, sealed, data[:36])
    assert opened == (tmp_path / "plain").read_bytes()
    document = json.loads(opened)
    assert base64.b64decode(document["values"]["signing"]) == COMPLETE.signing.private_bytes_raw()


def test_salt_and_nonce_are_new_for_every_writing(tmp_path, weak_scrypt):
    headers = []
    for number in range(20):
        save_signing_key(tmp_path / str(number), COMPLETE.signing, PASSPHRASE)
        headers.append((tmp_path / str(number)).read_bytes()[8:36])
    assert len({h[:16] for h in headers}) == len({h[16:] for h in headers}) == 20


@pytest.mark.parametrize("length", [8, 23, 36, 51])
def test_a_sealed_file_cut_to_its_header_is_no_wrong_passphrase(tmp_path, length):
    save_signing_key(tmp_path / "key", COMPLETE.signing, PASSPHRASE)
    (tmp_path / "key").write_bytes((tmp_path / "key").read_bytes()[:length])
    with pytest.raises(CryptoError, match=r"KEY_FORMAT.*cut"):
        load_signing_key(tmp_path / "key", PASSPHRASE)


@pytest.mark.parametrize("name", FILES)
def test_a_sealed_file_that_was_altered_or_cut(tmp_path, weak_scrypt, name):
    COMPLETE.save(tmp_path, PASSPHRASE)
    path = tmp_path / name
    whole = path.read_bytes()
    step = max(1, len(whole) // 60)
    places = [*range(60), *range(60, len(whole), step), *range(len(whole) - 17, len(whole))]
    wrong = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in places]
    wrong += [whole[:n] for n in (*range(60), *range(60, len(whole), step), len(whole) - 1)] + [whole + b"\0"]
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(CryptoError, match=r"KEY_FORMAT|KEY_PASSPHRASE"):
            HospitalKeys.load(tmp_path, PASSPHRASE)


def test_no_key_is_written_in_the_clear_beside_a_sealed_identity(tmp_path):
    generate_identity().save(tmp_path, PASSPHRASE)
    with pytest.raises(CryptoError, match="KEY_PASSPHRASE"):
        store_next(tmp_path, FIRST)
    assert [p.name for p in tmp_path.iterdir()] == ["identity.key"]
    with pytest.raises(CryptoError, match="KEY_PASSPHRASE"):
        generate_identity().save(tmp_path)
    with pytest.raises(CryptoError, match="KEY_PASSPHRASE"):
        generate_identity().save(tmp_path, b"another")


def test_a_plain_file_is_read_when_a_passphrase_is_known(folder):
    assert secrets_of(HospitalKeys.load(folder, PASSPHRASE)) == secrets_of(COMPLETE)


def test_everything_takes_the_passphrase_of_the_environment(tmp_path, monkeypatch):
    secret = tmp_path / "passphrase"
    secret.write_bytes(PASSPHRASE + b"\r\nsecond line\n")
    secret.chmod(0o600)
    monkeypatch.setenv(key_file.PASSPHRASE_VARIABLE, str(secret))
    home = tmp_path / "keys"
    generate_identity().save(home)
    store_next(home, FIRST)
    activate_next(home, 1)
    store_next(home, SECOND)
    save_signing_key(home / "coordinator.key", COMPLETE.signing)
    assert all(key_file.is_sealed(path) for path in home.iterdir())
    assert HospitalKeys.load(home).key_id == FIRST.key_id
    load_signing_key(home / "coordinator.key")
    monkeypatch.delenv(key_file.PASSPHRASE_VARIABLE)
    assert HospitalKeys.load(home, PASSPHRASE).next_epoch == SECOND
    with pytest.raises(CryptoError, match="KEY_PASSPHRASE"):
        HospitalKeys.load(home)


@pytest.mark.parametrize(
    ("content", "mode", "code"),
    [
        (b"secret\n", 0o600, None),
        (b"secret", 0o400, None),
        (b"secret\r\n", 0o600, None),
        (b"", 0o600, "KEY_PASSPHRASE"),
        (b"\nsecret", 0o600, "KEY_PASSPHRASE"),
        (b"x" * 1025, 0o600, "KEY_PASSPHRASE"),
        (b"secret", 0o640, "KEY_PERMISSIONS"),
        (b"secret", 0o440, "KEY_PERMISSIONS"),
        (b"secret", 0o604, "KEY_PERMISSIONS"),
    ],
)
def test_the_file_with_the_passphrase(tmp_path, monkeypatch, content, mode, code):
    path, link = tmp_path / "passphrase", tmp_path / "link"
    path.write_bytes(content)
    path.chmod(mode)
    link.symlink_to(path)
    for name in (path, link):
        monkeypatch.setenv(key_file.PASSPHRASE_VARIABLE, str(name))
        if code is None:
            assert passphrase_from_environment() == b"secret"
        else:
            with pytest.raises(CryptoError, match=code) as caught:
                passphrase_from_environment()
            assert "secret" not in str(caught.value)


def test_a_passphrase_file_that_is_none(tmp_path, monkeypatch):
    assert passphrase_from_environment() is None
    monkeypatch.setenv(key_file.PASSPHRASE_VARIABLE, "")
    assert passphrase_from_environment() is None
    monkeypatch.setenv(key_file.PASSPHRASE_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(CryptoError, match="KEY_PASSPHRASE"):  # never "then without a passphrase"
        COMPLETE.save(tmp_path / "keys")
    assert not (tmp_path / "keys" / "identity.key").exists()
    os.mkfifo(tmp_path / "fifo", 0o600)
    monkeypatch.setenv(key_file.PASSPHRASE_VARIABLE, str(tmp_path / "fifo"))
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        passphrase_from_environment()


def test_a_credential_of_systemd(tmp_path, monkeypatch):
    """Group-readable by its ACL mask, and only where systemd puts credentials."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    for parent in (credentials, tmp_path):
        (parent / "passphrase").write_bytes(b"secret")
        (parent / "passphrase").chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    monkeypatch.setenv(key_file.PASSPHRASE_VARIABLE, str(credentials / "passphrase"))
    assert passphrase_from_environment() == b"secret"
    for path, mode in ((tmp_path / "passphrase", 0o440), (credentials / "passphrase", 0o444)):
        path.chmod(mode)
        monkeypatch.setenv(key_file.PASSPHRASE_VARIABLE, str(path))
        with pytest.raises(CryptoError, match="KEY_PERMISSIONS"):
            passphrase_from_environment()


# ---- epochs


@pytest.mark.parametrize(
    "change",
    [
        {"number": 0},
        {"number": 10_001},
        {"number": True},
        {"number": "1"},
        {"since_round": 0},
        {"members": ()},
        {"members": ("bonn", "aachen")},
        {"members": ("bonn", "bonn")},
        {"mac_root": b""},
        {"mac_root": bytes(31)},
        {"he_secret": b""},
        {"he_secret": b"abc"},
        {"he_secret": FIRST.he_secret[:-1]},
    ],
)
def test_an_epoch_of_another_form(change):
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        replace(FIRST, **change)


@pytest.mark.parametrize(
    "change", [{"number": "1"}, {"members": 3}, {"members": None}, {"he_secret": 1}, {"mac_root": ""}]
)
def test_an_epoch_file_of_another_form(folder, change):
    values = key_file.read(folder / "epoch.key", "epoch")
    key_file.write(folder / "epoch.key", "epoch", values | change)
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        HospitalKeys.load(folder)


def test_the_members_of_a_new_epoch_are_sorted():
    assert new_epoch(1, ("celle", "aachen")).members == ("aachen", "celle")


def test_the_key_id_names_both_keys():
    assert len(FIRST.key_id) == 32
    assert len({e.key_id for e in (FIRST, SECOND, replace(FIRST, mac_root=bytes(32)))}) == 3
    assert COMPLETE.key_id == FIRST.key_id


def test_from_the_first_epoch_to_the_second(tmp_path):
    generate_identity().save(tmp_path)
    store_next(tmp_path, FIRST)
    store_next(tmp_path, FIRST)  # granted twice
    assert HospitalKeys.load(tmp_path).epoch is None
    assert HospitalKeys.load(tmp_path).next_epoch == FIRST
    assert activate_next(tmp_path, 4) == replace(FIRST, since_round=4)
    assert HospitalKeys.load(tmp_path).epoch == replace(FIRST, since_round=4)
    assert HospitalKeys.load(tmp_path).next_epoch is None
    assert activate_next(tmp_path, 4) == replace(FIRST, since_round=4)  # started twice
    store_next(tmp_path, FIRST)  # granted once more, long after
    assert HospitalKeys.load(tmp_path).next_epoch is None
    store_next(tmp_path, SECOND)
    activate_next(tmp_path, 4)  # no round was done under the first
    assert HospitalKeys.load(tmp_path).key_id == SECOND.key_id
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch.key", "identity.key"]


def test_the_old_secret_is_gone(folder):
    old = base64.b64encode(FIRST.he_secret), base64.b64encode(FIRST.mac_root)
    assert all(secret in everything_in(folder) for secret in old)
    activate_next(folder, 7)
    assert not any(secret in everything_in(folder) for secret in old)


def test_epochs_that_do_not_follow(folder):
    for stale in (
        replace(FIRST, mac_root=bytes(32)),  # the number in use, other keys
        replace(SECOND, mac_root=bytes(32)),  # the number of the next, other keys
        replace(SECOND, members=("aachen", "bonn")),
    ):
        with pytest.raises(CryptoError, match="KEY_EPOCH"):
            store_next(folder, stale)
    store_next(folder, THIRD)  # the second was never confirmed
    with pytest.raises(CryptoError, match="KEY_EPOCH"):
        store_next(folder, SECOND)
    activate_next(folder, 7)
    assert HospitalKeys.load(folder).key_id == THIRD.key_id
    with pytest.raises(CryptoError, match="KEY_EPOCH"):
        store_next(folder, SECOND)
    with pytest.raises(CryptoError, match=r"KEY_EPOCH.*no next"):
        activate_next(folder, 8)


def test_a_first_round_in_the_past(folder):
    activate_next(folder, 7)
    store_next(folder, THIRD)
    with pytest.raises(CryptoError, match="KEY_EPOCH"):
        activate_next(folder, 6)
    assert HospitalKeys.load(folder).epoch.since_round == 7


def test_there_is_nothing_to_activate(tmp_path):
    generate_identity().save(tmp_path)
    with pytest.raises(CryptoError, match="KEY_EPOCH"):
        activate_next(tmp_path, 1)


_DIE = """
import os, sys
from pathlib import Path
from fedmedgan.shared.secure_sum import keys
folder, action, die_before = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
epoch = keys.HospitalKeys.load(folder / "made").next_epoch if action == "store" else None
calls = 0
def dying(call):
    def wrapper(*arguments, **named):
        global calls
        calls += 1
        if calls == die_before:
            os._exit(137)
        return call(*arguments, **named)
    return wrapper
for name in ("fsync", "replace"):
    setattr(os, name, dying(getattr(os, name)))
if action == "store":
    keys.store_next(folder, epoch)
else:
    keys.activate_next(folder, 9)
"""


@pytest.mark.parametrize(("action", "calls"), [("store", 3), ("activate", 5)])
def test_the_process_dies_at_any_moment(tmp_path, action, calls):
    """Before each fsync and each rename, and once not at all. Then it is done again, and holds."""
    for die_before in range(1, calls + 2):
        folder = tmp_path / str(die_before)
        replace(COMPLETE, next_epoch=SECOND if action == "activate" else None).save(folder)
        COMPLETE.save(folder / "made")
        command = [sys.executable, "-c", _DIE, str(folder), action, str(die_before)]
        ended = subprocess.run(command, check=False, timeout=60).returncode
        assert ended == (0 if die_before > calls else 137)
        found = HospitalKeys.load(folder)  # loads whatever happened, and is one of the two states
        if action == "store":
            assert (found.epoch, found.next_epoch) in ((FIRST, None), (FIRST, SECOND))
            store_next(folder, SECOND)
            assert HospitalKeys.load(folder).next_epoch == SECOND
        else:
            store_next(folder, SECOND)  # the grant comes again: nothing changes
            numbers = (found.epoch.number, found.next_epoch and found.next_epoch.number)
            assert numbers in ((1, 2), (2, None))
        assert activate_next(folder, 9) == replace(SECOND, since_round=9)
        after = HospitalKeys.load(folder)
        assert (after.epoch, after.next_epoch) == (replace(SECOND, since_round=9), None)
        assert base64.b64encode(FIRST.mac_root) not in b"".join(p.read_bytes() for p in folder.glob("*.key*"))


def test_files_and_their_folder_are_synced(tmp_path, monkeypatch):
    generate_identity().save(tmp_path)
    synced: list[tuple[int, int]] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store_next(tmp_path, FIRST)
    activate_next(tmp_path, 1)
    for path in (tmp_path, tmp_path / "epoch.key"):
        assert (path.stat().st_dev, path.stat().st_ino) in synced
    assert synced[-1] == (tmp_path.stat().st_dev, tmp_path.stat().st_ino)  # after the last rename


# ---- the coordinator's key, and fingerprints


def test_a_signing_key_alone(tmp_path):
    path = tmp_path / "coordinator.key"
    with pytest.raises(CryptoError, match="KEY_MISSING"):
        load_signing_key(path)
    save_signing_key(path, COMPLETE.signing)
    save_signing_key(path, COMPLETE.signing)
    assert load_signing_key(path).private_bytes_raw() == COMPLETE.signing.private_bytes_raw()
    with pytest.raises(RunError, match="RUN_PATH"):
        save_signing_key(path, generate_identity().signing)
    path.chmod(0o644)
    with pytest.raises(CryptoError, match="KEY_PERMISSIONS"):
        load_signing_key(path)


def test_a_fingerprint_names_site_and_all_three_keys():
    parts = ["bonn", "ab" * 32, "cd" * 32, "ef" * 1216]
    groups = fingerprint(*parts).split(" ")
    assert len(groups) == 10 and all(len(g) == 4 and set(g) <= set("0123456789abcdef") for g in groups)
    assert fingerprint(*[p.upper() if i else p for i, p in enumerate(parts)]) == fingerprint(*parts)
    others = [[*parts[:i], part[:-1] + "0", *parts[i + 1 :]] for i, part in enumerate(parts)]
    others += [["bonn", parts[2], parts[1], parts[3]], ["bonn" + parts[1], "", parts[2], parts[3]]]
    assert len({fingerprint(*other) for other in (parts, *others)}) == len(others) + 1
    assert fingerprint(*parts) == "cdf0 f197 c047 67c8 1d4b 0fd5 28b9 45df d3d0 7a88"


# ---- pairs


def test_two_hospitals_share_a_secret_that_no_third_has():
    a, b, c = (generate_identity() for _ in range(3))
    shared = a.shared_secret(b.exchange_public)
    assert shared == b.shared_secret(a.exchange_public)
    assert len(shared) == 32
    assert shared not in (c.shared_secret(a.exchange_public), c.shared_secret(b.exchange_public))


@pytest.mark.parametrize(
    "public",
    ["", "zz" * 32, "ab" * 31, "00" * 32, "01" + "00" * 31, pytest.param(COMPLETE.exchange_public, id="own")],
)
def test_public_keys_that_would_give_a_known_secret(public):
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        COMPLETE.shared_secret(public)


def test_what_is_sealed_to_the_wrapping_key_opens_with_it_alone():
    public = bytes.fromhex(COMPLETE.wrapping_public)
    halves = MLKEM768PublicKey.from_public_bytes(public[:1184]), X25519PublicKey.from_public_bytes(public[1184:])
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    sealed = suite.encrypt(b"text", MLKEM768X25519PublicKey(*halves), info=b"")
    assert suite.decrypt(sealed, COMPLETE.wrapping, info=b"") == b"text"
    assert len({COMPLETE.wrapping_public, generate_identity().wrapping_public}) == 2
    swapped = generate_identity().wrapping_seed
    for half in (swapped[:64] + COMPLETE.wrapping_seed[64:], COMPLETE.wrapping_seed[:64] + swapped[64:]):
        with pytest.raises(Exception) as caught:  # one half alone opens nothing
            suite.decrypt(sealed, replace(COMPLETE, wrapping_seed=half).wrapping, info=b"")
        assert type(caught.value).__name__ == "InvalidTag"


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
