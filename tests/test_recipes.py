"""Every recipe through the one engine: trained, private record by record, and refused where it would not be."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_study
from test_local_round import patients
from torch import nn

from fedmedgan.client import gans
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.gans.parts.translation import degraded
from fedmedgan.client.gans.recipe import Fakes, Recipe, Records, shifted
from fedmedgan.client.training.estimate import refuse_mixing
from fedmedgan.client.training.local_round import LocalTrainer, PatientSampler
from fedmedgan.client.training.randomness import InsecureRandom, RandomSource, SystemRandom
from fedmedgan.client.training.witness import NoWitness
from fedmedgan.shared.errors import FedMedGanError, PrivacyError, StudyError
from fedmedgan.shared.privacy.records import failed_checks
from fedmedgan.shared.study import Study

SMALL = {"generator_width": 4, "discriminator_width": 4}
FAST = ("vanilla", "dcgan", "cdcgan", "wgan", "acgan", "pix2pix", "cyclegan")
"""Recipes of the package whose layers book-keeping knows; others may have other layers."""
PACKAGED = (*FAST, "wgan_gp")


def declared(name: str) -> dict[str, dict]:
    """What a study has to say to fit a recipe, by what the recipe's file declares."""
    recipe = importlib.import_module(f"fedmedgan.client.gans.{name}").RECIPE
    gan = {"private": recipe.private, "task": recipe.tasks[0]}
    return {"gan": gan} if recipe.conditional else {"gan": gan, "images": {"classes": ("any",)}}


KINDS: dict[str, dict] = {name: declared(name) for name in recipes.known()}
"""Every file of the folder: a new one is tried without a line in here."""


def study_of(name: str, **sections) -> Study:
    merged: dict[str, dict] = {"images": {"size": 28}, "training": {"discriminator_steps": 1, "local_steps": 2}}
    for given in (declared(name), sections):
        for section, values in given.items():
            merged[section] = merged.get(section, {}) | values if isinstance(values, dict) else values
    merged["gan"] = {"recipe": name, **SMALL} | merged.get("gan", {})
    return tiny_study(**merged)


def some_patients(study: Study, n: int = 24) -> PatientImages:
    found = patients([1] * n)
    labels = found.labels_N % len(study.images.classes)
    targets = found.images_N1HW if study.images.paired else None
    random = np.random.default_rng(1).random(found.images_N1HW.shape).astype(np.float16) * 2 - 1
    size = study.images.size
    images = random if size == 28 else np.resize(random, (len(random), 1, size, size))
    return PatientImages(images, labels, found.patient_N, n, found.report, (), targets_N1HW=targets)


def trainer_of(study: Study, **options) -> LocalTrainer:
    return LocalTrainer(
        study,
        *recipes.load(study).networks(),
        PatientSampler(some_patients(study), 0.25, SystemRandom()),
        random=SystemRandom(),
        device=torch.device("cpu"),
        **({"noise_multiplier": 1.0} | options),
    )


def weights_of(one: LocalTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in (*one.generator.parameters(), *one.discriminator.parameters())]


@pytest.mark.parametrize("name", KINDS)
def test_every_file_is_a_recipe(name):
    assert isinstance(recipes.load(study_of(name)), Recipe)


def test_no_recipe_of_the_package_is_missing():
    assert set(PACKAGED) <= set(KINDS)


NEW_FILE = """
from fedmedgan.client.gans.vanilla import Vanilla

class Mine(Vanilla):
    record = "an image of a test's own"

RECIPE = Mine
"""


def test_a_new_file_is_tried_without_a_line_in_here(tmp_path, monkeypatch):
    """Also one that needs a study of its own kind: one class."""
    (tmp_path / "newfile.py").write_text(NEW_FILE)
    monkeypatch.setattr(gans, "__path__", [*gans.__path__, str(tmp_path)])
    assert "newfile" in recipes.known()
    one = trainer_of(study_of("newfile"))
    one.train(1)
    assert not failed_checks(one.checks)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("noise_multiplier", [1.0, None])
def test_a_recipe_is_trained_and_no_check_fails(name, noise_multiplier):
    study = study_of(name, training={"local_steps": 4})
    one = trainer_of(study, noise_multiplier=noise_multiplier)
    before = weights_of(one)
    losses = one.train(4)
    assert np.isfinite([losses.generator, losses.discriminator_on_fakes]).all()
    still = [torch.equal(a, b) for a, b in zip(before, weights_of(one), strict=True)]
    assert not all(still[: len(still) // 2])
    assert not all(still[len(still) // 2 :])
    if noise_multiplier:
        checks = one.checks
        assert not failed_checks(checks)
        assert checks["rows"] == checks["clipping"] == "passed"
        assert one.recipe.method in ("auto", one.method)
        assert name not in FAST or one.method == "book-keeping"


@pytest.mark.parametrize("clip_norm", [0.01, 1000.0], ids=["all are clipped", "none is clipped"])
@pytest.mark.parametrize("name", KINDS)
def test_without_a_patient_the_clipped_sum_moves_by_c_at_most(name, clip_norm):
    """The sensitivity itself, of each network that sees patients: what the optimiser adds up, with and without one."""
    study = study_of(name, privacy={"clip_norm": clip_norm})
    full = records_of(study, 5)
    one_less = Records(*(part[1:] for part in full))
    for side in ("d", "g") if study.gan.private == "both" else ("d",):
        one = trainer_of(study)
        whole = sum_of_a_step(trainer_of(study), side, full)
        moved = whole - sum_of_a_step(trainer_of(study), side, one_less)
        assert 0 < moved.norm() <= clip_norm * (1 + 1e-4)
        torch.testing.assert_close(whole, sum_of_a_loop(one, side, full), rtol=1e-3, atol=1e-4 * float(whole.norm()))


class Alike(RandomSource):
    """Every record gets the same draw, so that what is drawn for one does not depend on who else is there."""

    name = "none"

    def uniform(self, n):
        return torch.full((n,), 0.4, dtype=torch.float64)

    def normal(self, shape, std, device="cpu"):
        return torch.full(tuple(shape), 0.3 * std, dtype=torch.float64, device=device)


class Recorder(NoWitness):
    """Keeps the clipped sum that a step adds noise to, and who was drawn for each step."""

    def __init__(self):
        self.drawn = []

    def saw_draw(self, patients_B):
        self.drawn.append(sorted(patients_B.tolist()))

    def saw_step(self, clipped, gradients, divisor):
        self.sum_D = torch.cat([g.detach().flatten() for g in clipped])


def records_of(study: Study, n: int) -> Records:
    random = torch.Generator().manual_seed(5)
    images = torch.rand(n, 1, 28, 28, generator=random) * 2 - 1
    return Records(images, torch.arange(n) % len(study.images.classes), images.flip(3))


def fakes_of(study: Study, n: int = 3) -> Fakes:
    latent = torch.randn(n, study.gan.latent, generator=torch.Generator().manual_seed(6))
    return Fakes(latent, torch.arange(n) % len(study.images.classes))


def asked(one: LocalTrainer, side: str, records: Records, fakes: Fakes) -> tuple:
    """The inputs that a recipe makes of these records, and the losses of their rows."""
    if side == "d":
        return one.recipe.discriminator_inputs(one.generator, records, fakes, Alike()), one.recipe.discriminator_losses
    frozen = one.discriminator.requires_grad_(False)
    return one.recipe.generator_inputs(records, Alike()), lambda g, *rows: one.recipe.generator_losses(g, frozen, *rows)


def sum_of_a_step(one: LocalTrainer, side: str, records: Records) -> torch.Tensor:
    """By the private step, all at once."""
    inputs, row_losses = asked(one, side, records, fakes_of(one.study))
    step = getattr(one, side).step
    step.optimizer.witness = witness = Recorder()
    step.step(row_losses, inputs)
    return witness.sum_D


def sum_of_a_loop(one: LocalTrainer, side: str, records: Records) -> torch.Tensor:
    """By plain autograd, each record by itself, then each fake by itself."""
    network = getattr(one, side).network
    weights, c = list(network.parameters()), one.study.privacy.clip_norm
    total = torch.zeros(sum(p.numel() for p in weights))
    nobody, no_fakes = Records(*(part[:0] for part in records)), fakes_of(one.study, 0)
    alone = [(Records(*(part[i : i + 1] for part in records)), no_fakes) for i in range(len(records.labels_R))]
    if one.recipe.fake_rows and side == "d":
        fakes = fakes_of(one.study)
        alone += [(nobody, Fakes(*(part[i : i + 1] for part in fakes))) for i in range(len(fakes.labels_F))]
    for one_record, one_fake in alone:
        inputs, row_losses = asked(one, side, one_record, one_fake)
        found = torch.autograd.grad(row_losses(network, *inputs).sum(), weights, materialize_grads=True)
        gradient = torch.cat([g.flatten() for g in found])
        total += gradient * min(1.0, c / float(gradient.norm()))
    return total


@pytest.mark.parametrize("name", [name for name in KINDS if "both" in str(KINDS[name])])
def test_each_private_network_draws_patients_of_its_own(name):
    """Independent Poisson batches: one that both networks share would cost more than is booked."""
    one = trainer_of(study_of(name))
    one.d.witness, one.g.witness = Recorder(), Recorder()
    one.train(4)
    of_d, of_g = one.d.witness.drawn, one.g.witness.drawn
    assert len(of_d) == len(of_g) == 4
    assert all(a != b for a, b in zip(of_d, of_g, strict=True))
    assert of_d[0] != of_d[1]


@pytest.mark.parametrize("name", KINDS)
def test_an_empty_batch_is_a_step_of_noise(name):
    study = study_of(name)
    one = trainer_of(study)
    one.sampler.sampling_rate = 1e-12
    one.train(2)
    assert all(p.isfinite().all() for p in weights_of(one))


@pytest.mark.parametrize("task", ["denoise", "super-resolution-2", "super-resolution-4", "k-space"])
def test_what_a_task_makes_of_an_image_depends_on_that_image_alone(task):
    images = records_of(study_of("pix2pix"), 4).images_R1SS
    other = images.clone()
    other[0] = 0.5
    one, two = (degraded(task, x, InsecureRandom(3)) for x in (images, other))
    assert one.shape == images.shape
    assert torch.equal(one[1:], two[1:])
    assert not torch.equal(one[1:], images[1:])
    assert one.abs().max() <= 1


@pytest.mark.parametrize("task", ["denoise", "super-resolution-2", "super-resolution-4", "k-space", "paired"])
def test_pix2pix_learns_each_task_without_privacy(task):
    """A few steps bring the output nearer to the target than the input was, on the images that it trained on."""
    study = study_of(
        "pix2pix",
        images={"paired": task == "paired"},
        gan={"task": task, "generator_width": 8},
        training={"generator_lr": 5e-3},
    )
    found = some_patients(study)
    smooth = torch.nn.functional.avg_pool2d(torch.from_numpy(found.images_N1HW).float() * 2, 5, 1, 2).numpy()
    targets = -smooth.astype(np.float16) if study.images.paired else None
    found = PatientImages(
        smooth.astype(np.float16), found.labels_N, found.patient_N, 24, found.report, (), targets_N1HW=targets
    )
    random = InsecureRandom(1)  # with other draws it may take longer
    one = LocalTrainer(
        study,
        *recipes.load(study).networks(),
        PatientSampler(found, 0.5, random),
        noise_multiplier=None,
        random=random,
        device=torch.device("cpu"),
    )
    every = Records(torch.from_numpy(smooth), torch.from_numpy(found.labels_N), torch.from_numpy(-smooth))
    given, wanted = one.recipe.input_and_output(every, InsecureRandom(4))

    def distance() -> float:
        with torch.no_grad():
            return float((one.generator(given) - wanted).abs().mean())

    before = distance()
    one.train(100)
    assert distance() < 0.9 * before


BAD: dict[str, tuple[dict, str]] = {
    "no such recipe": ({"gan": {"recipe": "nosuch"}}, "CONFIG_RANGE"),
    "a helper is no recipe": ({"gan": {"recipe": "recipe"}}, "CONFIG_RANGE"),
    "generator not declared": ({"gan": {"recipe": "pix2pix", "task": "denoise"}}, "CONFIG_RANGE"),
    "generator declared for nothing": ({"gan": {"recipe": "cdcgan", "private": "both"}}, "CONFIG_RANGE"),
    "no task": ({"gan": {"recipe": "pix2pix", "private": "both"}}, "CONFIG_RANGE"),
    "a task for nothing": ({"gan": {"recipe": "cdcgan", "task": "denoise"}}, "CONFIG_RANGE"),
    "labels that are not used": ({"gan": {"recipe": "dcgan"}}, "CONFIG_RANGE"),
    "three domains": (
        {"gan": {"recipe": "cyclegan", "private": "both"}, "images": {"classes": ("a", "b", "c")}},
        "CONFIG_RANGE",
    ),
    "targets that are not there": ({"gan": {"recipe": "pix2pix", "private": "both", "task": "paired"}}, "CONFIG_RANGE"),
    "BatchNorm on patients": ({"gan": {"norm": "batch"}}, "PRIVACY_MODEL"),
    "BatchNorm in a generator that sees patients": (
        {"gan": {"recipe": "pix2pix", "private": "both", "task": "denoise", "generator_norm": "batch"}},
        "PRIVACY_MODEL",
    ),
    "minibatch statistics": ({"gan": {"minibatch_stddev": True}}, "PRIVACY_MODEL"),
    "a pool of fakes made of patients": (
        {"gan": {"recipe": "cyclegan", "private": "both"}, "training": {"replay": 0.5}},
        "PRIVACY_MODEL",
    ),
    "weights without a word of what they were trained on": ({"gan": {"pretrained": "ab" * 32}}, "CONFIG_RANGE"),
    "a word without weights": ({"gan": {"pretrained_on": "phantoms"}}, "CONFIG_RANGE"),
    "steps of a private generator in no fixed number": (
        {"gan": {"recipe": "cyclegan", "private": "both"}, "training": {"local_steps": 3, "discriminator_steps": 2}},
        "CONFIG_RANGE",
    ),
}


@pytest.mark.parametrize(("sections", "code"), BAD.values(), ids=BAD.keys())
def test_a_study_that_does_not_fit_is_refused_before_any_patient_is_read(sections, code):
    with pytest.raises(FedMedGanError) as caught:
        refuse_mixing(tiny_study(**({"training": {"local_steps": 2, "discriminator_steps": 1}} | sections)))
    assert caught.value.code == code


@pytest.mark.parametrize("gan", [{"norm": "batch"}, {"minibatch_stddev": True}])
def test_what_mixes_patients_is_there_without_privacy(gan):
    study = study_of("cdcgan", gan=gan, privacy="none")
    assert not study.is_private
    one = trainer_of(study, noise_multiplier=None)
    one.train(2)
    assert one.checks == dict.fromkeys(("noise", "clipping", "rows", "sampling"), "not-run")


@pytest.mark.parametrize("name", KINDS)
def test_the_probe_passes_every_recipe(name):
    refuse_mixing(study_of(name))


PAGE = Path(__file__).parents[1] / "docs" / "write-a-recipe.md"
MIXING = {
    "centres the batch": "x = x - x.mean(0, keepdim=True)",
    "passes a row on": "x = x + 0.01 * x.roll(1, 0)",
    "scales by the batch": "x = x / x.std().clamp(min=1e-3)",
}


def recipe_of_the_page() -> str:
    """The whole of a working recipe, as docs/write-a-recipe.md shows it; test_docs.py trains it as it is."""
    _, _, after = PAGE.read_text().partition("The whole of a working recipe, `client/gans/mine.py`:\n\n```python\n")
    return after.partition("```\n")[0]


@pytest.mark.parametrize("extra", MIXING.values(), ids=MIXING.keys())
def test_a_recipe_that_mixes_rows_is_refused(tmp_path, monkeypatch, extra):
    name, line = f"mine{abs(hash(extra)) % 10_000}", "return self.layer(images.flatten(1))"
    mixing = recipe_of_the_page().replace(line, f"x = images.flatten(1); {extra}; return self.layer(x)")
    assert extra in mixing
    (tmp_path / f"{name}.py").write_text(mixing)
    monkeypatch.setattr(gans, "__path__", [*gans.__path__, str(tmp_path)])
    with pytest.raises(PrivacyError) as caught:
        refuse_mixing(study_of(name))
    assert caught.value.code == "PRIVACY_MODEL"


INPUTS_MIX = """
from fedmedgan.client.gans.cdcgan import ConditionalDCGAN

class Mine(ConditionalDCGAN):
    def discriminator_inputs(self, generator, records, fakes, random):
        images = records.images_R1SS - records.images_R1SS.mean(0, keepdim=True)
        return super().discriminator_inputs(generator, records._replace(images_R1SS=images), fakes, random)

RECIPE = Mine
"""


def test_a_recipe_whose_inputs_mix_rows_is_refused(tmp_path, monkeypatch):
    """Every row of the network would pass: what is wrong happens before it."""
    (tmp_path / "inputsmix.py").write_text(INPUTS_MIX)
    monkeypatch.setattr(gans, "__path__", [*gans.__path__, str(tmp_path)])
    with pytest.raises(PrivacyError, match="patients would be mixed"):
        refuse_mixing(study_of("inputsmix"))


def test_volumes_are_refused_clearly():
    with pytest.raises(StudyError, match="3-D"):
        tiny_study(images={"dimensions": 3})


@pytest.mark.parametrize("size", [28, 32, 64, 128, 256])
@pytest.mark.parametrize("name", ["cdcgan", "dcgan", "pix2pix", "cyclegan"])
def test_sizes_from_28_to_256(name, size):
    study = study_of(name, images={"size": size}, gan={"attention": name == "cdcgan"})
    recipe = recipes.load(study)
    generator, _ = recipe.networks()
    made = recipe.samples(generator, 2, 2, seed=1)
    assert made.shape[1:] == (1, size, size)
    assert made.isfinite().all()


def test_initial_weights_are_everywhere_the_same_whatever_was_drawn_before():
    study = study_of("cdcgan")
    torch.manual_seed(1)
    one = recipes.load(study).networks()
    torch.manual_seed(2)
    two = recipes.load(study).networks()
    pairs = zip(one, two, strict=True)
    assert all(torch.equal(a, b) for x, y in pairs for a, b in zip(x.parameters(), y.parameters(), strict=True))


def test_initial_weights_do_not_depend_on_the_processors_vector_instructions():
    """torch's own draws do: two hospitals with different machines would not hold the same model before round 1."""
    code = (
        "from test_recipes import study_of; from fedmedgan.client import checkpoint;"
        "from fedmedgan.client.gans import recipe;"
        "print(checkpoint.content_hash(checkpoint.network_arrays(*recipe.load(study_of('cdcgan')).networks())))"
    )
    hashes = set()
    for capability in ("default", "avx2"):
        env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
        hashes.add(
            subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        )
    assert len(hashes) == 1


def test_initial_weights_have_the_spread_that_torch_gives_them():
    study = study_of("cdcgan", gan={"discriminator_width": 32})
    ours, theirs = recipes.load(study).networks()[1], recipes.load(study).build()[1]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if a.numel() > 1000:
            assert abs(float(a.detach().std() / b.detach().std()) - 1) < 0.1
            assert abs(float(a.detach().abs().max() / b.detach().abs().max()) - 1) < 0.1


def test_acgan_asks_patients_for_their_class_and_fakes_for_nothing_but_whether_they_are_fakes():
    recipe = recipes.load(study_of("acgan"))
    answers = torch.tensor([[0.5, 3.0, -1.0], [0.5, 3.0, -1.0]])
    is_real = torch.tensor([0.9, 0.0])  # smoothed: still a patient
    said, other = (recipe.row_losses(answers, is_real, torch.full((2,), label)) for label in (0, 1))
    real, fake = torch.log1p(torch.exp(torch.tensor([-0.5, 0.5])))
    torch.testing.assert_close(said, torch.stack([0.9 * real + 0.1 * fake + np.log1p(np.exp(-4)), fake]))
    assert other[0] - said[0] == pytest.approx(4.0)
    assert other[1] == said[1]


def test_weight_norm_falls_back_to_hooks_and_is_private():
    one = trainer_of(study_of("cdcgan", gan={"weight_norm": True}))
    one.train(2)
    assert one.method == "hooks"
    assert not failed_checks(one.checks)


def test_views_are_in_one_clip():
    """Three shifted copies of a patient are one record: what is clipped is the gradient of the mean of their losses."""
    study = study_of("cdcgan", training={"views": 3}, privacy={"clip_norm": 0.01})
    one, total = trainer_of(study), 0.0
    assert one.d.divisor == 2 * study.training.patients_per_step, "the noise stays the same"
    inputs, _ = asked(one, "d", records_of(study, 5), fakes_of(study))
    for image, label, is_real in zip(*(part.split(1) for part in inputs), strict=True):
        copies = torch.cat([shifted(image, *by) for by in ((0, 0), (-1, 0), (0, -1))])
        answers = one.discriminator(copies, label.expand(3))
        loss = nn.functional.binary_cross_entropy_with_logits(answers, is_real.expand(3))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(one.discriminator.parameters()))])
        assert gradient.norm() > 0.01, "or the clip has nothing to do"
        total += gradient * 0.01 / gradient.norm()
    whole = sum_of_a_step(trainer_of(study), "d", records_of(study, 5))
    torch.testing.assert_close(whole, total, rtol=1e-3, atol=1e-6)
    one.train(3)
    assert not failed_checks(one.checks)


UNUSED = [
    *(("vanilla", "gan", s, v) for s in ("norm", "generator_norm") for v in ("instance", "batch")),
    *((n, "gan", s, True) for n in ("vanilla", "pix2pix", "cyclegan") for s in ("attention", "weight_norm")),
    *((n, "gan", "minibatch_stddev", True) for n in ("vanilla", "pix2pix", "cyclegan")),
    *((n, "gan", "latent", 16) for n in ("pix2pix", "cyclegan")),
    *((n, "training", s, v) for n in ("wgan", "wgan_gp") for s, v in (("real_label", 0.9), ("adaptive", True))),
]
NETWORK_SETTINGS = {
    "norm": "instance",
    "generator_norm": "instance",
    "attention": True,
    "weight_norm": True,
    "minibatch_stddev": True,
    "latent": 17,
    "generator_width": 8,
    "discriminator_width": 8,
}


@pytest.mark.parametrize(("name", "section", "setting", "value"), UNUSED, ids=lambda part: str(part))
def test_a_setting_that_a_recipe_has_no_use_for_is_refused(name, section, setting, value):
    with pytest.raises(StudyError, match="has no use for it") as caught:
        recipes.load(study_of(name, **{section: {setting: value}}, privacy="none"))
    assert caught.value.code == "CONFIG_RANGE"
    assert f"{section}.{setting}" in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("norm", ["group", "none"])
def test_defaults_may_be_written_out_and_so_may_no_norm(name, norm):
    gan = {"norm": norm, "generator_norm": norm, "attention": False, "weight_norm": False}
    if study_of(name).gan.private == "both":
        gan["latent"] = 64
    recipes.load(study_of(name, gan=gan, training={"adaptive": False}))


@pytest.mark.parametrize("name", PACKAGED)
def test_a_network_setting_that_is_accepted_changes_the_networks(name):
    plain = str(recipes.load(study_of(name, privacy="none")).networks())
    for setting, value in NETWORK_SETTINGS.items():
        study = study_of(name, gan={setting: value}, privacy="none")
        try:
            changed = str(recipes.load(study).networks())
        except StudyError as refused:
            assert f"gan.{setting}" in str(refused)
        else:
            assert changed != plain, setting


def test_a_module_that_is_given_is_trained_in_place():
    study = study_of("cdcgan")
    generator, discriminator = recipes.load(study).networks()
    assert isinstance(generator, nn.Module)
    one = LocalTrainer(
        study,
        generator,
        discriminator,
        PatientSampler(some_patients(study), 0.25, SystemRandom()),
        noise_multiplier=1.0,
        random=SystemRandom(),
        device=torch.device("cpu"),
    )
    one.train(1)
    one.close()
    assert next(generator.parameters()).requires_grad
    assert one.generator is generator
