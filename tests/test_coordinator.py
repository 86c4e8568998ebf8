"""The coordinator's loop with real hospitals behind a grid that can be told to misbehave: absent, silent, late."""

from __future__ import annotations

import json

import pytest
from flwr.app import Message

from fedmedgan.client.cycle import Hospital
from fedmedgan.server import app as server
from fedmedgan.server.app import refuse_secrets
from fedmedgan.server.cycle import Coordinator
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import CryptoError, FedMedGanError, ModelError, RunError, StudyError
from fedmedgan.shared.messages import Envelope, Refusal, Roll
from fedmedgan.shared.secure_sum.keys import load_signing_key
from fedmedgan.simulations import consortium
from fedmedgan.simulations.local_grid import LocalGrid as Grid


def LocalGrid(prepared, **misbehaves) -> Grid:
    return Grid(consortium.homes(*prepared), **misbehaves)


def coordinator(prepared, grid) -> Coordinator:
    folder, _ = prepared
    agreement = Agreement.load(folder / "study.json")
    return Coordinator(grid, agreement, load_signing_key(folder / server.KEY_FILE), folder)


def events(prepared) -> list[dict]:
    return [json.loads(line) for line in (prepared[0] / "events.jsonl").read_text().splitlines()]


def hashes(prepared) -> set[str]:
    return {Hospital(home).model_hash for home in consortium.homes(*prepared)}


def test_a_whole_study(prepared):
    coordinator(prepared, LocalGrid(prepared)).run()
    closed = events(prepared)[-1]
    assert (closed["event"], closed["rounds"], closed["reason"]) == ("run_closed", 2, "rounds")
    assert hashes(prepared) == {closed["model_hash"]}


def test_it_waits_until_every_site_is_there(prepared):
    coordinator(prepared, LocalGrid(prepared, absent=lambda node, polls: node >= 1 and polls < 4)).run()
    opened = next(e for e in events(prepared) if e["event"] == "round_opened")
    assert len(opened["cohort"]) == 4


def test_a_hospital_that_was_away_is_sent_what_it_missed(prepared):
    """Site 3 is there for the first roll, away for the whole of round 1, and back for round 2."""
    grid = LocalGrid(prepared, absent=lambda node, polls: node == 3 and polls == 2)
    coordinator(prepared, grid).run()
    said = events(prepared)
    cohorts = {e["round"]: e["cohort"] for e in said if e["event"] == "round_aggregated"}
    assert "site-3" not in cohorts[1]
    assert "site-3" in cohorts[2]
    later = ["query", "train.apply", "train", "train.apply"]
    assert [kind for node, kind in grid.sent if node == 3] == ["query", "train.key", "train.key", *later]
    assert len(hashes(prepared)) == 1


def test_a_silent_hospital_is_left_out_after_the_timeout(prepared):
    grid = LocalGrid(prepared, silent=lambda node, kind: node == 2 and kind == "train")
    running = coordinator(prepared, grid)
    ask = running.wire.ask  # the study's own timeout is part of its hash; the clock of this one wait is shortened
    running.wire.ask = lambda requests, kind, **waits: ask(
        requests, kind, **(waits | ({"seconds": 1.0} if kind == "train" else {}))
    )
    running.run()
    missing = [e for e in events(prepared) if e["event"] == "site_missing"]
    assert {(e["site"], e["reason"]) for e in missing} == {("site-2", "RUN_TIMEOUT")}
    assert {e["attempt"] for e in events(prepared) if e["event"] == "round_aggregated"} == {2}
    assert len(hashes(prepared)) == 1


def test_a_coordinator_that_is_started_again_goes_on_with_the_next_round(prepared):
    first = coordinator(prepared, LocalGrid(prepared))
    first._call_roll(wait=True)
    first._renew_key(1)
    first.round(1)  # and then its process dies
    first.journal.close()
    coordinator(prepared, LocalGrid(prepared)).run()
    rounds = [e["round"] for e in events(prepared) if e["event"] == "round_aggregated"]
    assert rounds == [1, 2]
    assert len(hashes(prepared)) == 1


def test_a_hospital_that_was_away_at_the_end_is_sent_the_last_sums_later(prepared):
    grid = LocalGrid(prepared, absent=lambda node, polls: node == 3 and polls > 2)
    coordinator(prepared, grid).run()
    assert len(hashes(prepared)) == 2
    coordinator(prepared, LocalGrid(prepared)).run()  # after the end: `server start --catch-up`
    assert len(hashes(prepared)) == 1
    assert len([e for e in events(prepared) if e["event"] == "round_aggregated"]) == 2
    assert {e["reason"] for e in events(prepared) if e["event"] == "run_closed"} == {"rounds"}


def test_two_models_stop_the_run(prepared):
    first = coordinator(prepared, LocalGrid(prepared))
    first._call_roll(wait=True)
    first._renew_key(1)
    first.round(1)
    first.journal.close()
    homes = consortium.homes(*prepared)
    from fedmedgan.client import checkpoint

    arrays, notes = checkpoint.read(homes[1] / "model.safetensors")
    name = sorted(arrays)[0]
    arrays[name] = arrays[name] + 1
    checkpoint.write(homes[1] / "model.safetensors", arrays, **notes)
    with pytest.raises(ModelError) as caught:
        coordinator(prepared, LocalGrid(prepared)).run()
    assert caught.value.code == "MODEL_DIVERGED"


def test_spent_budgets_end_the_cycle_as_agreed(prepared):
    for home in consortium.homes(*prepared):
        text = (home / "policy.toml").read_text()
        (home / "policy.toml").write_text(text.replace("max_epsilon = 20.0", "max_epsilon = 0.5"))
    coordinator(prepared, LocalGrid(prepared)).run()
    closed = events(prepared)[-1]
    assert (closed["event"], closed["rounds"], closed["reason"]) == ("run_closed", 0, "budget")


def test_too_few_hospitals_stop_the_run_and_say_why(prepared):
    for home in consortium.homes(*prepared)[:2]:
        text = (home / "policy.toml").read_text()
        (home / "policy.toml").write_text(text.replace("/dicom", "/SMITH^JOHN"))
    with pytest.raises(RunError) as caught:
        coordinator(prepared, LocalGrid(prepared)).run()
    assert caught.value.code == "RUN_QUORUM"
    assert "site-0: DATA_REFUSED" in caught.value.line()
    assert "SMITH" not in caught.value.line() + (prepared[0] / "events.jsonl").read_text()


def test_it_stops_when_the_loss_on_generated_images_has_settled(prepared):
    _, study = prepared
    running = coordinator(prepared, LocalGrid(prepared))
    patient = study.convergence.model_copy(update={"patience": 2, "tolerance": 0.1})
    running.study = study.model_copy(update={"convergence": patient})
    assert not running._converged([1.0])
    assert not running._converged([1.0, 1.0])
    assert running._converged([9.0, 1.0, 1.05, 1.0])
    assert not running._converged([1.0, 1.0, 1.2])
    running.study = study
    assert not running._converged([1.0] * 50)


@pytest.mark.parametrize("where", ["present", "_load_model"])
def test_no_exception_text_leaves_a_hospital(prepared, monkeypatch, where):
    def explode(*_):
        raise ValueError("PatientName SMITH^JOHN")

    monkeypatch.setattr(Hospital, where, explode)
    grid = LocalGrid(prepared)
    key = load_signing_key(prepared[0] / server.KEY_FILE)
    roll = Envelope.seal(Roll(study=prepared[1].hash, approvals=(), anchors=()), key).to_record()
    (number,) = grid.push_messages([Message(roll, dst_node_id=0, message_type="query")])
    (answer,) = grid.pull_messages([number])
    if answer.has_error():
        assert answer.error.reason == "RUN_CRASHED"
    else:
        envelope = Envelope.from_record(answer.content, 0)
        assert envelope.open(Refusal, prepared[1]).code == "RUN_CRASHED"
        assert b"SMITH" not in envelope.header
    assert "SMITH" in (consortium.homes(*prepared)[0] / "events.jsonl").read_text(), "the hospital itself must know"


def test_a_coordinator_beside_keys_or_with_a_changed_study_does_not_start(prepared):
    folder, _ = prepared
    refuse_secrets(folder)
    (folder / "keys").mkdir()
    with pytest.raises(CryptoError) as caught:
        refuse_secrets(folder)
    assert caught.value.code == "HE_SECRET_AT_SERVER"
    changed = (folder / "study.json").read_text().replace('"epsilon": 20.0', '"epsilon": 21.0')
    (folder / "study.json").write_text(changed)
    with pytest.raises(StudyError) as wrong:
        Agreement.load(folder / "study.json")
    assert wrong.value.code == "STUDY_HASH"
    with pytest.raises(FedMedGanError):
        Agreement.load(folder / "nowhere" / "study.json")
