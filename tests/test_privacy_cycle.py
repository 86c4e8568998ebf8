"""What a hospital refuses for its patients' sake, with real ledgers, books and training: other patients than those it
signed for, rounds whose tests failed, a second ledger on the same patients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pydicom
import pytest
from test_cycle import collect, hospitals, open_round
from typer.testing import CliRunner

from fedmedgan.cli.main import app
from fedmedgan.client import joining
from fedmedgan.client.cycle import Hospital
from fedmedgan.client.outlook import outlook
from fedmedgan.client.training.local_round import LocalTrainer
from fedmedgan.shared.agreement import Identity, assemble
from fedmedgan.shared.errors import DataError, FedMedGanError, PrivacyError
from fedmedgan.shared.privacy.accounting import epsilon_pld
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.privacy.records import CHECKS
from fedmedgan.shared.study import Study
from fedmedgan.simulations import consortium

CHARGED = ["reserve", "rotate", "charge", "release"]


def kinds(home: Path) -> list[str]:
    return [record.kind for record in read_ledger(home / "ledger.jsonl").records]


def first(keyed) -> Hospital:
    return hospitals(keyed)[0]


def round_1(keyed):
    return open_round(keyed[1], 1, key_id=first(keyed).keys.key_id)


def refused(code: str, act, *args) -> FedMedGanError:
    with pytest.raises(FedMedGanError) as caught:
        act(*args)
    assert caught.value.code == code, caught.value
    return caught.value


def test_an_honest_round_is_on_record_with_what_its_tests_said(keyed):
    hospital = first(keyed)
    hospital.local_update(round_1(keyed))
    records = read_ledger(hospital.home / "ledger.jsonl").records
    assert [record.kind for record in records] == ["begin", "open", *CHARGED]
    charge = records[4].body
    assert set(charge["checks"]) == set(CHECKS)
    assert {charge["checks"][name] for name in ("clipping", "rows")} == {"passed"}
    assert "failed" not in charge["checks"].values()
    terms = read_ledger(hospital.home / "ledger.jsonl").terms(keyed[1].hash)
    event = records[2].body["events"][0]
    assert (event["noise_multiplier"], event["sampling_rate"]) == (
        repr(terms.noise_multiplier),
        repr(terms.sampling_rate),
    )
    assert terms.steps == keyed[1].total_steps


def test_other_patients_than_those_signed_for_are_not_trained_on(keyed):
    study = keyed[1]
    hospital = first(keyed)
    data = hospital.home / "more"
    shutil.copytree(hospital.policy.data, data)
    policy = hospital.home / "policy.toml"
    policy.write_text(policy.read_text().replace(hospital.policy.data, str(data)))
    added = next(data.rglob("*.dcm"))
    dataset = pydicom.dcmread(added)
    dataset.PatientID = "PHANTOM-NEW"
    dataset.save_as(added)
    error = refused("DATA_CHANGED", Hospital(hospital.home).local_update, round_1(keyed))
    assert "site-0" in error.line()
    assert kinds(hospital.home)[2:] == ["reserve", "rotate", "void"], "nothing was trained, nothing is spent"
    before = read_ledger(hospital.home / "ledger.jsonl").terms(study.hash)
    joining.join(hospital.home, study)
    after = read_ledger(hospital.home / "ledger.jsonl").terms(study.hash)
    assert before.dataset != after.dataset
    Hospital(hospital.home).local_update(round_1(keyed))
    assert kinds(hospital.home)[-3:] == ["reserve", "charge", "release"]


def test_after_a_failed_test_the_update_is_thrown_away_and_nothing_trains_until_a_person_signs(keyed, monkeypatch):
    home = first(keyed).home
    with monkeypatch.context() as patch:
        failed = {**dict.fromkeys(CHECKS, "passed"), "noise": "failed"}
        patch.setattr(LocalTrainer, "checks", property(lambda trainer: failed))
        assert "noise" in refused("PRIVACY_PROOF", Hospital(home).local_update, round_1(keyed)).line()
    assert kinds(home)[2:] == ["reserve", "rotate", "charge"], "what was done is spent, and nothing left the hospital"
    assert not (home / "update.safetensors").exists()
    assert not (home / joining.ADAM_STATES).exists(), "what was trained without proof is in no later round either"
    refused("PRIVACY_PROOF", Hospital(home).local_update, round_1(keyed))
    assert kinds(home)[-1] == "charge", "nothing more is reserved"
    joining.join(home, keyed[1])
    Hospital(home).local_update(round_1(keyed))
    assert kinds(home)[-4:] == ["open", "reserve", "charge", "release"]


def test_noise_that_is_not_the_one_on_record_is_refused(keyed):
    home = first(keyed).home
    noise = json.loads((home / joining.NOISE).read_text())
    (home / joining.NOISE).write_text(json.dumps(noise | {"noise_multiplier": noise["noise_multiplier"] + 0.001}))
    refused("STUDY_HASH", Hospital(home).local_update, round_1(keyed))
    assert kinds(home) == ["begin", "open"], "nothing was reserved"


def test_a_higher_ceiling_holds_when_the_study_was_signed_again(keyed):
    home = first(keyed).home
    policy = home / "policy.toml"
    policy.write_text(policy.read_text().replace("max_epsilon = 20.0", "max_epsilon = 30.0"))
    assert outlook(home).in_all.ceiling == 20.0
    joining.join(home, keyed[1])
    assert outlook(home).in_all.ceiling == 30.0


def test_signing_a_study_that_is_over_leaves_the_running_one_alone(keyed, tmp_path):
    """One slip of a person must not end a study for good."""
    hospital, study = first(keyed), keyed[1]
    home, running = hospital.home, renamed(keyed, tmp_path, [joining.identity("site-0", hospital.keys)])
    joining.join(home, running)  # which ends the first one here
    refused("STUDY_POLICY", joining.join, home, study)
    history = read_ledger(home / "ledger.jsonl")
    assert history.is_closed(study.hash)
    assert not history.is_closed(running.hash)


def test_the_study_is_closed_after_its_last_round(keyed):
    study = keyed[1]
    for number in range(1, study.training.rounds + 1):
        total, _ = collect(keyed, open_round(study, number, key_id=first(keyed).keys.key_id))
        certificate, payload = total.certify()
        for hospital in hospitals(keyed):
            hospital.apply_sum(certificate, payload)
    for hospital in hospitals(keyed):
        assert kinds(hospital.home)[-2:] == ["anchor", "close"]
        assert read_ledger(hospital.home / "ledger.jsonl").is_closed(study.hash)


# ---- a second home of the same hospital


def renamed(keyed, folder: Path, own: list[Identity]) -> Study:
    """The same study under another name: another study of the same hospitals."""
    without = {"signing_key": "", "exchange_key": "", "wrapping_key": ""}
    sites = tuple(site.model_copy(update=without) for site in keyed[1].sites)
    bare = keyed[1].model_copy(update={"name": "another", "coordinator_key": "", "sites": sites})
    others = [joining.identity(h.site.name, h.keys) for h in hospitals(keyed)[1:]]
    return assemble(bare, [*own, *others, consortium._coordinator(folder)])


@pytest.fixture
def second(keyed, tmp_path):
    """Another home of site-0, in another study on the same patients, under the same budget book."""
    home, book = keyed[0] / "hospitals" / "second", Path("..", "..", "budget-books", "site-0")
    data = first(keyed).policy.data
    own = joining.init_home(home, site="site-0", data=data, max_epsilon=30.0, budget_book=book)
    return home, renamed(keyed, tmp_path, [own])


def test_a_second_ledger_on_the_same_patients_needs_the_data_owner_and_shares_one_budget(keyed, second, tmp_path):
    home, study = second
    original = first(keyed)
    original.local_update(round_1(keyed))
    spent = read_ledger(original.home / "ledger.jsonl").spent()
    refused("LEDGER_SAME_PATIENTS", joining.join, home, study)
    assert not (home / "study.json").exists()
    assert kinds(home) == ["begin"], "no study was opened"

    secret, key = tmp_path / "secret", tmp_path / "owner.pem"
    secret.write_text("several random words of the owner\n")
    secret.chmod(0o600)
    run(["owner", "init", str(key), "--passphrase-file", str(secret)])
    public = json.loads(run(["owner", "init", str(tmp_path / "x.pem"), "--passphrase-file", str(secret)]))["data"]
    out = tmp_path / "override.json"
    asked = [str(home / "override-request.json"), "--reason", "board of 2026", "--passphrase-file", str(secret)]
    run(["owner", "allow", *asked, "--key", str(tmp_path / "x.pem"), "--out", str(out)])
    refused("LEDGER_OVERRIDE", joining.allow_beside, home, out)  # the policy names nobody yet
    policy = home / "policy.toml"
    policy.write_text(policy.read_text().replace('data_owner_key = ""', f'data_owner_key = "{public["public"]}"'))
    run(["site", "override", str(out), "--home", str(home)])
    joining.join(home, study)
    assert kinds(home) == ["begin", "override", "open"]

    found = outlook(home)
    assert (found.in_study.spent_epsilon, found.other_ledgers) == (0.0, 1)
    assert found.in_all.per_accountant["pld"] > epsilon_pld(spent, study.privacy.delta), "what the first home spent"
    said = json.loads(run(["site", "budget", "--home", str(home)]))["data"]
    assert said["in_all"]["spent"] == found.in_all.spent_epsilon > 0
    assert said["in_study"]["after_next_round"] > 0
    assert said["in_all"]["ceiling"] == 20.0, "the lowest ceiling of the same patients rules, that of the first home"
    policy.write_text(policy.read_text().replace("max_epsilon = 30.0", f"max_epsilon = {said['in_all']['spent']!r}"))
    assert not outlook(home).fits, "one budget for both"


def run(arguments: list[str]) -> str:
    done = CliRunner().invoke(app, ["--format", "json", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_budget_as_people_see_it(keyed):
    home = first(keyed).home
    done = CliRunner().invoke(app, ["site", "budget", "--home", str(home)], catch_exceptions=False)
    assert "round 1 of 2 fits" in done.stdout
    assert "unit: one patient" in done.stdout.replace("\n", " ")


def test_a_request_that_is_none_is_refused(tmp_path):
    path = tmp_path / "request.json"
    for text in ("", "{}", '{"book": "a", "ledger": "b", "hospital": "c", "others": [{}]}'):
        path.write_text(text)
        secret = tmp_path / "secret"
        secret.write_text("several random words of the owner\n")
        secret.chmod(0o600)
        arguments = ["owner", "allow", str(path), "--key", str(tmp_path / "none"), "--reason", "x"]
        with pytest.raises(PrivacyError) as caught:
            CliRunner().invoke(
                app, [*arguments, "--passphrase-file", str(secret)], catch_exceptions=False, standalone_mode=False
            )
        assert caught.value.code == "LEDGER_OVERRIDE"


def test_unreadable_data_is_found_when_the_study_is_signed(keyed):
    hospital = first(keyed)
    policy = hospital.home / "policy.toml"
    policy.write_text(policy.read_text().replace("/dicom", "/nowhere"))
    with pytest.raises(DataError):
        joining.join(hospital.home, keyed[1])
