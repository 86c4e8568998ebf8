"""The coordinator's SuperLink is kept going: what is tried again, what stops, and a real one without its executor."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from real_flower import make_kits, until

from fedmedgan.deploy import kits, processes, superlink
from fedmedgan.deploy.environment import BIN
from fedmedgan.deploy.kit_config import COORDINATOR_TOML, load
from fedmedgan.deploy.superlink import Superlink
from fedmedgan.shared.errors import RunError
from fedmedgan.simulations.ports import free_port

DIED = "No heartbeat received from the task"


class Runs:
    """Stands for the SuperLink: each run ends as it was told; a round is applied where the text says so."""

    def __init__(self, folder: Path, *outcomes: str) -> None:
        self.folder, self.outcomes, self.log = folder, list(outcomes), folder / "log"
        self.process = SimpleNamespace(poll=lambda: None)

    def run(self, say: superlink.Say) -> str:
        outcome = self.outcomes.pop(0)
        if outcome.startswith("round, "):
            with (self.folder / "events.jsonl").open("a") as events:
                events.write(json.dumps({"event": "round_applied"}) + "\n")
        if outcome.startswith("raise "):
            raise RunError("RUN_FLOWER", outcome)
        return outcome.removeprefix("round, ")


def keep_going(folder: Path, *outcomes: str) -> tuple[str, int]:
    """The reason of the end, and how many runs were started."""
    runs = Runs(folder, *outcomes)
    reason = superlink._keep_going(runs, lambda line: None)  # type: ignore[arg-type]
    return reason, len(outcomes) - len(runs.outcomes)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(superlink, "PAUSE_SECONDS", 0.0)


def test_what_passes_is_tried_again(tmp_path):
    quorum = "ServerApp failed with exception: error[RUN_QUORUM]: 2 of 3 hospitals are left"
    journal = "ServerApp failed with exception: error[RUN_JOURNAL]: in use"
    assert keep_going(tmp_path, DIED, quorum, journal, "raise flwr run: no answer", "rounds", "never") == ("rounds", 5)


def test_hospitals_may_stay_away_for_as_long_as_they_like(tmp_path):
    assert keep_going(tmp_path, *["error[RUN_QUORUM]: x"] * 50, "budget") == ("budget", 51)


@pytest.mark.parametrize("code", ["MODEL_DIVERGED", "STUDY_SIGNATURE", "HE_SECRET_AT_SERVER", "KEY_PASSPHRASE"])
def test_what_a_person_must_see_stops(tmp_path, code):
    with pytest.raises(RunError, match=code):
        keep_going(tmp_path, f"ServerApp failed with exception: error[{code}]: x", "rounds")


def test_runs_that_only_die_stop_after_a_while_and_a_round_between_them_counts(tmp_path):
    dying = [DIED] * (superlink.MAX_DEATHS - 1)
    assert keep_going(tmp_path, *dying, f"round, {DIED}", *dying, "rounds")[0] == "rounds"
    with pytest.raises(RunError, match="died without a round"):
        keep_going(tmp_path, *dying, DIED, "rounds")


@pytest.fixture
def server(tmp_path) -> Iterator[Superlink]:
    port = free_port()
    kit = make_kits(tmp_path / "kits", port=port, superlink_port=port)
    folder = tmp_path / "coordinator"
    folder.mkdir()
    kits.copy(kit, folder / "kit")
    with processes.only_one(folder / "flwr/server.lock") as lock:
        made = Superlink(folder, load(folder / "kit" / COORDINATOR_TOML), lock)
        yield made
        made.stop()


@pytest.mark.slow
def test_a_run_that_never_begins_is_noticed_and_mended(server, monkeypatch, tmp_path):
    """Flower's executor dies and nothing starts it again; the SuperLink looks healthy, and takes runs."""
    monkeypatch.setattr(superlink, "PENDING_SECONDS", 5.0)
    monkeypatch.setattr(superlink, "LOOK_SECONDS", 1.0)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "does not begin" in line:  # the new one may take as long as a busy machine makes it
            monkeypatch.setattr(superlink, "PENDING_SECONDS", 600.0)

    server.start(say)
    first = server.process.pid

    def executors() -> list[psutil.Process]:
        return [p for p in psutil.Process(first).children() if "flower-superexec" in " ".join(p.cmdline())]

    (executor,) = until(executors, 60, "the executor is there")
    executor.kill()
    until(lambda: executor.status() == psutil.STATUS_ZOMBIE, 20, "the executor is dead, and nobody has noticed")
    assert server._healthy()
    outcome = server.run(say)
    assert "the run does not begin: the SuperLink is started again" in said
    assert server.process.pid != first
    assert "error[CONFIG_NOT_FOUND]" in outcome, "the same run has begun, in a folder without a study"

    # Hospitals of the kit are registered, twice the same; one that left the kit is not any more.
    server.register(say)
    notes = server.folder / "supernodes.json"
    before = json.loads(notes.read_text())
    key, entry = next(iter(before.items()))
    notes.write_text(json.dumps({k: v for k, v in before.items() if k != key}))  # killed before it was noted
    server.register(say)
    assert json.loads(notes.read_text())[key] == entry
    (server.kit / "supernodes/west.pub").rename(tmp_path / "west.pub")
    server.register(say)

    def registered() -> list[str]:
        nodes = server._flwr("supernode", "ls", superlink.NAME, "--verbose")["nodes"]
        return [node["node-id"] for node in nodes if node["status"] == "registered"]

    known = json.loads(notes.read_text()).values()
    assert sorted(registered()) == sorted(entry["node"] for entry in known if entry["name"] != "west")
    assert [line for line in said if "registered" in line] == [
        *(f"{name} is registered" for name in ("north", "south", "west", entry["name"])),
        "west is no longer registered",
    ]
    (tmp_path / "west.pub").rename(server.kit / "supernodes/west.pub")
    with pytest.raises(RunError, match="the key of west was withdrawn"):
        server.register(say)


def test_ending_ends_everything_in_the_session(tmp_path):
    script = "trap '' TERM; sleep 300 & echo started; wait"
    with processes.only_one(tmp_path / "lock") as lock:
        process = processes.spawn(
            ["bash", "-c", script], env={"PATH": "/usr/bin:/bin"}, folder=tmp_path, log=tmp_path / "log", lock=lock
        )
        until(lambda: "started" in (tmp_path / "log").read_text(), 20, "it runs")
        child = psutil.Process(process.pid).children()[0]
        processes.stop(process, seconds=0.3)
        assert process.returncode == -9
        child.wait(10)


def test_an_error_is_found_in_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("one\n\x1b[91mERROR \x1b[0m:  Exit Code: 305\nNot registered.\n\nINFO: bye\n")
    assert processes.last_error(log) == "ERROR : Exit Code: 305 Not registered. INFO: bye"
    assert processes.last_error(tmp_path / "none") == ""


def test_flowers_commands_are_this_installations():
    for name in ("flwr", "flower-superlink", "flower-supernode", "fedmedgan"):
        assert (BIN / name).exists()
    assert subprocess.run([BIN / "fedmedgan", "--help"], capture_output=True).returncode == 0
