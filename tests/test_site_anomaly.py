"""``fedmedgan site anomaly``, and anomaly scores of a model that was really trained."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_study
from sklearn.metrics import roc_auc_score
from test_cli import assert_one_line
from test_cli_deploy import data, run
from test_site_evaluate import other_patients, trained

from fedmedgan.client import checkpoint, pretraining
from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.home import Home
from fedmedgan.client.release.anomaly import AnomalyScorer, normal_against_rest
from fedmedgan.client.release.images import NotMeasurable
from fedmedgan.simulations import phantoms

QUICK = ("--steps", "20")


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng, labels = np.random.default_rng(seed), np.arange(count) % 2
    images = phantoms.radiographs(phantoms.draw_anatomy(rng, count), labels, 28, rng)
    return (images[:, None] * 2 - 1).astype(np.float16), labels


@pytest.mark.slow
def test_a_trained_model_tells_what_it_never_saw():
    """Radiographs upside down and with a bright square, of patients whom the model was not trained on."""
    torch.set_num_threads(1)
    gan = {"latent": 16, "generator_width": 8, "discriminator_width": 8, "generator_norm": "batch"}
    study = tiny_study(gan=gan, training={"patients_per_step": 24})
    images, labels = drawn(200, 1)
    public = PatientImages(images, labels, np.arange(200), 200, FolderReport((), 200, 200), ())
    networks = recipes.load(study).networks()
    untrained = AnomalyScorer(*networks, study, steps=60)
    weights = pretraining.pretrain(study, public, steps=150, device=torch.device("cpu"))
    checkpoint.load_networks(weights, *networks)
    scorer = AnomalyScorer(*networks, study, steps=150)

    normal, classes = drawn(60, 2)
    with_a_square = normal.copy()
    with_a_square[:, :, 8:16, 8:16] = 1

    def auc(by: AnomalyScorer, odd: np.ndarray) -> float:
        scores = np.concatenate([by.scores(normal, classes), by.scores(odd, classes)])
        return normal_against_rest(scores, np.repeat([True, False], len(normal)))

    assert auc(scorer, normal[:, :, ::-1]) > 0.9
    assert auc(scorer, with_a_square) > 0.75
    assert auc(untrained, normal[:, :, ::-1]) < 0.6, "it is the training that tells them apart"
    alone = AnomalyScorer(networks[0], None, study, steps=1)
    assert (scorer.looks_at, alone.looks_at) == ("pixels and the discriminator's features", "pixels alone")


def test_the_auc_is_of_what_is_not_normal_and_wants_some_of_both():
    scores, is_normal = np.arange(20.0), np.arange(20) < 12
    assert normal_against_rest(scores, is_normal) == 1
    assert normal_against_rest(-scores, is_normal) == 0
    mixed = np.random.default_rng(0).permutation(20)
    assert normal_against_rest(mixed, is_normal) == roc_auc_score(~is_normal, mixed)
    for too_few in (np.arange(20) < 4, np.arange(20) < 16):
        with pytest.raises(NotMeasurable, match="at least 5 images"):
            normal_against_rest(scores, too_few)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Of a study that shares its generator alone: each hospital keeps its own discriminator."""
    return trained(tmp_path_factory.mktemp("anomaly"), aggregation={"share": "generator"})


def written(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_each_image_of_a_folder_gets_a_score_that_stays(home, tmp_path):
    folder, out = other_patients(tmp_path / "images"), tmp_path / "scores.csv"
    ledger = (home / "ledger.jsonl").read_bytes()
    options = ("--home", home, "--images", folder, "--out", out, *QUICK)
    said = run("site", "anomaly", *options)
    assert said.returncode == 0, said.stderr
    assert "must not leave this hospital" in said.stdout
    assert "held against clear, by pixels and the discriminator's features" in said.stdout, "the one that it keeps"
    assert "anomaly_auc " in said.stdout
    assert "PHANTOM" not in said.stdout + said.stderr
    assert (home / "ledger.jsonl").read_bytes() == ledger

    rows = written(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert [row["path"] for row in rows] == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.dcm"))
    assert all(row["label"] == Path(row["path"]).parent.name for row in rows)
    is_ill = [row["label"] == "opacity" for row in rows]
    expected = roc_auc_score(is_ill, [float(row["score"]) for row in rows])
    assert f"{'anomaly_auc':<24} {expected:>12.5g}  sensitive" in said.stdout
    assert_one_line(run("site", "anomaly", *options), "RUN_PATH")
    assert written(out) == rows, "what is there is not written over"

    other = ("--home", home, "--images", folder, "--normal", "opacity", *QUICK)
    found = data(run("--format", "json", "site", "anomaly", *other))
    assert (found["rule"], found["must_stay"], found["scores"]) == ("local", True, None)
    settings = found["measurements"][0]["settings"]
    assert (settings["normal"], settings["real_images"], settings["encoder_steps"]) == ("opacity", len(rows), 20)
    assert_one_line(run("site", "anomaly", "--home", home, "--images", folder, "--normal", "ill"), "RUN_USAGE")


@pytest.mark.slow
def test_labels_are_not_needed_and_without_a_discriminator_pixels_are_compared(home, tmp_path):
    folder = other_patients(tmp_path / "images") / "clear"
    (home / "optimizers.safetensors").rename(tmp_path / "away")
    try:
        assert Home(home).own_discriminator() is None
        options = ("--home", home, "--images", folder, "--out", tmp_path / "scores.csv", *QUICK)
        found = data(run("--format", "json", "site", "anomaly", *options))
    finally:
        (tmp_path / "away").rename(home / "optimizers.safetensors")
    assert found["measurements"][0]["settings"]["looks_at"] == "pixels alone"
    assert [m["name"] for m in found["measurements"]] == ["anomaly_scores"]
    assert found["not_measured"][0]["reason"].startswith("the AUC of normal images needs at least")
    assert {row["label"] for row in written(tmp_path / "scores.csv")} == {""}


@pytest.mark.slow
def test_the_discriminator_is_the_one_that_was_trained(home):
    hospital = Home(home)
    own = hospital.own_discriminator()
    assert own is not None
    arrays, _ = checkpoint.read(home / "optimizers.safetensors")
    for name, weights in own.state_dict().items():
        np.testing.assert_array_equal(weights.numpy(), arrays[f"kept.discriminator.{name}"])
    initial = hospital.recipe.networks()[1].state_dict()
    assert any(not torch.equal(weights, initial[name]) for name, weights in own.state_dict().items())
