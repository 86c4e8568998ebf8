"""A process dies at each named point, once, and the study goes on: nothing is lost, spent or said twice.

The death is an exception that nothing catches. Ends of real processes are measured in benchmarks/faults.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import tiny_study
from flwr.app import Error, Message

from fedmedgan.client.cycle import Hospital
from fedmedgan.server import cycle, worker
from fedmedgan.server.app import KEY_FILE
from fedmedgan.server.cycle import Coordinator
from fedmedgan.shared import crash
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.messages import Envelope, Update
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.secure_sum.keys import load_signing_key
from fedmedgan.simulations import consortium
from fedmedgan.simulations.local_grid import LocalGrid

SPENDS_A_ROUND = ("client.reserved", "client.trained")
"""Patients' images may have been touched and no update is there: what was reserved is spent, and reserved again."""
TRAINS_TWICE = "client.trained"
"""Adam's states of the lost training stay, so this one ends in another model."""
FIRST_KEY = ("client.key-stored", "client.key-activated", "server.offer-stored", "server.epoch-sealed")


class Died(BaseException):
    """As SIGKILL: nothing in the program catches it."""


class Grid(LocalGrid):
    """A hospital's process that dies is what Flower reports it to be: code 8."""

    updates: dict[tuple[int, int, str], set[bytes]]

    def call(self, node: int, message: Message) -> Message:
        try:
            answer = super().call(node, message)
        except Died:
            return Message(Error(code=8), reply_to=message)
        if not answer.has_error():
            envelope = Envelope.from_record(answer.content, 1 << 30)
            if envelope.kind == "Update":
                update = Update.model_validate_json(envelope.header)
                place = update.round, update.attempt, update.hospital
                self.updates.setdefault(place, set()).add(envelope.header)
        return answer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "run"
    study = consortium.prepare(tiny_study(training={"rounds": 1}), folder, {})
    for home in consortium.homes(folder, study):
        Hospital(home).load_patients()
    return folder, study


@pytest.fixture(scope="module")
def with_key(original, tmp_path_factory):
    """The same, after the ceremony of the first key."""
    folder = tmp_path_factory.mktemp("keyed") / "run"
    shutil.copytree(original[0], folder)
    running = coordinator((folder, original[1]), {})
    with running.journal:
        running._call_roll(wait=True)
        running._renew_key(1)
    return folder, original[1]


def coordinator(place, updates: dict) -> Coordinator:
    folder, study = place
    grid = Grid(consortium.homes(folder, study), insecure_seed=7)
    grid.updates = updates
    return Coordinator(grid, Agreement.load(folder / "study.json"), load_signing_key(folder / KEY_FILE), folder)


def run(place, updates: dict) -> dict:
    """One life of the coordinator; returns its last event."""
    coordinator(place, updates).run()
    return json.loads((place[0] / "events.jsonl").read_text().splitlines()[-1])


def copied(place, folder: Path):
    shutil.copytree(place[0], folder)
    return folder, place[1]


@pytest.fixture(scope="module")
def undisturbed(original, tmp_path_factory) -> str:
    return run(copied(original, tmp_path_factory.mktemp("undisturbed") / "run"), {})["model_hash"]


@pytest.mark.parametrize("name", crash.CRASH_POINTS)
def test_the_study_goes_on_where_it_was(original, with_key, undisturbed, tmp_path, monkeypatch, name):
    deaths = []

    def point(passed: str) -> None:
        if passed == name and not deaths:
            deaths.append(passed)
            raise Died

    monkeypatch.setattr(crash, "point", point)
    updates: dict[tuple[int, int, str], set[bytes]] = {}
    place = copied(original if name in FIRST_KEY else with_key, tmp_path / "run")
    try:
        closed = run(place, updates)
    except Died:
        closed = run(place, updates)
    assert deaths == [name], "the program does not pass this point"
    assert (closed["rounds"], closed["reason"]) == (1, "rounds")
    hospitals = [Hospital(home) for home in consortium.homes(*place)]
    assert {h.model_hash for h in hospitals} == {closed["model_hash"]}
    assert name == TRAINS_TWICE or closed["model_hash"] == undisturbed
    kinds = [[r.kind for r in read_ledger(h.home / "ledger.jsonl").records] for h in hospitals]
    assert [k.count("reserve") for k in kinds] == [1 + (name in SPENDS_A_ROUND), 1, 1, 1]
    assert [k.count("charge") for k in kinds] == [1 - (name == "client.update-stored"), 1, 1, 1]
    assert all(len(contents) == 1 for contents in updates.values()), "one attempt, one update"
    left = ("update.safetensors", "outbox.msg", "next-epoch.key", ".tmp")
    assert not [p for h in hospitals for p in h.home.rglob("*") if p.name.endswith(left)]
    assert not any((place[0] / "updates").iterdir())


def test_a_killed_adding_process_costs_nothing(with_key, undisturbed, tmp_path, monkeypatch):
    """SEAL dies under the second upload, by SIGKILL: the same sum is made by another process, in the same attempt."""
    killed = []

    class Victim(worker.WorkerSum):
        def add(self, blobs) -> None:
            if self.count == 1 and not killed:
                killed.append(self.pid)
                os.kill(self.pid, signal.SIGKILL)
            super().add(blobs)

    monkeypatch.setattr(cycle, "WorkerSum", Victim)
    place = copied(with_key, tmp_path / "run")
    assert run(place, {})["model_hash"] == undisturbed
    said = [json.loads(line) for line in (place[0] / "events.jsonl").read_text().splitlines()]
    assert killed
    assert [e["event"] for e in said].count("worker_restarted") == 1
    assert [e["attempt"] for e in said if e["event"] == "round_aggregated"] == [1]
