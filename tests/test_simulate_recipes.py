"""Every recipe, and every kind of setting, trained by three hospitals: engine, encryption, ledgers and report are real.

All but one study share one simulation (one_simulation.py), because an engine takes half a minute to start; that one is
run as a user would, by `fedmedgan pretrain` and `fedmedgan simulate`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import one_simulation
import pytest
import torch
from test_recipes import FAST, KINDS, SMALL, some_patients
from test_simulate import run, write_study

from fedmedgan.client import checkpoint, pretraining
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.study import load
from fedmedgan.simulations import consortium, phantoms, record

pytestmark = pytest.mark.slow

TIMEOUT = 1800
PRETRAINED = "pretrained"
TASKS = ("super-resolution-2", "super-resolution-4", "k-space")
"""Of pix2pix, next to its first, which is among KINDS."""
SETTINGS: dict[str, dict] = {
    **{n.replace("_", "-"): {**kind, "gan": {"recipe": n, **kind.get("gan", {})}} for n, kind in KINDS.items()},
    **{task: {"gan": {"recipe": "pix2pix", "private": "both", "task": task}} for task in TASKS},
    "paired": {"images": {"paired": True}, "gan": {"recipe": "pix2pix", "private": "both", "task": "paired"}},
    "wgan-without-norm": {"gan": {**KINDS["wgan"]["gan"], "recipe": "wgan", "norm": "none"}},
    "generator-alone": {"aggregation": {"share": "generator", "optimizer": "fedadam", "learning_rate": 0.01}},
    "momentum": {"aggregation": {"optimizer": "fedavgm"}, "gan": {"weight_norm": True}},
    "all-at-once": {
        "gan": {"ema": 0.5, "attention": True},
        "training": {
            "adaptive": True, "replay": 0.5, "fake_penalty": 1.0, "spectral_projection": True, "views": 2,
            "real_label": 0.9,
        },
    },
}  # fmt: skip


def write(folder: Path, name: str, **sections) -> Path:
    """A study of three hospitals with two rounds of four discriminator steps."""
    steps = {"local_steps": 4, "discriminator_steps": 2}
    sections["training"] = {**steps, **sections.get("training", {})}
    sections["gan"] = {**SMALL, **sections.get("gan", {})}
    return write_study(folder / f"{name}.toml", sites=3, **sections, name=name)


def pretrained_study(folder: Path) -> Path:
    """A study that starts from weights, which are in the folder."""
    study = load(write(folder, "draft", gan={"recipe": "acgan"}))
    arrays = pretraining.pretrain(study, some_patients(study), steps=200, device=torch.device("cpu"))
    digest = checkpoint.write(folder / one_simulation.WEIGHTS, arrays)
    return write(folder, PRETRAINED, gan={"recipe": "acgan", "pretrained": digest, "pretrained_on": "noise"})


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """The folder with the run folders of all SETTINGS."""
    folder = tmp_path_factory.mktemp("recipes")
    studies = [pretrained_study(folder)]
    studies += [write(folder, name, **sections) for name, sections in SETTINGS.items()]
    command = [sys.executable, one_simulation.__file__, folder, *studies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return folder


def assert_ended_well(folder: Path) -> record.RunRecord:
    """Both rounds are done, all hospitals hold one model that moved, what was trained is charged, no test failed."""
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
    ran = record.load(folder)
    assert ran.closed is not None
    assert (ran.closed.rounds, ran.closed.reason) == (2, "rounds")
    assert not any(h.troubles for h in ran.hospitals)
    for turn in ran.rounds:
        assert turn.applied is not None
        assert {h.updated[turn.number].model_hash for h in ran.hospitals} == {turn.applied.model_hash}
    models = [checkpoint.read(home / "model.safetensors") for home in consortium.homes(folder, ran.study)]
    assert {notes["round"] for _, notes in models} == {2}
    assert len({checkpoint.content_hash(arrays) for arrays, _ in models}) == 1
    assert len({turn.applied.model_hash for turn in ran.rounds if turn.applied}) == 2
    for hospital in ran.hospitals:
        assert {t.steps for t in hospital.trained.values()} == {ran.study.steps_per_round}
        assert not [c for t in hospital.trained.values() for c in t.checks.values() if c == "failed"]
    twin = json.loads((folder / "report.json").read_text())
    assert twin["model"]["equal_at_all_hospitals"] is True
    assert twin["rounds_done"] == 2
    return ran


@pytest.mark.parametrize("name", [*SETTINGS, PRETRAINED])
def test_it_is_trained_federated_and_charged(simulated, name):
    folder = simulated / name
    ran = assert_ended_well(folder)
    for home in consortium.homes(folder, ran.study):
        history = read_ledger(home / "ledger.jsonl")
        assert sum(spent.steps for spent in history.spent(ran.study.hash)) == 2 * ran.study.steps_per_round
        assert len([r for r in history.records if r.kind == "charge"]) == 2
    for trained in (t for h in ran.hospitals for t in h.trained.values()):
        assert (trained.checks["rows"], trained.checks["clipping"]) == ("passed", "passed")
        assert trained.epsilon is not None
        assert 0 < trained.epsilon <= ran.study.privacy.epsilon
    page = (folder / "report.html").read_text()
    assert f"<code>{ran.study.gan.recipe}</code>" in page


def test_the_method_of_gradients_is_that_of_the_recipe(simulated):
    found = {
        name: {t.method for h in record.load(simulated / name).hospitals for t in h.trained.values()}
        for name in SETTINGS
    }
    assert found.pop("wgan-gp") == {"functional"}
    assert found.pop("momentum") == {"hooks"}, "weight normalisation"
    fast = (*FAST, *TASKS, "paired", "wgan-without-norm", "generator-alone", "all-at-once")
    assert {method for name in fast for method in found[name]} == {"book-keeping"}


def test_steps_of_both_networks_are_charged_where_both_read_patients(simulated):
    steps = {name: record.load(simulated / name).study.steps_per_round for name in SETTINGS}
    both = {name for name, sections in SETTINGS.items() if sections.get("gan", {}).get("private") == "both"}
    assert both >= {"pix2pix", "cyclegan", "paired", *TASKS}
    assert steps == {name: 6 if name in both else 4 for name in SETTINGS}


def test_a_discriminator_that_is_not_shared_stays_where_it_is(simulated):
    folder = simulated / "generator-alone"
    ran = record.load(folder)
    homes = consortium.homes(folder, ran.study)
    models = [checkpoint.read(home / "model.safetensors")[0] for home in homes]
    own = [checkpoint.read(home / "optimizers.safetensors")[0] for home in homes]
    assert not [name for name in models[0] if name.startswith("discriminator.")]
    kept = [name for name in own[0] if name.startswith("kept.discriminator.")]
    assert kept
    assert not any(np.array_equal(own[0][n], own[1][n]) for n in kept if n.endswith("weight"))
    generator, _ = recipes.load(ran.study).networks()
    assert ran.opened is not None
    assert ran.opened.parameters == sum(p.numel() for p in generator.parameters())


def test_the_state_of_an_outer_optimiser_and_the_average_are_those_of_all_hospitals(simulated):
    for name, prefix in (("generator-alone", "outer."), ("momentum", "outer."), ("all-at-once", "average.generator.")):
        study = record.load(simulated / name).study
        models = [checkpoint.read(h / "model.safetensors")[0] for h in consortium.homes(simulated / name, study)]
        states = [{n: a for n, a in arrays.items() if n.startswith(prefix)} for arrays in models]
        assert states[0], name
        assert len({checkpoint.content_hash(state) for state in states}) == 1


def test_it_starts_from_the_weights_that_the_study_names(simulated):
    start, _ = checkpoint.read(simulated / one_simulation.WEIGHTS)
    study = record.load(simulated / PRETRAINED).study
    trained, _ = checkpoint.read(consortium.homes(simulated / PRETRAINED, study)[0] / "model.safetensors")
    untrained = checkpoint.network_arrays(*recipes.load(study).networks())
    assert 0 < distance(trained, start) < distance(trained, untrained) / 2
    assert "trained on public images (noise)" in (simulated / PRETRAINED / "report.html").read_text()


def distance(one: checkpoint.Arrays, two: checkpoint.Arrays) -> float:
    return float(np.linalg.norm(checkpoint.flatten(one) - checkpoint.flatten(two)))


# ---- as a user would


def test_without_privacy_from_pre_trained_weights_by_the_commands(tmp_path):
    """With layers that mix records, which no private study may have."""
    mixing = {"norm": "batch", "minibatch_stddev": True}
    draft, weights = write(tmp_path, "draft", privacy="none", gan=mixing), tmp_path / "initial.safetensors"
    phantoms.write_hospital(tmp_path / "public", patients=20, seed=77, vendor=phantoms.vendor_for(0), size=32)
    options = ("--out", weights, "--data", tmp_path / "public", "--steps", "20", "--device", "cpu")
    done = run("--format", "json", "pretrain", draft, *options)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["data"]
    assert said["pretrained_on"].endswith("public images of the folder public")
    gan = {**mixing, "pretrained": said["sha256"], "pretrained_on": said["pretrained_on"]}
    study = write(tmp_path, "public", privacy="none", gan=gan)
    done = run("--format", "json", "simulate", study, "--weights", weights, "--no-arms", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    ran = assert_ended_well(tmp_path / "run")
    said = json.loads(done.stdout)["data"]
    assert (said["private"], said["epsilon"]) == (False, None)
    assert "WITHOUT privacy" in done.stderr
    assert "epsilon" not in done.stderr
    assert {t.method for h in ran.hospitals for t in h.trained.values()} == {"plain"}
    for home in consortium.homes(tmp_path / "run", ran.study):
        assert [r.kind for r in read_ledger(home / "ledger.jsonl").records] == ["begin"], "nothing is charged"
    assert "Trained WITHOUT privacy." in (tmp_path / "run" / "report.html").read_text()
