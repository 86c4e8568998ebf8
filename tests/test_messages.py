"""Messages: the allow-list, canonical form, signatures and sizes."""

from __future__ import annotations

import json

import pytest
from conftest import tiny_study
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmedgan.shared.errors import FedMedGanError, MessageError
from fedmedgan.shared.messages import (
    PART_BYTES,
    Applied,
    Certificate,
    Envelope,
    EpochOpen,
    EpochStart,
    Header,
    KeyGrant,
    KeyOffer,
    KeyReady,
    Leave,
    Present,
    Refusal,
    Roll,
    RoundOpen,
    Update,
    join_parts,
    parse,
    split_parts,
)
from fedmedgan.shared.secure_sum import keys

IDENTITY = keys.generate_identity()
COORDINATOR = keys.generate_identity().signing
FROM_HOSPITALS = (Present, Leave, KeyOffer, KeyReady, Update, Applied, Refusal)
FROM_THE_SERVER = (Roll, EpochOpen, KeyGrant, EpochStart, RoundOpen, Certificate)


@pytest.fixture(scope="module")
def study():
    base = tiny_study(3)
    site = base.sites[0].model_copy(update={"signing_key": IDENTITY.signing_public})
    public = COORDINATOR.public_key().public_bytes_raw().hex()
    return base.model_copy(update={"sites": (site, *base.sites[1:]), "coordinator_key": public})


@pytest.fixture
def applied(study):
    return Applied(study=study.hash, hospital="site-0", round=1, model_hash="a" * 64)


def test_what_leaves_a_hospital_is_exactly_this():
    """Change this list only with the page that lists what leaves a hospital (docs/what-leaves.md)."""
    fields = {m.__name__: sorted(set(m.model_fields) - {"v", "study"}) for m in FROM_HOSPITALS}
    assert fields == {
        "Present": ["applied_round", "epoch", "hospital", "key_id", "model_hash", "parameters"],
        "Leave": ["hospital"],
        "KeyOffer": ["epoch", "hospital", "key_id", "members", "payload_bytes", "payload_sha256", "wrapped"],
        "KeyReady": ["confirmation", "epoch", "hospital", "key_id"],
        "Update": [
            *("attempt", "cohort", "epoch", "generator_loss", "hospital", "key_id", "ledger_head", "ledger_seq"),
            *("model_hash", "payload_bytes", "payload_sha256", "round", "weight"),
        ],
        "Applied": ["hospital", "model_hash", "round"],
        "Refusal": ["code", "hospital"],
    }
    assert all("hospital" in m.model_fields for m in FROM_HOSPITALS), "the signer is named"
    assert not any("hospital" in m.model_fields for m in FROM_THE_SERVER), "else a hospital could sign it"


def test_a_signed_message_survives_the_wire(study, applied):
    envelope = Envelope.from_record(Envelope.seal(applied, IDENTITY.signing).to_record(), 0)
    assert envelope.open(Applied, study) == applied


def test_a_large_payload_travels_in_parts(study):
    payload = bytes(range(256)) * (PART_BYTES // 128)
    roll = Roll(study=study.hash, approvals=(), anchors=())
    record = Envelope.seal(roll, COORDINATOR, payload).to_record()
    assert len(record["payload"]) == 2
    assert Envelope.from_record(record, len(payload)).payload == payload
    with pytest.raises(MessageError) as caught:
        Envelope.from_record(record, len(payload) - 1)
    assert caught.value.code == "MSG_TOO_LARGE"


def test_no_field_beyond_the_list_passes(study, applied):
    raw = json.loads(applied.canonical())
    for extra in ({"loss_on_real": 0.3}, {"num_examples": 117}):
        with pytest.raises(MessageError) as caught:
            parse(json.dumps({**raw, **extra}, sort_keys=True, separators=(",", ":")).encode(), Applied)
        assert caught.value.code == "MSG_FORMAT"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw + b" ",
        lambda raw: raw.replace(b":1", b":1.0", 1),
        lambda raw: raw.replace(b'"round":1', b'"round":1,"round":1'),
        lambda raw: raw.replace(b'"v":1', b'"v":2'),
        lambda raw: raw.replace(b'"round":1', b'"round":NaN'),
        lambda raw: b"[" * 100_000,
        lambda raw: b"",
        lambda raw: b"\xff",
    ],
)
def test_only_canonical_json_is_read(applied, spoil):
    with pytest.raises(MessageError) as caught:
        parse(spoil(applied.canonical()), Applied)
    assert caught.value.code == "MSG_FORMAT"


def test_signatures_bind_the_kind_the_study_and_every_byte(study, applied):
    sealed = Envelope.seal(applied, IDENTITY.signing)
    other = Envelope.seal(applied.model_copy(update={"round": 2}), IDENTITY.signing)
    as_refusal = Envelope.seal(Refusal(study=study.hash, hospital="site-0", code="DATA_EMPTY"), IDENTITY.signing)
    cases = {
        "MSG_SIGNATURE": [
            sealed.model_copy(update={"header": other.header}),
            sealed.model_copy(update={"signature": ""}),
            sealed.model_copy(update={"signature": "zz"}),
            sealed.model_copy(update={"signature": as_refusal.signature}),
            Envelope.seal(applied, keys.generate_identity().signing),
            Envelope.seal(applied.model_copy(update={"hospital": "site-1"}), IDENTITY.signing),
        ],
        "MSG_SENDER": [Envelope.seal(applied.model_copy(update={"hospital": "stranger"}), IDENTITY.signing)],
        "MSG_STUDY": [Envelope.seal(applied.model_copy(update={"study": "b" * 64}), IDENTITY.signing)],
        "MSG_FORMAT": [as_refusal, sealed.model_copy(update={"payload": b"x"})],
    }
    for code, envelopes in cases.items():
        for envelope in envelopes:
            with pytest.raises(FedMedGanError) as caught:
                envelope.open(Applied, study)
            assert caught.value.code == code


def test_a_payload_is_bound_by_length_and_hash(study):
    import hashlib

    payload = b"ciphertext"
    header = Certificate(
        study=study.hash,
        round=1,
        attempt=1,
        cohort=("site-0", "site-1", "site-2"),
        epoch=1,
        key_id="0" * 32,
        updates=(),
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
    )
    Envelope.seal(header, COORDINATOR, payload).open(Certificate, study)
    for bad in (b"", payload[:-1], payload + b"x", b"ciphertexu"):
        with pytest.raises(MessageError) as caught:
            Envelope.seal(header, COORDINATOR, bad).open(Certificate, study)
        assert caught.value.code == "MSG_FORMAT"


def test_instructions_are_the_coordinators_alone(study):
    """Whoever reaches Flower's control interface can start a run, but cannot make hospitals train."""
    roll = Roll(study=study.hash, approvals=(), anchors=())
    assert Envelope.seal(roll, COORDINATOR).open(Roll, study) == roll
    for private in (IDENTITY.signing, keys.generate_identity().signing):
        with pytest.raises(MessageError) as caught:
            Envelope.seal(roll, private).open(Roll, study)
        assert caught.value.code == "MSG_SIGNATURE"
    nobody = study.model_copy(update={"coordinator_key": ""})
    theirs = Roll(study=nobody.hash, approvals=(), anchors=())
    with pytest.raises(MessageError):
        Envelope.seal(theirs, COORDINATOR).open(Roll, nobody)


def test_a_message_comes_back_from_its_file(study, applied):
    sealed = Envelope.seal(applied, IDENTITY.signing, b"payload")
    assert Envelope.from_bytes(sealed.to_bytes()) == sealed
    for bad in (b"", b"x", sealed.to_bytes()[:-1], sealed.to_bytes() + b"x", join_parts([b"a", b"b"])):
        with pytest.raises(MessageError):
            Envelope.from_bytes(bad)


@given(st.lists(st.binary(max_size=9), max_size=5))
def test_parts_come_back(parts):
    assert split_parts(join_parts(parts)) == parts


@settings(max_examples=300)
@given(st.binary(max_size=120), st.sampled_from([*FROM_HOSPITALS, *FROM_THE_SERVER]))
def test_any_bytes_are_refused_with_a_typed_error(raw, model: type[Header]):
    with pytest.raises(MessageError):
        parse(raw, model)
