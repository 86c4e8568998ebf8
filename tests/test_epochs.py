"""A key epoch on its way from the leader to the members, and its confirmation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PublicKey, Suite

from fedmedgan.shared.errors import CryptoError
from fedmedgan.shared.secure_sum import cipher, epochs
from fedmedgan.shared.secure_sum.epochs import check_confirmation, confirmation, unwrap, wrap
from fedmedgan.shared.secure_sum.keys import generate_identity, new_epoch

STUDY, OTHER_STUDY = "ab" * 32, "ac" * 32
MEMBERS = ("aachen", "bonn", "celle")
LEADER, MEMBER, THIRD = (generate_identity() for _ in MEMBERS)
EPOCH, ANOTHER = new_epoch(7, MEMBERS), new_epoch(7, MEMBERS)
WRAPPED = wrap(EPOCH, MEMBER.wrapping_public, study_hash=STUDY, sender="aachen", recipient="bonn")
ABOUT = {
    "study_hash": STUDY,
    "number": 7,
    "key_id": EPOCH.key_id,
    "members": MEMBERS,
    "sender": "aachen",
    "recipient": "bonn",
}


def seal_by_hand(text: bytes, **about: object) -> bytes:
    """What a leader could send who does not keep to `wrap`."""
    raw = bytes.fromhex(MEMBER.wrapping_public)
    pair = MLKEM768PublicKey.from_public_bytes(raw[:1184]), X25519PublicKey.from_public_bytes(raw[1184:])
    order = ("study_hash", "number", "key_id", "members", "sender", "recipient")
    info = epochs._info(*({**ABOUT, **about}[name] for name in order))
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    return suite.encrypt(text, MLKEM768X25519PublicKey(*pair), info=info)


# ---- wrapped for one member


def test_a_member_gets_the_epoch():
    assert unwrap(MEMBER, WRAPPED, **ABOUT) == EPOCH
    assert len(WRAPPED) == 1120 + 16 + 32 + len(EPOCH.he_secret) <= epochs.MAX_BLOB_BYTES
    for secret in (EPOCH.he_secret[:16], EPOCH.mac_root):
        assert secret not in WRAPPED


def test_the_leader_may_wrap_for_itself():
    about = ABOUT | {"recipient": "aachen"}
    own = wrap(EPOCH, LEADER.wrapping_public, study_hash=STUDY, sender="aachen", recipient="aachen")
    assert unwrap(LEADER, own, **about) == EPOCH


def test_two_wrappings_have_nothing_in_common():
    again = wrap(EPOCH, MEMBER.wrapping_public, study_hash=STUDY, sender="aachen", recipient="bonn")
    assert unwrap(MEMBER, again, **ABOUT) == EPOCH
    assert not {WRAPPED[i : i + 16] for i in range(0, len(WRAPPED), 16)} & {
        again[i : i + 16] for i in range(0, len(again), 16)
    }


@pytest.mark.parametrize(
    "change",
    [
        {"study_hash": OTHER_STUDY},
        {"number": 6},
        {"number": 8},
        {"number": 0},
        {"number": 2**60},
        {"key_id": ANOTHER.key_id},
        {"key_id": EPOCH.key_id.upper()},
        {"key_id": ""},
        {"members": ("aachen", "bonn")},
        {"members": ("aachen", "bonn", "celle", "dessau")},
        {"members": ("bonn", "aachen", "celle")},
        {"members": ()},
        {"sender": "celle"},
        {"sender": "mallory"},
        {"recipient": "celle"},
        {"recipient": "mallory"},
    ],
)
def test_it_opens_for_what_it_was_made_for_alone(change):
    with pytest.raises(CryptoError, match="KEY_UNWRAP"):
        unwrap(MEMBER, WRAPPED, **(ABOUT | change))


@pytest.mark.parametrize("keys", [LEADER, THIRD])
@pytest.mark.parametrize("recipient", MEMBERS)
def test_no_other_hospital_opens_it(keys, recipient):
    with pytest.raises(CryptoError, match="KEY_UNWRAP"):
        unwrap(keys, WRAPPED, **(ABOUT | {"recipient": recipient}))


def test_any_bit_changed():
    """Every byte of the key encapsulation and of the tag, and a sample of the rest."""
    middle = range(1136, len(WRAPPED) - 16, 61)
    for i in (*range(1136), *middle, *range(len(WRAPPED) - 16, len(WRAPPED))):
        altered = WRAPPED[:i] + bytes([WRAPPED[i] ^ 1 << i % 8]) + WRAPPED[i + 1 :]
        with pytest.raises(CryptoError, match="KEY_UNWRAP"):
            unwrap(MEMBER, altered, **ABOUT)


def test_another_length():
    lengths = (*range(11), 31, 32, 1087, 1088, 1119, 1120, 1135, 1136, 1137, 1168, len(WRAPPED) - 1)
    for blob in (*(WRAPPED[:n] for n in lengths), WRAPPED + b"\0", WRAPPED[1:], bytes(len(WRAPPED)), bytes(1 << 20)):
        with pytest.raises(CryptoError, match="KEY_UNWRAP"):
            unwrap(MEMBER, blob, **ABOUT)


def test_too_large_is_refused_before_it_is_decrypted(monkeypatch):
    decrypted: list[int] = []

    class Recording:
        def decrypt(self, blob, private, info):
            decrypted.append(len(blob))
            raise InvalidTag

    monkeypatch.setattr(epochs, "_SUITE", Recording())
    for blob in (bytes(epochs.MAX_BLOB_BYTES + 1), bytes(epochs.MAX_BLOB_BYTES)):
        with pytest.raises(CryptoError, match="KEY_UNWRAP"):
            unwrap(MEMBER, blob, **ABOUT)
    assert decrypted == [epochs.MAX_BLOB_BYTES]


def test_the_key_id_is_bound_beside_being_checked():
    sealed_for_another = seal_by_hand(EPOCH.mac_root + EPOCH.he_secret, key_id=ANOTHER.key_id)
    with pytest.raises(CryptoError, match="KEY_UNWRAP"):
        unwrap(MEMBER, sealed_for_another, **ABOUT)


def test_a_leader_that_sends_something_else():
    """It opens, because the leader sealed it so; what is inside is not the epoch of the key id."""
    assert unwrap(MEMBER, seal_by_hand(EPOCH.mac_root + EPOCH.he_secret), **ABOUT) == EPOCH
    for text in (
        b"",
        EPOCH.mac_root,
        ANOTHER.mac_root + ANOTHER.he_secret,
        ANOTHER.mac_root + EPOCH.he_secret,
        EPOCH.mac_root + ANOTHER.he_secret,
        EPOCH.mac_root + EPOCH.he_secret[:-1],
        EPOCH.he_secret + EPOCH.mac_root,
    ):
        with pytest.raises(CryptoError, match="KEY_UNWRAP"):
            unwrap(MEMBER, seal_by_hand(text), **ABOUT)


@pytest.mark.parametrize("members", [("aachen", "celle"), ("bonn", "celle")])
def test_sender_and_recipient_are_members(members):
    stranger = new_epoch(7, members)
    with pytest.raises(CryptoError, match="KEY_EPOCH"):
        wrap(stranger, MEMBER.wrapping_public, study_hash=STUDY, sender="aachen", recipient="bonn")
    text = stranger.mac_root + stranger.he_secret
    about = {"key_id": stranger.key_id, "members": members}
    with pytest.raises(CryptoError, match="KEY_UNWRAP"):
        unwrap(MEMBER, seal_by_hand(text, **about), **(ABOUT | about))


def test_members_that_are_not_sorted_are_refused_from_a_leader_too():
    about = {"members": ("bonn", "aachen", "celle")}
    with pytest.raises(CryptoError, match="KEY_UNWRAP"):
        unwrap(MEMBER, seal_by_hand(EPOCH.mac_root + EPOCH.he_secret, **about), **(ABOUT | about))


def test_a_key_that_does_not_decrypt_what_it_encrypts(monkeypatch):
    real = cipher.HospitalCipher.decrypt

    def off_by_one(self, blobs, n_slots):
        slots = real(self, blobs, n_slots)
        slots[-1] += 1
        return slots

    monkeypatch.setattr(cipher.HospitalCipher, "decrypt", off_by_one)
    with pytest.raises(CryptoError, match="KEY_UNWRAP"):
        unwrap(MEMBER, WRAPPED, **ABOUT)


@pytest.mark.parametrize(
    "public",
    [
        "",
        "zz" * 1216,
        MEMBER.wrapping_public[:-2],
        MEMBER.wrapping_public + "00",
        pytest.param(MEMBER.exchange_public, id="exchange key"),
        "ff" * 1216,
        MEMBER.wrapping_public[: 2 * 1184] + "00" * 32,  # an X25519 point of small order
        MEMBER.wrapping_public[: 2 * 1184] + "01" + "00" * 31,
        MEMBER.wrapping_public[-64:] + MEMBER.wrapping_public[:-64],
    ],
)
def test_a_public_key_of_another_form(public):
    with pytest.raises(CryptoError, match=r"KEY_FORMAT.*bonn"):
        wrap(EPOCH, public, study_hash=STUDY, sender="aachen", recipient="bonn")


def test_no_secret_in_any_error():
    for text in (ANOTHER.mac_root + ANOTHER.he_secret, b"plain text of the blob"):
        with pytest.raises(CryptoError) as caught:
            unwrap(MEMBER, seal_by_hand(text), **ABOUT)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
        assert "plain text" not in str(caught.value) and ANOTHER.mac_root.hex() not in str(caught.value)


# ---- confirmed by all


def test_every_member_confirms():
    received = unwrap(MEMBER, WRAPPED, **ABOUT)
    for name in MEMBERS:
        given = confirmation(received, study_hash=STUDY, hospital=name)
        assert len(given) == 64 and set(given) <= set("0123456789abcdef")
        check_confirmation(EPOCH, study_hash=STUDY, hospital=name, confirmation=given)


def test_the_first_round_is_not_part_of_it():
    """It is settled on activation, after the confirmations were made."""
    given = confirmation(EPOCH, study_hash=STUDY, hospital="bonn")
    check_confirmation(replace(EPOCH, since_round=9), study_hash=STUDY, hospital="bonn", confirmation=given)


@pytest.mark.parametrize(
    ("epoch", "study", "hospital"),
    [
        (ANOTHER, STUDY, "bonn"),
        (replace(EPOCH, mac_root=ANOTHER.mac_root), STUDY, "bonn"),
        (replace(EPOCH, he_secret=ANOTHER.he_secret), STUDY, "bonn"),
        (replace(EPOCH, number=8), STUDY, "bonn"),
        (replace(EPOCH, members=("aachen", "bonn")), STUDY, "bonn"),
        (EPOCH, OTHER_STUDY, "bonn"),
        (EPOCH, STUDY, "aachen"),
    ],
)
def test_a_confirmation_of_something_else(epoch, study, hospital):
    given = confirmation(epoch, study_hash=study, hospital=hospital)
    with pytest.raises(CryptoError, match=r"KEY_CONFIRM.*bonn"):
        check_confirmation(EPOCH, study_hash=STUDY, hospital="bonn", confirmation=given)


@pytest.mark.parametrize(
    "given", ["", "0" * 64, "not hex", "ä" * 64, "\ud800", pytest.param(EPOCH.key_id, id="key id")]
)
def test_what_is_not_a_confirmation(given):
    with pytest.raises(CryptoError, match="KEY_CONFIRM"):
        check_confirmation(EPOCH, study_hash=STUDY, hospital="bonn", confirmation=given)


def test_one_digit_changed():
    given = confirmation(EPOCH, study_hash=STUDY, hospital="bonn")
    for i in range(64):
        other = given[:i] + ("0" if given[i] != "0" else "1") + given[i + 1 :]
        with pytest.raises(CryptoError, match="KEY_CONFIRM"):
            check_confirmation(EPOCH, study_hash=STUDY, hospital="bonn", confirmation=other)


def test_somebody_who_is_not_a_member():
    given = confirmation(EPOCH, study_hash=STUDY, hospital="mallory")
    with pytest.raises(CryptoError, match=r"KEY_CONFIRM.*mallory"):
        check_confirmation(EPOCH, study_hash=STUDY, hospital="mallory", confirmation=given)
