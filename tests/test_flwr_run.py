"""``flwr run .``: the repository is an ordinary Flower app."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_simulate import write_study

from fedmedgan.simulations.ports import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture
def flower(tmp_path, ray_folder):
    """Settings of a Flower of our own; its SuperLink, which stays up by itself, is ended afterwards."""
    home = tmp_path / "flwr"
    yield {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": ray_folder,
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
    }
    for process in psutil.process_iter(["cmdline"]):
        try:
            ours = process.environ().get("FLWR_HOME") == str(home)
        except psutil.Error:
            continue
        if ours and any("flower-" in part for part in process.info["cmdline"] or []):
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def flwr_run(flower, tmp_path, nodes: int) -> str:
    study = write_study(tmp_path / "study.toml", sites=3)
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1"
    config = f'study="{study}" runs-folder="{tmp_path / "runs"}"'
    command = ["flwr", "run", str(ROOT), "--stream", "--federation-config", federation, "-c", config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=flower, cwd=tmp_path)
    return done.stdout + done.stderr


def test_it_runs_the_whole_cycle_and_writes_the_report(flower, tmp_path):
    said = flwr_run(flower, tmp_path, nodes=3)
    reports = list((tmp_path / "runs").glob("*/report.html"))
    assert len(reports) == 1, said
    events = [json.loads(line) for line in (reports[0].parent / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "run_closed"
    assert events[-1]["rounds"] == 2
    assert "report: " in said


def test_too_few_supernodes_are_named(flower, tmp_path):
    said = flwr_run(flower, tmp_path, nodes=2)
    assert "error[RUN_QUORUM]: 2 SuperNodes for 3 hospitals" in said
    assert "num-supernodes=3" in said
