"""The command line: what a user types wrong gets one clear line, exit code 2, and loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FEDMEDGAN = str(Path(sys.executable).with_name("fedmedgan"))


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [FEDMEDGAN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env={**os.environ})


@pytest.fixture
def study(tmp_path) -> Path:
    path = tmp_path / "study.toml"
    assert run("study", "new", path).returncode == 0
    return path


def assert_one_line(done: subprocess.CompletedProcess, code: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error[")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error[{code}]: ")
    assert "Traceback" not in done.stderr + done.stdout


def test_a_new_study_is_valid_and_equals_the_built_in_one(study):
    done = run("--format", "json", "study", "show", study)
    shown = json.loads(done.stdout)["data"]
    from fedmedgan.shared.study import load
    from fedmedgan.simulations import DEFAULT_STUDY

    assert shown["hash"] == load(DEFAULT_STUDY).hash


def test_a_study_is_never_overwritten(study):
    before = study.read_text()
    assert_one_line(run("study", "new", study), "RUN_PATH")
    assert study.read_text() == before


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("epsilon = 8.0", "epsilon = nan", "CONFIG_NOT_FINITE"),
        ("epsilon = 8.0", "epsilon = -1.0", "CONFIG_RANGE"),
        ("delta = 0.0001", "delta = 0.9", "CONFIG_DELTA"),
        ("epsilon = 8.0", "epsilonn = 8.0", "CONFIG_UNKNOWN_KEY"),
        ("rounds = 10", "rounds = -5", "CONFIG_RANGE"),
        ("size = 64", "size = 63", "CONFIG_RANGE"),
        ('name = "west"', 'name = "north"', "STUDY_ROSTER"),
        ('weight = 1\n\n[[sites]]\nname = "south"', 'weight = 2000\n\n[[sites]]\nname = "south"', "CONFIG_RANGE"),
    ],
)
def test_bad_studies(study, tmp_path, old, new, code):
    text = study.read_text()
    assert old in text
    study.write_text(text.replace(old, new))
    assert_one_line(run("study", "check", study), code)
    assert_one_line(run("simulate", study, "--out", tmp_path / "run"), code)
    assert not (tmp_path / "run").exists()


def test_a_missing_study(tmp_path):
    assert_one_line(run("simulate", tmp_path / "nothing.toml"), "CONFIG_NOT_FOUND")


def test_two_sites_are_too_few(study):
    text = study.read_text()
    start, end = text.index('[[sites]]\nname = "west"'), text.index("[images]")
    study.write_text(text[:start] + text[end:])
    assert_one_line(run("study", "check", study), "STUDY_ROSTER")


def test_bad_options(study, tmp_path):
    out = tmp_path / "run"
    assert_one_line(run("simulate", study, "--data", "north", "--out", out), "CONFIG_TYPE")
    assert_one_line(run("simulate", study, "--data", f"nobody={tmp_path}", "--out", out), "STUDY_ROSTER")
    assert_one_line(run("simulate", study, "--data", f"north={tmp_path}/no", "--out", out), "DATA_PATH")
    assert_one_line(run("simulate", study, "--drop", "north", "--out", out), "CONFIG_TYPE")
    assert_one_line(run("simulate", study, "--device", "abacus", "--out", out), "RUN_DEVICE")
    assert not out.exists()


def test_a_run_folder_in_use_is_left_alone(study, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert_one_line(run("simulate", study, "--out", out), "RUN_PATH")
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_a_folder_without_a_usable_image_stops_before_anything_is_trained(study, tmp_path):
    empty = tmp_path / "notes"
    empty.mkdir()
    (empty / "SMITH^JOHN.txt").write_text("no image")
    done = run("simulate", study, "--data", f"north={empty}", "--out", tmp_path / "run")
    assert_one_line(done, "DATA_EMPTY")
    assert "SMITH" not in done.stderr + done.stdout
    assert not list(tmp_path.rglob("update.safetensors"))


def test_json_errors_are_one_envelope(tmp_path):
    done = run("--format", "json", "study", "check", tmp_path / "nothing.toml")
    assert done.returncode == 2
    body = json.loads(done.stdout)
    assert body["status"] == "error"
    assert body["error"]["code"] == "CONFIG_NOT_FOUND"
    assert body["error"]["hint"]


@pytest.mark.slow
def test_study_check_tells_the_price(study):
    done = run("--format", "json", "study", "check", study)
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout)["data"]
    for site in cost["sites"]:
        curve = site["epsilon_by_round"]
        assert curve == sorted(curve)
        assert 7.5 < curve[-1] <= 8.0
    assert cost["bytes_up"] < cost["bytes_float32"] < cost["bytes_down"]
    assert cost["seconds_training"] > 0
    assert cost["record"] == "an image with its label"
