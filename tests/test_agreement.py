"""Who agrees to a study, and that nothing starts without all of them."""

from __future__ import annotations

import json

import pytest
from conftest import tiny_study
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmedgan.client import joining
from fedmedgan.client.cycle import Hospital
from fedmedgan.server.app import KEY_FILE
from fedmedgan.server.cycle import Coordinator
from fedmedgan.shared.agreement import Agreement, Identity, assemble, sign
from fedmedgan.shared.errors import StudyError
from fedmedgan.shared.messages import Approval, EpochOpen, Roll, RoundOpen
from fedmedgan.shared.secure_sum.keys import HospitalKeys, generate_identity, load_signing_key
from fedmedgan.shared.study import from_dict
from fedmedgan.simulations import consortium
from fedmedgan.simulations.local_grid import LocalGrid

STUDY = tiny_study()
NAMES = [site.name for site in STUDY.sites]
KEYS = {name: generate_identity() for name in NAMES}
COORDINATOR = Ed25519PrivateKey.generate()
PUBLIC = COORDINATOR.public_key().public_bytes_raw().hex()
HOSPITALS = [joining.identity(name, own) for name, own in KEYS.items()]
SERVER = Identity(role="coordinator", name="coordinator", signing_key=PUBLIC).signed(COORDINATOR)


def agreed() -> Agreement:
    agreement = Agreement(assemble(STUDY, [*HOSPITALS, SERVER]))
    for name in NAMES:
        agreement = agreement.with_signature(name, sign(agreement.study, KEYS[name].signing))
    return agreement


def code_of(call, *arguments) -> str:
    with pytest.raises(StudyError) as caught:
        call(*arguments)
    assert "\n" not in caught.value.line()
    return caught.value.code


# ---- identities


@pytest.mark.parametrize("identity", [HOSPITALS[0], SERVER], ids=["hospital", "coordinator"])
def test_an_identity_comes_back_as_it_was_sent(tmp_path, identity):
    identity.save(tmp_path / "identity.json")
    loaded = Identity.load(tmp_path / "identity.json")
    assert loaded == identity
    assert len(loaded.fingerprint.replace(" ", "")) == 40


def identity_file(path, **changes):
    values = HOSPITALS[0].model_dump() | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "site-1"},
        {"role": "coordinator"},
        {"role": "auditor"},
        {"signing_key": HOSPITALS[1].signing_key},
        {"exchange_key": HOSPITALS[1].exchange_key},
        {"wrapping_key": HOSPITALS[1].wrapping_key},
        {"wrapping_key": HOSPITALS[0].wrapping_key[:-2]},
        {"signature": HOSPITALS[1].signature},
        {"signature": ""},
        {"signature": HOSPITALS[0].signature.upper()},
        {"signature": " " + HOSPITALS[0].signature},
        {"name": "../../etc"},
        {"signing_key": None},
        {"private_key": "00" * 32},
        {"name": 7},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_identity_that_was_changed_on_the_way_is_refused(tmp_path, changes):
    assert code_of(Identity.load, identity_file(tmp_path / "identity.json", **changes)) == "STUDY_KEYS"


DAMAGE = {
    "empty": b"",
    "cut": b'{"role": "hospital", "na',
    "a list": b"[]",
    "null": b"null",
    "not UTF-8": b"\xff\xfe\x00",
    "deep": b"[" * 5000,
    "a NaN": b'{"study": NaN, "hash": Infinity}',
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", [Identity, Agreement])
def test_a_damaged_file_is_one_typed_error(tmp_path, kind, damage):
    path = tmp_path / "file.json"
    path.write_bytes(DAMAGE[damage])
    assert code_of(kind.load, path).startswith(("STUDY_KEYS", "CONFIG_"))


@pytest.mark.parametrize("kind", [Identity, Agreement])
def test_a_missing_file_a_folder_and_a_huge_file(tmp_path, kind):
    assert code_of(kind.load, tmp_path / "nowhere.json") == "CONFIG_NOT_FOUND"
    assert code_of(kind.load, tmp_path) == "CONFIG_NOT_FOUND"
    (tmp_path / "huge.json").write_bytes(b" " * ((1 << 20) + 1))
    assert code_of(kind.load, tmp_path / "huge.json") == "CONFIG_TOO_LARGE"


# ---- putting the study together


def test_the_study_holds_everybodys_keys_and_another_hash():
    study = assemble(STUDY, [SERVER, *reversed(HOSPITALS)])
    assert study.hash != STUDY.hash
    assert [s.wrapping_key for s in study.sites] == [own.wrapping_public for own in KEYS.values()]
    assert study.coordinator_key == PUBLIC


STRANGER = joining.identity("stranger", generate_identity())
SAME_KEY = HOSPITALS[0].model_copy(update={"name": "site-3"}).signed(KEYS["site-0"].signing)
BOTH_ROLES = Identity(role="coordinator", name="coordinator", signing_key=HOSPITALS[0].signing_key)


@pytest.mark.parametrize(
    ("identities", "code"),
    [
        ([], "STUDY_KEYS"),
        ([*HOSPITALS], "STUDY_KEYS"),
        ([*HOSPITALS[:3], SERVER], "STUDY_KEYS"),
        ([*HOSPITALS, HOSPITALS[0], SERVER], "STUDY_KEYS"),
        ([*HOSPITALS, SERVER, SERVER], "STUDY_KEYS"),
        ([*HOSPITALS, STRANGER, SERVER], "STUDY_KEYS"),
        ([*HOSPITALS[:3], STRANGER, SERVER], "STUDY_KEYS"),
        ([*HOSPITALS[:3], SAME_KEY, SERVER], "STUDY_ROSTER"),
        ([*HOSPITALS, BOTH_ROLES.signed(KEYS["site-0"].signing)], "STUDY_ROSTER"),
    ],
    ids=[
        "nobody",
        "no coordinator",
        "one is missing",
        "one comes twice",
        "two coordinators",
        "a stranger too",
        "a stranger instead",
        "one key for two hospitals",
        "a hospital's key is the coordinator's",
    ],
)
def test_a_study_is_not_put_together_from_wrong_parties(identities, code):
    assert code_of(assemble, STUDY, identities) == code


@pytest.mark.parametrize("name", ["exchange_key", "wrapping_key"])
def test_a_hospital_without_all_its_keys_is_no_party(name):
    half = HOSPITALS[3].model_copy(update={name: ""}).signed(KEYS["site-3"].signing)
    assert code_of(assemble, STUDY, [*HOSPITALS[:3], half, SERVER]) == "STUDY_KEYS"


# ---- signatures


def test_all_signatures_come_back_from_the_file(tmp_path):
    (tmp_path / "study.json").write_bytes(agreed().to_json())
    loaded = Agreement.load(tmp_path / "study.json")
    loaded.require_all()
    assert (loaded.study, loaded.missing()) == (agreed().study, ())


def test_any_changed_digit_is_another_study_that_nobody_signed(tmp_path):
    whole = agreed()
    path = tmp_path / "study.json"
    values = json.loads(whole.to_json())
    changes = {
        ("privacy", "epsilon"): 20.5,
        ("training", "rounds"): 3,
        ("secure_sum", "rotate_every"): 7,
        ("coordinator_key",): "ab" * 32,
        ("sites", 0, "signing_key"): "cd" * 32,
        ("sites", 0, "wrapping_key"): whole.study.sites[1].wrapping_key[::-1],
        ("sites", 2, "weight"): 5,
    }
    for place, value in changes.items():
        changed = json.loads(json.dumps(values))
        inner = changed["study"]
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
        path.write_text(json.dumps(changed))
        assert code_of(Agreement.load, path) == "STUDY_HASH", place
        changed["hash"] = from_dict(changed["study"]).hash
        path.write_text(json.dumps(changed))
        assert code_of(Agreement.load, path) == "STUDY_SIGNATURE", place


@pytest.mark.parametrize(
    "signature",
    [
        agreed().signatures["site-1"],
        agreed().signatures["site-0"].upper(),
        agreed().signatures["site-0"] + " ",
        agreed().signatures["site-0"][:-2],
        sign(STUDY, KEYS["site-0"].signing),
        "",
        "zz",
        None,
        7,
        ["00"],
    ],
)
def test_a_wrong_signature_is_refused(tmp_path, signature):
    whole = agreed()
    if isinstance(signature, str):
        assert code_of(whole.with_signature, "site-0", signature) == "STUDY_SIGNATURE"
    values = json.loads(whole.to_json())
    values["signatures"]["site-0"] = signature
    (tmp_path / "study.json").write_text(json.dumps(values))
    assert code_of(Agreement.load, tmp_path / "study.json") == "STUDY_SIGNATURE"


@pytest.mark.parametrize("name", ["stranger", "", "coordinator"])
def test_only_a_hospital_of_the_study_signs_it(name):
    whole = agreed()
    assert code_of(whole.with_signature, name, whole.signatures["site-0"]) == "STUDY_SIGNATURE"


def test_missing_signatures_and_a_study_without_a_coordinator():
    assert code_of(Agreement(agreed().study).require_all) == "STUDY_SIGNATURE"
    assert Agreement(agreed().study).missing() == tuple(NAMES)
    assert code_of(Agreement(STUDY).require_all) == "STUDY_KEYS"


# ---- nothing starts without all


def test_a_coordinator_does_not_start_without_all_signatures(prepared):
    folder, study = prepared
    agreement = Agreement.load(folder / "study.json")
    signatures = dict(list(agreement.signatures.items())[:3])
    grid = LocalGrid(consortium.homes(folder, study))
    key = load_signing_key(folder / KEY_FILE)
    assert code_of(Coordinator, grid, Agreement(study, signatures), key, folder) == "STUDY_SIGNATURE"
    assert grid.sent == []


def test_a_hospital_does_nothing_without_all_signatures_and_keeps_those_that_the_roll_brings(prepared):
    folder, study = prepared
    home = consortium.homes(folder, study)[0]
    whole = Agreement.load(home / "study.json")
    own = Agreement(study, {"site-0": whole.signatures["site-0"]})
    joining.keep(home, own)
    before = (home / "ledger.jsonl").read_bytes()
    opened = RoundOpen(study=study.hash, round=1, attempt=1, cohort=tuple(NAMES), epoch=1, key_id="ab" * 16)
    lead = EpochOpen(study=study.hash, epoch=1, leader="site-0", members=tuple(NAMES), leaves=())

    def roll(**signatures: str) -> Roll:
        approvals = tuple(Approval(hospital=name, signature=s) for name, s in signatures.items())
        return Roll(study=study.hash, approvals=approvals, anchors=())

    three = {name: whole.signatures[name] for name in NAMES[:3]}
    forged = {**whole.signatures, "site-3": sign(study, HospitalKeys.load(home / "keys").signing)}
    for call, argument in (
        (Hospital(home).present, roll()),
        (Hospital(home).present, roll(**three)),
        (Hospital(home).present, roll(**forged)),
        (Hospital(home).present, roll(**whole.signatures, stranger=whole.signatures["site-0"])),
        (Hospital(home).local_update, opened),
        (Hospital(home).offer_key, lead),
    ):
        assert code_of(call, argument) == "STUDY_SIGNATURE"
    assert Agreement.load(home / "study.json").missing() == tuple(NAMES[1:]), "nothing of it was kept"
    assert (home / "ledger.jsonl").read_bytes() == before
    Hospital(home).present(roll(**whole.signatures))
    assert Agreement.load(home / "study.json") == whole
    Hospital(home).offer_key(lead)


def test_a_hospital_does_not_sign_a_study_with_other_keys_of_its_own(prepared):
    folder, study = prepared
    home = consortium.homes(folder, study)[0]
    values = study.model_dump()
    for name in ("signing_key", "exchange_key", "wrapping_key"):
        changed = json.loads(json.dumps(values))
        changed["sites"][0][name] = getattr(HOSPITALS[0], name)
        assert code_of(joining.join, home, from_dict(changed)) == "STUDY_KEYS"
    assert Agreement.load(home / "study.json").study == study
