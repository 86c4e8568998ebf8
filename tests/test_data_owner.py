"""The data owner's word: for just one ledger, beside just those others, for just that reason, by just that key."""

from __future__ import annotations

import json
import stat

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import BOOK, SIGNING, ledger_at

from fedmedgan.shared.errors import FedMedGanError
from fedmedgan.shared.privacy.data_owner import (
    allowed_by_owner,
    check_override,
    load_owner_key,
    make_owner_key,
    owner_statement,
    sign_override,
)

OWNER = Ed25519PrivateKey.from_private_bytes(b"\x0a" * 32)
OWNER_KEY = OWNER.public_key().public_bytes_raw().hex()
X, Y, Z = "1" * 64, "2" * 64, "3" * 64
REASON = "IRB 12/26: kidney study beside the lung study"
PASSPHRASE = b"correct horse battery"


def refused(code, act, *args, **options):
    with pytest.raises(FedMedGanError) as caught:
        act(*args, **options)
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.fixture
def ledger(tmp_path):
    with ledger_at(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


def signed(ledger, private=OWNER, **changes):
    about = {"book_id": BOOK, "ledger_id": ledger.history.ledger_id, "others": [Y, X], "reason": REASON}
    return sign_override(private, **{**about, **changes})


def test_what_is_signed_is_canonical_and_has_its_own_domain():
    statement = owner_statement(BOOK, Z, [Y, X, Y], "früher")
    body = {"book": BOOK, "ledger": Z, "others": [X, Y], "reason": "früher"}
    assert statement == b"fedmedgan ledger override 1\n" + rfc8785.dumps(body)
    assert statement == owner_statement(BOOK, Z, (X, Y), "früher")


names = st.sampled_from([X, Y, Z, "4" * 64])
statements = st.tuples(names, names, st.frozensets(names, min_size=1), st.text("abc \"'\\,é", min_size=1, max_size=5))


@settings(deadline=None, max_examples=60)
@given(statements, statements)
def test_different_permissions_are_different_bytes(one, other):
    valid = [s for s in (one, other) if s[1] not in s[2] and s[3].strip()]
    said = {owner_statement(*s) for s in valid}
    assert len(said) == len(set(valid))


def test_a_permission_goes_through_the_ledger(ledger):
    fields = signed(ledger)
    assert fields["ledgers"] == [X, Y]
    check_override(fields, ledger.history, OWNER_KEY)
    assert allowed_by_owner(ledger.history, OWNER_KEY) == frozenset()
    ledger.override(**fields)
    ledger.override(**signed(ledger, others=[Z]))
    assert allowed_by_owner(ledger.history, OWNER_KEY) == {X, Y, Z}
    assert allowed_by_owner(ledger.history, "") == frozenset()
    check_override(json.loads(json.dumps(ledger.history.overrides[0])), ledger.history, OWNER_KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"ledgers": [X]},
        {"ledgers": [X, Y, Z]},
        {"ledgers": [X, Z]},
        {"reason": REASON + "."},
        {"owner_signature": "0" * 128},
        {"owner_signature": "zz"},
        {"owner_key": X},
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_else_is_no_permission(ledger, change):
    fields = signed(ledger) | change
    refused("LEDGER_OVERRIDE", check_override, fields, ledger.history, OWNER_KEY)
    if change != {"owner_signature": "zz"}:
        ledger.override(**fields)
        assert allowed_by_owner(ledger.history, OWNER_KEY) == frozenset()


def test_a_permission_for_another_ledger_book_or_by_another_key(ledger):
    stranger = Ed25519PrivateKey.generate()
    for fields in (signed(ledger, ledger_id=Z), signed(ledger, book_id=Z), signed(ledger, stranger)):
        refused("LEDGER_OVERRIDE", check_override, fields, ledger.history, OWNER_KEY)
    # The stranger's signature under the owner's name.
    forged = signed(ledger, stranger) | {"owner_key": OWNER_KEY}
    refused("LEDGER_OVERRIDE", check_override, forged, ledger.history, OWNER_KEY)


def test_no_owner_and_the_hospital_itself(ledger):
    assert "no data owner" in refused("LEDGER_OVERRIDE", check_override, signed(ledger), ledger.history, "").what
    own = signed(ledger, SIGNING)
    refused("LEDGER_OVERRIDE", check_override, own, ledger.history, own["owner_key"])
    ledger.override(**own)
    assert allowed_by_owner(ledger.history, own["owner_key"]) == frozenset()


@pytest.mark.parametrize(
    "change",
    [
        {"others": []},
        {"others": [Z, X]},
        {"others": ["X" * 64]},
        {"ledger_id": Z[1:]},
        {"book_id": ""},
        {"reason": ""},
        {"reason": " "},
        {"reason": "two\nlines"},
        {"reason": "x" * 201},
    ],
    ids=str,
)
def test_what_cannot_be_signed(change):
    about = {"book_id": BOOK, "ledger_id": Z, "others": [X], "reason": REASON}
    refused("LEDGER_OVERRIDE", sign_override, OWNER, **{**about, **change})


# ---- the key


def test_the_owners_key_is_sealed_and_never_replaced(tmp_path):
    path = tmp_path / "owner.pem"
    public = make_owner_key(path, PASSPHRASE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"ENCRYPTED PRIVATE KEY" in path.read_bytes()
    assert load_owner_key(path, PASSPHRASE).public_key().public_bytes_raw().hex() == public
    before = path.read_bytes()
    refused("RUN_PATH", make_owner_key, path, PASSPHRASE)
    assert path.read_bytes() == before
    refused("RUN_PATH", make_owner_key, tmp_path / "absent" / "owner.pem", PASSPHRASE)


def test_passphrases(tmp_path):
    path = tmp_path / "owner.pem"
    for short in (b"", b"eleven byte", b"x" * 1024):
        refused("KEY_PASSPHRASE", make_owner_key, path, short)
    assert not path.exists()
    make_owner_key(path, PASSPHRASE)
    for wrong in (b"", b"another phrase", PASSPHRASE + b" "):
        error = refused("KEY_PASSPHRASE", load_owner_key, path, wrong)
        assert PASSPHRASE.decode() not in error.line()
    path.write_bytes(path.read_bytes()[:100])
    refused("KEY_PASSPHRASE", load_owner_key, path, PASSPHRASE)


def test_files_that_are_no_owners_key(tmp_path):
    path = tmp_path / "owner.pem"
    refused("KEY_MISSING", load_owner_key, path, PASSPHRASE)
    curve = generate_private_key(SECP256R1())
    sealed, open_ = BestAvailableEncryption(PASSPHRASE), NoEncryption()
    for private, sealing in ((curve, sealed), (OWNER, open_)):
        path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealing))
        path.chmod(0o600)
        refused("KEY_FORMAT", load_owner_key, path, PASSPHRASE)
    path.write_bytes(b"")
    refused("KEY_FORMAT", load_owner_key, path, PASSPHRASE)
    path.write_bytes(bytes(1 << 17))
    refused("KEY_FORMAT", load_owner_key, path, PASSPHRASE)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_may_use(tmp_path, mode):
    path = tmp_path / "owner.pem"
    make_owner_key(path, PASSPHRASE)
    path.chmod(mode)
    refused("KEY_PERMISSIONS", load_owner_key, path, PASSPHRASE)
    path.chmod(0o400)
    load_owner_key(path, PASSPHRASE)
