"""A consortium of separate processes: TLS, node authentication, kits, gates; undisturbed, and with two killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedmedgan.client import checkpoint
from fedmedgan.deploy import coordinator, kits
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.simulations.deployed import SHORT_STUDY, Deployed, Party

pytestmark = pytest.mark.slow

FEDMEDGAN = str(Path(sys.executable).with_name("fedmedgan"))
SECONDS = 1500.0
NAMES = ("north", "south", "west")


def ours(folder: Path) -> list[psutil.Process]:
    """Processes of this consortium that are still there."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("consortium") / "run"
    command = [FEDMEDGAN, "--format", "json", "consortium", "--out", str(folder), "--seconds", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads(done.stdout)["data"]


def events(folder: Path) -> list[dict]:
    return [event for _, event in coordinator.events(folder)]


def test_every_hospital_ends_with_the_same_model_and_inside_its_budget(finished):
    folder, said = finished
    assert [party["name"] for party in said["hospitals"]] == list(NAMES)
    assert {party["rounds"] for party in said["hospitals"]} == {2}
    assert len({party["model_hash"] for party in said["hospitals"]}) == 1
    assert all(4 < party["epsilon"] <= 8 for party in said["hospitals"])
    closed = events(folder / "coordinator")[-1]
    assert (closed["event"], closed["reason"]) == ("run_closed", "rounds")
    assert closed["model_hash"] == said["hospitals"][0]["model_hash"]
    for name in NAMES:
        ledger = read_ledger(folder / "hospitals" / name / "ledger.jsonl")
        assert [record.kind for record in ledger.records] == [
            *("begin", "open"),
            *("reserve", "rotate", "charge", "release", "anchor"),
            *("reserve", "charge", "release", "anchor"),
            "close",
        ]


def test_what_answered_was_the_installed_app_behind_the_gate(finished):
    folder, _ = finished
    for name in NAMES:
        home = folder / "hospitals" / name
        assert (home / "flwr/gate/flwr-clientapp").exists()
        assert not (home / "flwr/apps").exists(), "no bundle was unpacked"
        assert "trained" in {event["event"] for event in events(home)}
        assert "bundle_refused" not in {event["event"] for event in events(home)}


def test_nobody_holds_anybody_elses_secrets(finished):
    folder, _ = finished
    homes = {name: folder / "hospitals" / name for name in NAMES}
    secrets = {name: (home / "kit/supernode.key").read_bytes() for name, home in homes.items()}
    secrets |= {f"{name} keys": (home / "keys/identity.key").read_bytes() for name, home in homes.items()}
    secrets["server"] = (folder / "coordinator/kit/server.key").read_bytes()
    secrets["ca"] = (folder / "kits/ca/ca.key").read_bytes()
    places = {**homes, "coordinator": folder / "coordinator"}
    for place, where in places.items():
        held = [path.read_bytes() for path in where.rglob("*") if path.is_file()]
        for owner, secret in secrets.items():
            belongs = owner.split()[0] == place or (owner, place) == ("server", "coordinator")
            assert any(secret in content for content in held) == belongs, (owner, place)
    assert not list((folder / "coordinator").rglob("epoch.key"))
    for where in places.values():
        assert kits.verify(where / "kit") == []


def test_every_key_on_a_hospitals_disk_is_sealed(finished):
    folder, _ = finished
    for name in NAMES:
        for path in (folder / "hospitals" / name / "keys").glob("*.key"):
            assert b'"values"' not in path.read_bytes(), path


def test_nothing_of_it_is_left_running(finished):
    assert ours(finished[0]) == []


# ---- killed


def pid(log: Path, name: str) -> int:
    return int(re.findall(rf"{name} (\d+) ", log.read_text())[-1])


def kill(session: int) -> None:
    """As a power failure would: the process and everything that it started, at once."""
    os.killpg(session, signal.SIGKILL)


@pytest.fixture
def deployed(tmp_path) -> Iterator[Deployed]:
    made = Deployed(tmp_path / "run", SHORT_STUDY)
    try:
        made.prepare()
        yield made
    finally:
        made.stop()


def wait_for(made: Deployed, condition: Callable[[list[dict]], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition(events(made.coordinator)):
        assert time.monotonic() < deadline
        assert made.server is not None and made.server.poll() is None
        time.sleep(0.2)


def test_a_hospital_and_the_superlink_are_killed_in_mid_round_and_the_study_ends_well(deployed):
    """`server start` and `site start` bring back what they started, and the journal goes on where it was."""
    deployed.start_server()
    for name in NAMES:
        deployed.start_site(name)
    wait_for(deployed, lambda seen: any(e["event"] == "round_opened" for e in seen))
    kill(pid(deployed.folder / "logs/west.log", "SuperNode"))
    wait_for(deployed, lambda seen: any(e["event"] == "update_accepted" for e in seen))
    kill(pid(deployed.folder / "logs/coordinator.log", "SuperLink"))
    deployed.wait(SECONDS)

    parties: list[Party] = deployed.parties()
    assert {party.rounds for party in parties} == {2}
    assert len({party.model_hash for party in parties}) == 1
    assert all(party.epsilon <= 8 for party in parties)
    opened = [event for event in events(deployed.coordinator) if event["event"] == "run_opened"]
    assert len(opened) >= 2, "a new run went on with the study"
    assert [p.pid for p in deployed.sites.values() if p.poll() is not None] == [], (
        "no `site start` had to be given again"
    )
    for party in parties:
        assert checkpoint.read(party.home / "model.safetensors")[1]["round"] == 2
