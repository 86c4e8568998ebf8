"""Public pre-training, from the command to the hospitals; and studies without privacy, which no hospital signs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_study
from test_cli import assert_one_line
from test_cli_deploy import data, run
from test_recipes import some_patients, study_of
from test_simulate import write_study

from fedmedgan.client import checkpoint, joining, pretraining
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.home import Home
from fedmedgan.client.training.local_round import Losses
from fedmedgan.shared.agreement import Agreement, assemble
from fedmedgan.shared.errors import ModelError
from fedmedgan.shared.study import Study, load
from fedmedgan.simulations import consortium, phantoms, public_phantoms

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> tuple[Path, str]:
    """(folder, SHA-256): a study that starts from weights in the same folder, and what the command said of them."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_study(folder / "draft.toml", sites=3)
    options = ("--out", folder / "weights.safetensors", "--steps", 6, "--device", "cpu")
    said = data(run("--format", "json", "pretrain", folder / "draft.toml", *options))
    head, first, second = said["study"]
    text = (folder / "draft.toml").read_text().replace('pretrained = ""\n', "").replace('pretrained_on = ""\n', "")
    (folder / "study.toml").write_text(text.replace("[gan]", "\n".join([head, first, second])))
    return folder, said["sha256"]


@pytest.mark.slow
def test_the_command_writes_weights_and_the_lines_for_the_study(pretrained):
    folder, digest = pretrained
    study = load(folder / "study.toml")
    assert study.gan.pretrained == digest
    assert study.gan.pretrained_on.endswith(" drawn phantoms of fedmedgan")
    arrays, notes = checkpoint.read(folder / "weights.safetensors")
    assert checkpoint.content_hash(arrays) == digest
    assert (notes["recipe"], notes["steps"]) == ("cdcgan", 6)
    untrained = checkpoint.network_arrays(*recipes.load(study).networks())
    assert not all(np.array_equal(arrays[name], untrained[name]) for name in arrays)


@pytest.mark.parametrize("recipe", ["cdcgan", "pix2pix"])
def test_it_is_trained_without_noise_and_can_be_repeated_by_anybody(recipe):
    study = study_of(recipe)
    told: list[tuple[int, Losses]] = []
    runs = [
        pretraining.pretrain(study, some_patients(study), steps=60, device=CPU, tell=lambda *news: told.append(news))
        for _ in range(2)
    ]
    assert checkpoint.content_hash(runs[0]) == checkpoint.content_hash(runs[1])
    assert [done for done, _ in told] == [50, 60] * 2
    start = checkpoint.network_arrays(*recipes.load(study).networks())
    assert not any(np.array_equal(runs[0][name], start[name]) for name in start if name.endswith("weight"))


@pytest.mark.slow
def test_phantoms_for_it_are_of_no_simulated_hospital():
    study = tiny_study(3)
    drawn = public_phantoms.draw(study, patients=9)
    assert drawn.n_patients == drawn.patient_N.max() + 1 == 9
    assert set(drawn.labels_N) <= {0, 1}
    assert len(drawn.images_N1HW) == len(drawn.patient_N) == len(drawn.labels_N)
    assert set(range(3)).isdisjoint(range(public_phantoms.SEED, public_phantoms.SEED + len(phantoms.VENDORS)))
    paired = tiny_study(3, images={"paired": True}, gan={"recipe": "pix2pix", "private": "both", "task": "paired"})
    targets = public_phantoms.draw(paired, patients=3).targets_N1HW
    assert targets is not None
    assert (targets.min(), targets.max()) == (-1, 1), "masks"


@pytest.mark.slow
def test_bad_input_is_one_line_and_writes_nothing(tmp_path):
    study, out = write_study(tmp_path / "study.toml", sites=3), tmp_path / "w.safetensors"
    (tmp_path / "there").write_text("precious")
    assert_one_line(run("pretrain", study, "--out", tmp_path / "there"), "RUN_PATH")
    assert_one_line(run("pretrain", study, "--out", out, "--device", "abacus"), "RUN_DEVICE")
    assert_one_line(run("pretrain", study, "--out", out, "--steps", 0), "RUN_USAGE")
    assert_one_line(run("pretrain", study, "--out", out, "--data", tmp_path / "nowhere"), "DATA_PATH")
    assert_one_line(run("pretrain", tmp_path / "nothing.toml", "--out", out), "CONFIG_NOT_FOUND")
    odd = write_study(tmp_path / "odd.toml", sites=3, gan={"recipe": "dcgan"})
    assert_one_line(run("pretrain", odd, "--out", out), "CONFIG_RANGE")
    assert (tmp_path / "there").read_text() == "precious"
    assert not out.exists()


# ---- at the hospitals


@pytest.fixture
def hospital(pretrained, tmp_path) -> tuple[Path, Path]:
    """(home, study.json) of a hospital that can sign."""
    return a_hospital(load(pretrained[0] / "study.toml"), tmp_path)


def a_hospital(study: Study, folder: Path, **options) -> tuple[Path, Path]:
    phantoms.write_hospital(folder / "images", patients=24, seed=1, vendor=phantoms.vendor_for(0), size=32)
    rules = {"data": str(folder / "images"), "max_epsilon": 50.0, "device": "cpu", **options}
    known = [
        joining.init_home(folder / site.name, site=site.name, budget_book=folder / f"{site.name}-book", **rules)
        for site in study.sites
    ]
    agreed = assemble(study, [*known, consortium._coordinator(folder)])
    (folder / "study.json").write_bytes(Agreement(agreed).to_json())
    return folder / study.sites[0].name, folder / "study.json"


@pytest.mark.slow
def test_a_hospital_signs_with_the_file_and_starts_from_it(pretrained, hospital):
    folder, digest = pretrained
    home, agreed = hospital
    sign = ("study", "sign", agreed, "--home", home, "--yes")
    assert_one_line(run(*sign), "MODEL_HASH")
    checkpoint.write(folder / "other.safetensors", {"generator.x": np.zeros(3, np.float32)})
    assert_one_line(run(*sign, "--weights", folder / "other.safetensors"), "MODEL_HASH")
    assert_one_line(run(*sign, "--weights", folder / "nothing"), "MODEL_HASH")
    assert not list(home.glob("*.signature.json"))
    done = run(*sign, "--weights", folder / "weights.safetensors")
    assert done.returncode == 0, done.stderr
    assert f"starts from weights {digest[:16]}" in done.stdout
    start = checkpoint.network_arrays(*Home(home).networks)
    assert checkpoint.content_hash(start) == digest
    assert run(*sign).returncode == 0, "the home has the file by now"


@pytest.mark.slow
def test_a_further_study_from_the_same_weights_finds_them(pretrained, hospital, tmp_path):
    folder, digest = pretrained
    home, agreed = hospital
    study = Agreement.load(agreed).study
    joining.join(home, study, weights=folder / "weights.safetensors")
    later = study.model_copy(update={"name": "later"})
    joining.join(home, later)

    assert (home / "past" / study.hash[:16] / "initial.safetensors").exists()
    assert checkpoint.content_hash(checkpoint.network_arrays(*Home(home).networks)) == digest


@pytest.mark.slow
def test_weights_of_other_networks_are_refused_before_anything_is_signed(hospital, tmp_path):
    home, agreed = hospital
    digest = checkpoint.write(tmp_path / "odd.safetensors", {"generator.x": np.zeros(3, np.float32)})
    study = Agreement.load(agreed).study
    study = study.model_copy(update={"gan": study.gan.model_copy(update={"pretrained": digest})})
    with pytest.raises(ModelError) as caught:
        joining.join(home, study, weights=tmp_path / "odd.safetensors")
    assert caught.value.code == "MODEL_MISMATCH"
    assert not (home / "ledger.jsonl").exists()


@pytest.mark.slow
def test_weights_that_the_study_does_not_name_are_refused(pretrained, tmp_path):
    folder, _ = pretrained
    weights = folder / "weights.safetensors"
    home, agreed = a_hospital(tiny_study(3), tmp_path)
    assert_one_line(run("study", "sign", agreed, "--home", home, "--yes", "--weights", weights), "RUN_USAGE")
    options = ("--weights", weights, "--out", tmp_path / "run")
    assert_one_line(run("simulate", folder / "draft.toml", *options), "RUN_USAGE")
    assert_one_line(run("simulate", folder / "study.toml", "--out", tmp_path / "run"), "MODEL_HASH")
    assert not (tmp_path / "run").exists()


# ---- without privacy


def test_no_hospital_signs_a_study_without_privacy(tmp_path):
    home, agreed = a_hospital(tiny_study(3, privacy="none"), tmp_path)
    done = run("study", "sign", agreed, "--home", home, "--yes")
    assert_one_line(done, "PRIVACY_NONE")
    assert "WITHOUT privacy" in done.stdout
    assert not list(home.glob("*.signature.json"))
    assert not (home / "ledger.jsonl").exists()
    assert not (home / "noise.json").exists()


def test_a_hospital_whose_images_are_public_has_a_ledger_and_nothing_in_it(tmp_path):
    home, agreed = a_hospital(tiny_study(3, privacy="none"), tmp_path, public_images=True)
    assert run("study", "sign", agreed, "--home", home, "--yes").returncode == 0
    opened = Home(home)
    assert opened.sigma == 0
    assert [r.kind for r in opened._ledger_history().records] == ["begin"]
    assert opened._ledger_history().studies == ()
    assert_one_line(run("site", "budget", "--home", home), "PRIVACY_NONE")


def test_the_price_of_a_study_without_privacy_is_no_number(tmp_path):
    study = write_study(tmp_path / "study.toml", sites=3, privacy="none", gan={"norm": "batch"})
    shown = run("study", "check", study)
    assert shown.returncode == 0, shown.stderr
    assert "WITHOUT privacy" in shown.stdout
    assert "sigma" not in shown.stdout
    found = data(run("--format", "json", "study", "check", study))
    assert found["private"] is False
    assert {row["noise_multiplier"] for row in found["sites"]} == {None}
    assert {row["epsilon_by_round"] for row in found["sites"]} == {None}
    assert "WITHOUT privacy" in run("study", "show", study).stdout


@pytest.mark.slow
def test_the_price_names_what_is_charged_shared_and_set(tmp_path):
    study = write_study(
        tmp_path / "study.toml",
        sites=3,
        gan={"recipe": "pix2pix", "private": "both", "task": "denoise", "generator_norm": "instance", "norm": "none"},
        training={"local_steps": 4, "discriminator_steps": 2},
        aggregation={"share": "generator", "optimizer": "fedavgm"},
    )
    said = " ".join(run("study", "check", study).stdout.split())
    for words in (
        "2 rounds of 6 private steps (4 of the discriminator, 2 of the generator)",
        "recipe: pix2pix, low dose to full dose; reads patients: discriminator and generator",
        "stabilisers: instance norm in the generator, no norm in the discriminator",
        "shared: the generator alone; each discriminator stays at its hospital",
        "aggregation: FedAvgM (learning rate 1, momentum 0.9)",
    ):
        assert words in said


def test_a_study_that_its_recipe_does_not_fit_has_no_price(tmp_path):
    study = write_study(tmp_path / "study.toml", sites=3, gan={"recipe": "pix2pix", "task": "denoise"})
    assert_one_line(run("study", "check", study), "CONFIG_RANGE")
