"""The four phases with real hospitals, real encryption and real training, without Flower between them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from fedmedgan.client import checkpoint
from fedmedgan.client.cycle import Hospital
from fedmedgan.server.aggregation import RoundSum
from fedmedgan.shared.errors import CryptoError, DataError, FedMedGanError, MessageError, PrivacyError, RunError
from fedmedgan.shared.messages import Applied, Envelope, RoundOpen, Update, open_certificate
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.secure_sum import cipher, keys
from fedmedgan.shared.secure_sum.cipher import AddOnly
from fedmedgan.shared.secure_sum.proof import update_blobs
from fedmedgan.simulations import consortium


def open_round(study, number: int, names=None, attempt: int = 1, key_id: str = "") -> RoundOpen:
    cohort = tuple(sorted(names or [s.name for s in study.sites]))
    return RoundOpen(study=study.hash, round=number, attempt=attempt, cohort=cohort, epoch=1, key_id=key_id)


def hospitals(keyed) -> list[Hospital]:
    """Opened anew, as for every message."""
    folder, study = keyed
    return [Hospital(home) for home in consortium.homes(folder, study)]


def through_the_wire(envelope: Envelope) -> Envelope:
    return Envelope.from_record(envelope.to_record(), 1 << 30)


def round_sum(study, opened: RoundOpen, hospital: Hospital) -> RoundSum:
    return RoundSum(study, opened, AddOnly(update_blobs(study, hospital.plan.n_values)), hospital.model_hash)


def collect(keyed, opened: RoundOpen) -> tuple[RoundSum, list[Envelope]]:
    _, study = keyed
    members = [h for h in hospitals(keyed) if h.site.name in opened.cohort]
    updates = [through_the_wire(h.local_update(opened)) for h in members]
    total = round_sum(study, opened, members[0])
    for update in updates:
        total.add(update)
    return total, updates


def test_two_rounds_end_with_the_same_model_everywhere_and_the_mean_is_exact(keyed):
    _, study = keyed
    for number in (1, 2):
        before = hospitals(keyed)
        opened = open_round(study, number, key_id=before[0].keys.key_id)
        total, _ = collect(keyed, opened)
        levels = [checkpoint.read(h.home / "update.safetensors")[0]["levels"].astype(np.int64) for h in before]
        certificate, payload = total.certify()
        answers = [h.apply_sum(certificate, payload).open(Applied, study) for h in hospitals(keyed)]
        assert len({a.model_hash for a in answers}) == 1

        weights = [s.weight for s in study.sites]
        plan = before[0].plan
        slow_mean = sum(w * (q - (plan.levels - 1) // 2) * plan.step for w, q in zip(weights, levels, strict=True))
        slow_mean = slow_mean / sum(weights)
        moved = checkpoint.flatten(hospitals(keyed)[0].model.weights) - checkpoint.flatten(before[0].model.weights)
        np.testing.assert_allclose(moved, slow_mean, atol=1e-6)
        assert np.abs(moved).max() > 0


def test_a_dropout_is_left_out_without_a_second_charge_and_comes_back_with_the_right_model(keyed):
    _, study = keyed
    key_id = hospitals(keyed)[0].keys.key_id
    everyone = [s.name for s in study.sites]
    opened = open_round(study, 1, key_id=key_id)
    for hospital in hospitals(keyed)[:3]:
        hospital.local_update(opened)  # the fourth never answers, so this attempt is given up
    spent = [read_ledger(h.home / "ledger.jsonl").spent() for h in hospitals(keyed)[:3]]
    again = open_round(study, 1, everyone[:3], attempt=2, key_id=key_id)
    total, _ = collect(keyed, again)
    assert [read_ledger(h.home / "ledger.jsonl").spent() for h in hospitals(keyed)[:3]] == spent
    certificate, payload = total.certify()
    hashes = {h.apply_sum(certificate, payload).open(Applied, study).model_hash for h in hospitals(keyed)}
    assert len(hashes) == 1, "the fourth applies the sum that it is not in"
    second, _ = collect(keyed, open_round(study, 2, key_id=key_id))
    assert set(second.signed) == set(everyone)


def test_a_masked_update_alone_tells_a_holder_of_the_key_nothing(keyed):
    """The server together with one hospital decrypts one upload: only uniform slots come out."""
    _, study = keyed
    hospital = hospitals(keyed)[0]
    opened = open_round(study, 1, key_id=hospital.keys.key_id)
    envelope = hospital.local_update(opened)
    blobs = cipher.unframe(
        envelope.payload,
        kind="update",
        n_blobs=update_blobs(study, hospital.plan.n_values),
        study_hash=study.hash,
        round=1,
        attempt=1,
        key_id=hospital.keys.key_id,
    )
    slots = cipher.HospitalCipher(hospital.keys.he_secret).decrypt(blobs, hospital.plan.n_slots)
    counts, _ = np.histogram(slots, bins=16, range=(0, cipher.PLAIN_MODULUS))
    expected = slots.size / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 15 degrees of freedom, p about 1e-4
    levels = checkpoint.read(hospital.home / "update.safetensors")[0]["levels"].astype(np.int64)
    assert not np.array_equal(slots, hospital.plan.pack(levels, hospital.site.weight))


def test_a_second_attempt_for_a_larger_or_other_cohort_is_refused(keyed):
    _, study = keyed
    names = [s.name for s in study.sites]
    first = hospitals(keyed)[0]
    first.local_update(open_round(study, 1, names[:3], key_id=first.keys.key_id))
    for cohort, attempt in ((names, 2), ([names[0], *names[2:]], 2), (names[:3], 2), (names, 1)):
        with pytest.raises(MessageError) as caught:
            hospitals(keyed)[0].local_update(open_round(study, 1, cohort, attempt, first.keys.key_id))
        assert caught.value.code == "MSG_REPLAY"


def test_attempts_cannot_be_asked_for_backwards(keyed):
    """Descending attempts would let server and one hospital subtract their way to every single update."""
    _, study = keyed
    names = [s.name for s in study.sites]
    key_id = hospitals(keyed)[0].keys.key_id
    hospitals(keyed)[0].local_update(open_round(study, 1, names, 1, key_id))
    hospitals(keyed)[0].local_update(open_round(study, 1, names[:3], 100, key_id))
    for cohort, attempt in (([names[0], *names[2:]], 50), (names, 1), (names[:3], 99)):
        with pytest.raises(MessageError) as caught:
            hospitals(keyed)[0].local_update(open_round(study, 1, cohort, attempt, key_id))
        assert caught.value.code == "MSG_REPLAY"


def test_a_sum_of_an_attempt_that_was_given_up_is_refused(keyed):
    """Else the server could give two hospitals two different sums of one round."""
    _, study = keyed
    names = [s.name for s in study.sites]
    key_id = hospitals(keyed)[0].keys.key_id
    first, _ = collect(keyed, open_round(study, 1, names, 1, key_id))
    collect(keyed, open_round(study, 1, names[:3], 2, key_id))
    with pytest.raises(MessageError) as caught:
        hospitals(keyed)[0].apply_sum(*first.certify())
    assert caught.value.code == "MSG_ROUND"


def test_a_stale_update_of_a_finished_round_does_not_block_the_next(keyed):
    """As after a crash between writing the model and deleting the update."""
    _, study = keyed
    key_id = hospitals(keyed)[0].keys.key_id
    total, _ = collect(keyed, open_round(study, 1, key_id=key_id))
    home = hospitals(keyed)[0].home
    stale = (home / "update.safetensors").read_bytes()
    for hospital in hospitals(keyed):
        hospital.apply_sum(*total.certify())
    (home / "update.safetensors").write_bytes(stale)
    again, _ = collect(keyed, open_round(study, 2, key_id=key_id))
    assert len(again.signed) == len(study.sites)


def test_unreadable_data_gives_the_reservation_back(keyed):
    _, study = keyed
    hospital = hospitals(keyed)[0]
    policy = (hospital.home / "policy.toml").read_text().replace("/dicom", "/nowhere")
    (hospital.home / "policy.toml").write_text(policy)
    with pytest.raises(DataError):
        Hospital(hospital.home).local_update(open_round(study, 1, key_id=hospital.keys.key_id))
    history = read_ledger(hospital.home / "ledger.jsonl")
    assert [r.kind for r in history.records][-3:] == ["reserve", "rotate", "void"]
    assert history.spent() == []


def test_the_same_attempt_is_answered_again_without_training_or_charge(keyed):
    _, study = keyed
    first = hospitals(keyed)[0]
    opened = open_round(study, 1, key_id=first.keys.key_id)
    first.local_update(opened)
    seq = read_ledger(first.home / "ledger.jsonl").seq
    again = hospitals(keyed)[0].local_update(opened)
    assert read_ledger(first.home / "ledger.jsonl").seq == seq
    assert through_the_wire(again).open(Update, study).round == 1


def test_no_other_update_is_ever_sealed_under_the_masks_of_an_attempt(keyed):
    """As after a disk fault: the difference of two updates under the same masks would be readable."""
    _, study = keyed
    hospital = hospitals(keyed)[0]
    opened = open_round(study, 1, key_id=hospital.keys.key_id)
    hospital.local_update(opened)
    for name in ("update.safetensors", "outbox.msg"):
        (hospital.home / name).unlink()
    with pytest.raises(RunError) as caught:
        hospitals(keyed)[0].local_update(opened)
    assert caught.value.code == "RUN_STATE"


def test_a_home_that_was_put_back_is_told_by_its_own_words_in_the_certificate(keyed, tmp_path):
    """Also where the server hides what it has seen: the sum cannot be certified without them."""
    _, study = keyed
    home = hospitals(keyed)[0].home
    shutil.copytree(home, tmp_path / "earlier")
    total, _ = collect(keyed, open_round(study, 1, key_id=hospitals(keyed)[0].keys.key_id))
    shutil.rmtree(home)
    shutil.copytree(tmp_path / "earlier", home)
    with pytest.raises(PrivacyError) as caught:
        Hospital(home).apply_sum(*total.certify())
    assert caught.value.code == "LEDGER_ROLLBACK"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"round": 2}, "MSG_ROUND"),
        ({"key_id": "0" * 32}, "MSG_KEY"),
        ({"cohort": ("site-0", "site-1")}, "MSG_SENDER"),
        ({"cohort": ("site-1", "site-2", "site-3")}, "MSG_SENDER"),
        ({"cohort": ("site-0", "site-0", "site-1")}, "MSG_SENDER"),
        ({"cohort": ("site-0", "site-1", "stranger")}, "MSG_SENDER"),
    ],
)
def test_a_hospital_refuses_a_round_that_does_not_fit_its_own_state(keyed, change, code):
    _, study = keyed
    hospital = hospitals(keyed)[0]
    opened = open_round(study, 1, key_id=hospital.keys.key_id).model_copy(update=change)
    with pytest.raises(MessageError) as caught:
        hospital.local_update(opened)
    assert caught.value.code == code
    assert not (hospital.home / "update.safetensors").exists()


def test_a_spent_budget_refuses_the_round_before_it_starts(keyed):
    folder, study = keyed
    home = consortium.homes(folder, study)[0]
    policy = (home / "policy.toml").read_text().replace("max_epsilon = 20.0", "max_epsilon = 0.5")
    (home / "policy.toml").write_text(policy)
    hospital = Hospital(home)
    records = read_ledger(home / "ledger.jsonl").seq
    with pytest.raises(PrivacyError) as caught:
        hospital.local_update(open_round(study, 1, key_id=hospital.keys.key_id))
    assert caught.value.code == "BUDGET_EXHAUSTED"
    assert read_ledger(home / "ledger.jsonl").seq == records, "nothing was reserved"
    assert not (home / "optimizers.safetensors").exists(), "nothing was trained"


def test_a_crash_while_training_spends_the_reservation(keyed, monkeypatch):
    _, study = keyed
    hospital = hospitals(keyed)[0]
    monkeypatch.setattr(Hospital, "_train_networks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hospital.local_update(open_round(study, 1, key_id=hospital.keys.key_id))
    kinds = [json.loads(line)["body"]["kind"] for line in (hospital.home / "ledger.jsonl").read_text().splitlines()]
    assert kinds.count("reserve") == 1
    assert kinds.count("charge") == 0
    monkeypatch.undo()
    retried = hospitals(keyed)[0]
    with pytest.raises(PrivacyError) as caught:  # both rounds' worth of sigma was planned for exactly two rounds
        for number in (1, 2):
            opened = open_round(study, number, key_id=retried.keys.key_id)
            total, _ = collect(keyed, opened)
            certificate, payload = total.certify()
            for h in hospitals(keyed):
                h.apply_sum(certificate, payload)
    assert caught.value.code == "BUDGET_EXHAUSTED"


MANIPULATIONS = {
    "the payload is cut": lambda c, p, o: (c, p[:-1]),
    "one bit is flipped": lambda c, p, o: (c, p[:5000] + bytes([p[5000] ^ 1]) + p[5001:]),
    "it is empty": lambda c, p, o: (c, b""),
    "the sum of an earlier attempt": lambda c, p, o: (c, o),
}


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_a_manipulated_sum_is_refused_and_the_model_stays(keyed, name):
    _, study = keyed
    key_id = hospitals(keyed)[0].keys.key_id
    total, updates = collect(keyed, open_round(study, 1, key_id=key_id))
    certificate, payload = total.certify()
    other = RoundSum(study, total.opened, AddOnly(total.adder.n_blobs), total.model_hash)
    for update in updates[:3]:
        other.add(update)
    certificate, payload = MANIPULATIONS[name](certificate, payload, other.certify()[1])
    victim = hospitals(keyed)[0]
    with pytest.raises(FedMedGanError):
        victim.apply_sum(certificate, payload)
    assert Hospital(victim.home).applied_round == 0


def test_a_server_that_leaves_a_hospital_out_but_certifies_it_is_caught_by_the_proof(keyed):
    """Frame and hashes are right here, as a malicious server would make them: only MAC and presence differ."""
    _, study = keyed
    key_id = hospitals(keyed)[0].keys.key_id
    total, updates = collect(keyed, open_round(study, 1, key_id=key_id))
    honest, _ = total.certify()
    short = RoundSum(study, total.opened, AddOnly(total.adder.n_blobs), total.model_hash)
    for update in updates[:3]:
        short.add(update)
    _, payload = short.certify()
    victim = hospitals(keyed)[0]
    with pytest.raises(CryptoError) as caught:
        victim.apply_sum(honest, payload)
    assert caught.value.code == "ROUND_REJECTED"
    assert Hospital(victim.home).applied_round == 0


def test_the_server_refuses_what_is_not_an_update_of_this_round(keyed):
    _, study = keyed
    key_id = hospitals(keyed)[0].keys.key_id
    opened = open_round(study, 1, key_id=key_id)
    total, updates = collect(keyed, opened)
    fresh = RoundSum(study, opened, AddOnly(total.adder.n_blobs), total.model_hash)
    good = updates[0]
    raw = bytearray(good.payload)
    raw[len(raw) // 2] ^= 4
    bad = {
        "MSG_REPLAY": [good, good],
        "MSG_FORMAT": [good.model_copy(update={"payload": bytes(raw)})],
        "MSG_SIGNATURE": [good.model_copy(update={"signature": "0" * 128})],
    }
    for code, sequence in bad.items():
        target = RoundSum(study, opened, AddOnly(total.adder.n_blobs), total.model_hash)
        with pytest.raises(MessageError) as caught:
            for envelope in sequence:
                target.add(envelope)
        assert caught.value.code == code
    stranger = updates[1].open(Update, study).model_copy(update={"hospital": "site-0"})
    with pytest.raises(MessageError) as caught:
        fresh.add(Envelope.seal(stranger, hospitals(keyed)[1].keys.signing, updates[1].payload))
    assert caught.value.code == "MSG_SIGNATURE", "one hospital cannot speak for another"
    other_round = RoundSum(study, open_round(study, 2, key_id=key_id), AddOnly(total.adder.n_blobs), total.model_hash)
    with pytest.raises(MessageError) as caught:
        other_round.add(good)
    assert caught.value.code == "MSG_ROUND"


def test_a_certificate_is_checked_word_by_word(keyed):
    """By messages alone: the encrypted sum would show the same lies, but later and without saying which."""
    _, study = keyed
    key_id = hospitals(keyed)[0].keys.key_id
    total, _ = collect(keyed, open_round(study, 1, key_id=key_id))
    good, _ = total.certify()
    assert set(open_certificate(good, study)) == {s.name for s in study.sites}
    forged = good.updates[0].model_copy(
        update={"header": good.updates[0].header.replace('"ledger_seq":', '"ledger_seq":1')}
    )
    lies = {
        "one is missing": ({"updates": good.updates[:3]}, "MSG_ROUND"),
        "one counts twice": ({"updates": (good.updates[0], *good.updates[:3])}, "MSG_SENDER"),
        "one is forged": ({"updates": (forged, *good.updates[1:])}, "MSG_SIGNATURE"),
        "another attempt": ({"attempt": 2}, "MSG_ROUND"),
        "another round": ({"round": 2}, "MSG_ROUND"),
        "another key": ({"key_id": "0" * 32}, "MSG_ROUND"),
        "another cohort": ({"cohort": good.cohort[:3]}, "MSG_ROUND"),
    }
    for change, code in lies.values():
        with pytest.raises(MessageError) as caught:
            open_certificate(good.model_copy(update=change), study)
        assert caught.value.code == code


def test_a_hospital_can_enter_a_second_study_and_both_are_in_its_ledger(keyed):
    folder, study = keyed
    home = consortium.homes(folder, study)[0]
    first = Hospital(home)
    first.local_update(open_round(study, 1, key_id=first.keys.key_id))
    second = study.model_copy(update={"name": "second", "privacy": study.privacy.model_copy(update={"epsilon": 6.0})})
    consortium.agree(second, folder)
    consortium.give_key(folder, second)
    hospital = Hospital(home)
    assert (hospital.study.hash, hospital.applied_round) == (second.hash, 0)
    assert (home / "past" / study.hash[:16] / "update.safetensors").exists()
    assert not (home / "update.safetensors").exists()
    hospital.local_update(open_round(second, 1, key_id=hospital.keys.key_id))
    history = read_ledger(home / "ledger.jsonl")
    assert len(history.spent()) == 2
    assert len(history.spent(second.hash)) == 1


def test_an_old_sum_that_comes_again_costs_the_next_rounds_update_nothing(keyed):
    """Else the server could have a round trained twice, and two updates sealed under the masks of one attempt."""
    _, study = keyed
    key_id = hospitals(keyed)[0].keys.key_id
    first, _ = collect(keyed, open_round(study, 1, key_id=key_id))
    for hospital in hospitals(keyed):
        hospital.apply_sum(*first.certify())
    opened = open_round(study, 2, key_id=key_id)
    sent = hospitals(keyed)[0].local_update(opened)
    spent = read_ledger(hospitals(keyed)[0].home / "ledger.jsonl").seq
    again = hospitals(keyed)[0].apply_sum(*first.certify()).open(Applied, study)
    assert again.round == 1
    assert hospitals(keyed)[0].local_update(opened) == sent
    assert read_ledger(hospitals(keyed)[0].home / "ledger.jsonl").seq == spent


def test_the_same_cohort_again_is_sealed_only_under_a_later_key(keyed):
    _, study = keyed
    folder, _ = keyed
    first = hospitals(keyed)[0]
    names = [s.name for s in study.sites]
    first.local_update(open_round(study, 1, names, 1, first.keys.key_id))
    following = keys.new_epoch(2, tuple(names))
    for home in consortium.homes(folder, study):
        keys.store_next(home / "keys", following)
        keys.activate_next(home / "keys", 1)
    later = {"epoch": 2, "key_id": following.key_id}
    hospital = hospitals(keyed)[0]
    with pytest.raises(MessageError) as caught:
        hospital.local_update(open_round(study, 1, names, 1).model_copy(update=later))
    assert caught.value.code == "MSG_REPLAY"
    hospital.local_update(open_round(study, 1, names[:3], 2).model_copy(update=later))
    with pytest.raises(MessageError) as caught:
        hospitals(keyed)[0].local_update(open_round(study, 1, names, 3).model_copy(update=later))
    assert caught.value.code == "MSG_REPLAY", "never a larger one"
