"""Stabilisers: each does what its paper says, reads no patient, and changes nothing where it is off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_recipes import fakes_of, records_of, some_patients, study_of, trainer_of, weights_of
from torch import nn
from torch.nn import functional

from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.gans.recipe import shifted
from fedmedgan.client.gans.wgan import CLIP
from fedmedgan.client.training import stabilisers
from fedmedgan.client.training.local_round import LocalTrainer, PatientSampler
from fedmedgan.client.training.randomness import InsecureRandom
from fedmedgan.client.training.stabilisers import RATES, SETTLED, Replay, Turns
from fedmedgan.shared.privacy.records import failed_checks
from fedmedgan.shared.study import Study


def test_turns_come_at_the_rate():
    turns = Turns(3, adaptive=False)
    assert [n for n in range(1, 10) if turns.due(n)] == [3, 6, 9]


def test_the_rate_rises_once_fakes_are_no_longer_told_and_never_falls():
    turns = Turns(1, adaptive=True)
    seen = [turns.rate]
    for _ in range(3 * SETTLED):
        turns.saw(torch.full((8,), 1.0))  # taken for real
        seen.append(turns.rate)
    assert seen == sorted(seen)
    assert seen[SETTLED - 1] == 1, "not before the rate was given time"
    assert turns.rate == RATES[3]
    for _ in range(2 * SETTLED):
        turns.saw(torch.full((8,), -1.0))  # told
    assert turns.rate == RATES[3]


def test_turns_go_on_from_round_to_round():
    turns, again = Turns(1, adaptive=True), Turns(1, adaptive=True)
    for _ in range(SETTLED + 5):
        turns.saw(torch.ones(4))
    again.load(turns.state())
    assert again.state() == turns.state()
    assert again.rate > 1


@pytest.mark.parametrize(("answer", "turns"), [(100.0, 7), (-100.0, 12)], ids=["taken for real", "told"])
def test_the_generators_turns_become_rarer_where_its_fakes_are_not_told(monkeypatch, answer, turns):
    """In 12 steps, at 1, 2, 3, then every 2nd, at 4, 6, 8, then every 5th, at 10."""
    monkeypatch.setattr(stabilisers, "SETTLED", 3)
    monkeypatch.setattr(stabilisers, "DECAY", 0.5)
    one = trainer_of(study_of("cdcgan", training={"adaptive": True}))
    with torch.no_grad():
        one.discriminator.heads.bias.fill_(answer)
    one.train(12)
    assert steps_of(one.g.adam) == turns


def steps_of(adam: torch.optim.Adam) -> int:
    return int(next(iter(adam.state.values()))["step"])


def test_replay_mixes_in_earlier_fakes_and_leaves_patients_alone():
    replay = Replay(0.5, torch.Generator().manual_seed(1))
    for step in range(3):
        images, labels = torch.full((10, 1), float(step)), torch.arange(10)
        images[:4] = 100 + step  # of patients
        mixed = replay.mixed((images, labels), n_real=4)
        assert torch.equal(mixed[0][:4], images[:4])
        assert [len(x) for x in mixed] == [10, 10]
        old = int((mixed[0][4:] < step).sum())
        assert old == (0 if step == 0 else 3)
    assert all(float(kept[0].max()) < 100 for kept in replay.kept), "nobody's image is kept"
    off = Replay(0.0, torch.Generator())
    assert off.mixed((images, labels), 4)[0] is images


def test_replayed_fakes_reach_the_private_step(monkeypatch):
    """Each fake shows the number of the step that it was made in; half of the six come back from earlier steps."""
    one = trainer_of(study_of("cdcgan", training={"replay": 0.5, "discriminator_steps": 10}))
    drawn, given = [], []
    draw, step = one.sampler.draw, one.d.step.step
    monkeypatch.setattr(one.sampler, "draw", lambda: drawn.append(draw()) or drawn[-1])
    monkeypatch.setattr(one.d.step, "step", lambda losses, inputs: given.append(inputs) or step(losses, inputs))
    monkeypatch.setattr(one.generator, "forward", lambda z, y: torch.full((len(z), 1, 28, 28), float(len(drawn))))
    one.train(4)
    for now, (batch, (images, labels, is_real)) in enumerate(zip(drawn, given, strict=True), 1):
        n = len(batch.patients_B)
        assert torch.equal(images[:n], batch.records.images_R1SS)
        assert torch.equal(labels[:n], batch.records.labels_R)
        assert torch.equal(is_real, torch.tensor([1.0] * n + [0.0] * 6))
        made_in = images[n:, 0, 0, 0].tolist()
        assert made_in.count(now) == (6 if now == 1 else 3)
        assert set(made_in) <= set(range(1, now + 1))
    assert not failed_checks(one.checks)


def test_the_penalty_is_the_slope_at_fakes_by_finite_differences():
    torch.manual_seed(1)
    network = Answers()
    images, labels = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    found = stabilisers.penalty_gradient(network, images, labels)

    def penalty() -> float:
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(network(x, labels).sum(), x)
        return float(slope.flatten(1).square().sum(1).mean() / 2)

    with torch.no_grad():
        weight = network.first.weight
        for at in ((0, 0), (2, 5)):
            weight[at] += 1e-5
            high = penalty_of(penalty)
            weight[at] -= 2e-5
            low = penalty_of(penalty)
            weight[at] += 1e-5
            assert (high - low) / 2e-5 == pytest.approx(float(found["first.weight"][at]), rel=1e-4, abs=1e-8)


def test_the_penalty_is_on_the_answer_whether_it_is_real_not_on_classes():
    """acgan: with the heads of the classes changed, the gradient is the same, and none of it is at those heads."""
    network = recipes.load(study_of("acgan")).networks()[1]
    images, labels = torch.rand(3, 1, 28, 28), torch.zeros(3, dtype=torch.long)
    before = stabilisers.penalty_gradient(network, images, labels)
    with torch.no_grad():
        network.heads.weight[1:] += 1.0
    after = stabilisers.penalty_gradient(network, images, labels)
    assert before["heads.weight"][0].any()
    assert not before["heads.weight"][1:].any()
    assert all(torch.equal(before[name], after[name]) for name in before)


def penalty_of(penalty) -> float:
    with torch.enable_grad():
        return penalty()


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 5).double(), nn.Linear(5, 1).double()

    def forward(self, images, labels):
        return self.last(torch.tanh(self.first(images.flatten(1)))).squeeze(1)


def test_the_projection_brings_singular_values_to_one_at_most():
    layer = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        layer.weight.mul_(10)
    small = nn.Linear(4, 4)
    with torch.no_grad():
        small.weight.copy_(torch.eye(4) * 0.5)
    before = layer.weight.detach().clone()
    stabilisers.project_spectral(nn.Sequential(layer, small))
    values = np.linalg.svd(layer.weight.detach().flatten(1).numpy(), compute_uv=False)
    assert values.max() == pytest.approx(1, abs=1e-5)
    ratio = layer.weight.detach() / before
    assert float(ratio.max() - ratio.min()) < 1e-5, "all of a matrix by the same factor"
    assert torch.equal(small.weight, torch.eye(4) * 0.5)


@pytest.mark.parametrize("spectral", [False, True])
def test_the_critic_of_wgan_is_limited_after_each_step(spectral):
    """From weights far above either limit, so that there is something to do."""
    one = trainer_of(study_of("wgan", training={"spectral_projection": spectral}))
    with torch.no_grad():
        for weight in one.discriminator.parameters():
            weight.mul_(100)
    one.train(3)
    for weight in one.discriminator.parameters():
        if not spectral:
            assert weight.abs().max() <= CLIP
        elif weight.ndim > 1:
            assert torch.linalg.matrix_norm(weight.flatten(1), ord=2) <= 1 + 1e-5


def test_a_projected_convolution_lengthens_images_by_two_at_most_not_by_one():
    """What wgan's text says: the flattened kernel's singular value is no limit of the whole convolution."""
    layer = nn.Conv2d(1, 4, 4, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(10.0)
    stabilisers.project_spectral(layer)
    images = torch.ones(1, 1, 28, 28)
    factor = float((layer(images).norm() / images.norm()).detach())
    assert 1.5 < factor <= 2


def test_a_shift_moves_images_by_whole_pixels():
    images = torch.arange(36.0).view(1, 1, 6, 6)
    moved = shifted(images, 1, -2)
    assert torch.equal(moved[0, 0, 1:, :4], images[0, 0, :5, 2:])
    assert (moved[0, 0, 0] == -1).all()
    assert torch.equal(shifted(images, 0, 0), images)


def test_the_losses_of_views_are_those_of_shifted_copies():
    """By a loop: each row's loss is shared by the image as it is and those moved up and left by a pixel."""
    one = trainer_of(study_of("cdcgan", training={"views": 3}))
    inputs = one.recipe.discriminator_inputs(one.generator, records_of(one.study, 4), fakes_of(one.study), one.random)
    found = one.recipe.discriminator_losses(one.discriminator, *inputs)
    wanted = []
    for down, right in ((0, 0), (-1, 0), (0, -1)):
        for image, label, is_real in zip(*inputs, strict=True):
            answer = one.discriminator(shifted(image[None], down, right), label[None])
            wanted.append(functional.binary_cross_entropy_with_logits(answer, is_real[None]) / 3)
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("name", ["cdcgan", "pix2pix"])
def test_each_network_has_its_own_learning_rate(name):
    """Two time scales (Heusel et al. 2017). Adam's first step is as long as the rate, whatever the gradient."""
    one = trainer_of(study_of(name, training={"discriminator_lr": 3e-3, "generator_lr": 7e-4}))
    of_generator, before = len(list(one.generator.parameters())), weights_of(one)
    one.train(1)
    moved = [float((a - b).abs().max()) for a, b in zip(before, weights_of(one), strict=True)]
    assert max(moved[:of_generator]) == pytest.approx(7e-4, rel=1e-2)
    assert max(moved[of_generator:]) == pytest.approx(3e-3, rel=1e-2)


CURES = {
    "adaptive": {"training": {"adaptive": True}},
    "real_label": {"training": {"real_label": 0.9}},
    "views": {"training": {"views": 3}},
    "replay": {"training": {"replay": 0.5}},
    "fake_penalty": {"training": {"fake_penalty": 10.0}},
    "spectral_projection": {"training": {"spectral_projection": True}},
    "attention": {"gan": {"attention": True}},
    "weight_norm": {"gan": {"weight_norm": True}},
    "batch norm of fakes": {"gan": {"generator_norm": "batch"}},
    "instance norm": {"gan": {"norm": "instance", "generator_norm": "instance"}},
}


def test_the_same_draws_train_the_same_weights():
    """Or the next test would find a difference in everything."""
    assert same(trained(study_of("cdcgan")), trained(study_of("cdcgan")))


@pytest.mark.parametrize("sections", CURES.values(), ids=CURES.keys())
def test_every_cure_trains_privately_and_not_what_is_trained_without_it(sections, monkeypatch):
    """The same draws, so what differs is the cure. Weights start large, and the rate rises at once."""
    monkeypatch.setattr(stabilisers, "SETTLED", 1)
    monkeypatch.setattr(stabilisers, "TOLD", 1.0)
    one = trained(study_of("cdcgan", **sections))
    assert not same(one, trained(study_of("cdcgan")))
    assert all(weight.isfinite().all() for weight in weights_of(one))
    assert not failed_checks(one.checks)
    assert one.checks["rows"] == "passed"


def trained(study: Study) -> LocalTrainer:
    random = InsecureRandom(1)
    sampler = PatientSampler(some_patients(study), 0.25, random)
    one = LocalTrainer(
        study,
        *recipes.load(study).networks(),
        sampler,
        noise_multiplier=1.0,
        random=random,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        for weight in one.discriminator.parameters():
            weight.mul_(10)
    one.train(4)
    return one


def same(one: LocalTrainer, two: LocalTrainer) -> bool:
    first, second = weights_of(one), weights_of(two)
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_penalty_on_fakes_flattens_the_discriminator():
    """Its slope at fakes falls, with the same patients and the same steps."""
    slopes = []
    for weight in (0.0, 20.0):
        one = trainer_of(
            study_of("cdcgan", training={"fake_penalty": weight, "discriminator_lr": 5e-3}), noise_multiplier=None
        )
        one.train(25)
        images = one.generator(torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 2)
        x = images.detach().requires_grad_()
        (slope,) = torch.autograd.grad(one.discriminator(x, torch.arange(32) % 2).sum(), x)
        slopes.append(float(slope.flatten(1).norm(dim=1).mean()))
    assert slopes[1] < 0.5 * slopes[0]


def test_label_smoothing_reaches_rows_of_patients_alone():
    study = study_of("cdcgan", training={"real_label": 0.8})
    one = trainer_of(study, noise_multiplier=None)
    batch = one.sampler.draw()
    inputs = one.recipe.discriminator_inputs(one.generator, batch.records, one._new_fakes(), one.random)
    n = len(batch.records.labels_R)
    assert torch.equal(inputs[2][:n], torch.full((n,), 0.8))
    assert not inputs[2][n:].any()
    assert weights_of(one)
