"""The private step against what it promises: one patient moves the clipped sum by at most C, and noise is there."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedmedgan.client.gans import cdcgan
from fedmedgan.client.training.private_step import PrivateStep, refuse_unsafe
from fedmedgan.client.training.randomness import SystemRandom
from fedmedgan.shared.errors import ModelError, PrivacyError
from fedmedgan.shared.study import Gan, Images

C = 0.7


class NoNoise:
    """A random source that adds nothing, to see the clipped sum itself."""

    name = "none"

    def normal(self, shape, std):
        return torch.zeros(shape, dtype=torch.float64)


def losses(network: nn.Module, images, labels, is_real) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(network(images, labels), is_real, reduction="none")


def clipped_sum(network: nn.Module, images, labels, is_real, *, clip_norm: float = C, random=None) -> torch.Tensor:
    """What one step on a copy of `network` adds up, times the divisor: one flat vector."""
    network = copy.deepcopy(network)
    before = nn.utils.parameters_to_vector(network.parameters()).detach().double()
    step = PrivateStep(
        network,
        torch.optim.SGD(network.parameters(), lr=1.0),
        noise_multiplier=1.0,
        clip_norm=clip_norm,
        divisor=1,
        random=random or NoNoise(),
    )
    step.step(losses, [images, labels, is_real])
    step.close()
    return before - nn.utils.parameters_to_vector(network.parameters()).detach().double()


def one_by_one(network: nn.Module, images, labels, is_real, clip_norm: float = C) -> torch.Tensor:
    """The same sum, slowly and obviously."""
    total = torch.zeros(sum(p.numel() for p in network.parameters()), dtype=torch.float64)
    for i in range(len(images)):
        network.zero_grad()
        logit = network(images[i : i + 1], labels[i : i + 1])
        functional.binary_cross_entropy_with_logits(logit, is_real[i : i + 1]).backward()
        row = torch.cat([p.grad.flatten() for p in network.parameters()]).double()
        total += row * min(1.0, clip_norm / (float(row.norm()) + 1e-12))
    return total


def batch(n: int, size: int = 28, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, size, size, generator=g) * 2 - 1
    return images, torch.randint(2, (n,), generator=g), (torch.arange(n) < n // 2).float()


def discriminator(size: int = 28, norm: str = "group", scale: float = 4.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = cdcgan.Discriminator(Images(size=size), Gan(discriminator_width=4, norm=norm))
    with torch.no_grad():  # larger weights, larger gradients: some rows are clipped, some are not
        for p in network.parameters():
            p.mul_(scale)
    return network


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(0, 5),
    size=st.sampled_from([28, 32]),
    norm=st.sampled_from(["group", "none"]),
    seed=st.integers(0, 99),
)
def test_the_sum_equals_a_loop_over_single_rows(n, size, norm, seed):
    network, rows = discriminator(size, norm), batch(n, size, seed)
    torch.testing.assert_close(clipped_sum(network, *rows), one_by_one(network, *rows), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("norm", ["group", "none"])
def test_one_patient_moves_the_clipped_sum_by_at_most_c(size, norm):
    network = discriminator(size, norm)
    images, labels, is_real = batch(8, size)
    all_in = clipped_sum(network, images, labels, is_real)
    moved = []
    for i in range(8):
        keep = torch.arange(8) != i
        without = clipped_sum(network, images[keep], labels[keep], is_real[keep])
        moved.append(float((all_in - without).norm()))
        assert moved[-1] <= C * (1 + 1e-5)
    assert max(moved) > 0.5 * C, "no row was near the bound: the test would not see a missing clip"


@pytest.mark.parametrize("pixel", [1e6, 1e30, float("inf"), float("nan")])
def test_a_hostile_image_moves_the_sum_by_at_most_c_and_leaves_it_finite(pixel):
    network, (images, labels, is_real) = discriminator(), batch(6)
    calm = clipped_sum(network, images[1:], labels[1:], is_real[1:])
    images[0] = pixel
    with_it = clipped_sum(network, images, labels, is_real)
    assert with_it.isfinite().all()
    assert float((with_it - calm).norm()) <= C * (1 + 1e-5)


def coupled(kind: str) -> nn.Module:
    """Networks that mix rows or that Opacus differentiates wrongly without a word (measured with 1.6.0)."""
    middle = {
        "batchnorm": nn.BatchNorm2d(4),
        "batchnorm without weights": nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        "reflect padding": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        "circular padding": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        "instance norm with running statistics": nn.InstanceNorm2d(4, track_running_stats=True),
    }[kind]
    return nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), middle, nn.Flatten(), nn.Linear(4 * 14 * 14, 1))


@pytest.mark.parametrize(
    "kind",
    [
        "batchnorm",
        "batchnorm without weights",
        "reflect padding",
        "circular padding",
        "instance norm with running statistics",
    ],
)
def test_networks_that_break_the_promise_are_refused(kind):
    with pytest.raises(PrivacyError) as caught:
        refuse_unsafe(coupled(kind))
    assert caught.value.code == "PRIVACY_MODEL"


def test_a_network_without_weights_is_refused():
    with pytest.raises(ModelError):
        refuse_unsafe(nn.Flatten())


def test_the_sensitivity_test_would_catch_a_batchnorm_that_slipped_through(monkeypatch):
    """Without the refusal, Opacus accepts BatchNorm(affine=False) and one patient moves the sum by more than C."""
    monkeypatch.setattr("fedmedgan.client.training.private_step.refuse_unsafe", lambda network: None)

    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 8, 4, 2, 1)
            self.norm = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
            self.head = nn.Linear(8 * 14 * 14, 1)

        def forward(self, images, labels):
            return self.head(functional.leaky_relu(self.norm(self.conv(images)), 0.2).flatten(1)).squeeze(1)

    network, (images, labels, is_real) = Coupled(), batch(8)
    images[0] *= 50
    all_in = clipped_sum(network, images, labels, is_real)
    without = clipped_sum(network, images[1:], labels[1:], is_real[1:])
    assert float((all_in - without).norm()) > 1.2 * C


def test_noise_has_the_promised_standard_deviation_also_for_an_empty_batch():
    network, sigma = discriminator(64), 3.0
    images, labels, is_real = batch(0, 64)
    network_size = sum(p.numel() for p in network.parameters())
    before = nn.utils.parameters_to_vector(network.parameters()).detach().double()
    step = PrivateStep(
        network,
        torch.optim.SGD(network.parameters(), lr=1.0),
        noise_multiplier=sigma,
        clip_norm=C,
        divisor=10,
        random=SystemRandom(),
    )
    step.step(losses, [images, labels, is_real])
    noise = before - nn.utils.parameters_to_vector(network.parameters()).detach().double()
    expected = sigma * C / 10
    # the standard error of a standard deviation is std / sqrt(2 n); five of them are allowed
    assert abs(float(noise.std()) - expected) < 5 * expected / (2 * network_size) ** 0.5 + 1e-6
    assert abs(float(noise.mean())) < 5 * expected / network_size**0.5


def test_two_steps_never_share_noise():
    network, rows = discriminator(), batch(4)
    first = clipped_sum(network, *rows, random=SystemRandom())
    second = clipped_sum(network, *rows, random=SystemRandom())
    assert float((first - second).abs().max()) > 0.1


def test_a_frozen_network_gets_no_gradients_and_learns_again_afterwards():
    network, rows = discriminator(), batch(4)
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    step = PrivateStep(network, sgd, noise_multiplier=1.0, clip_norm=C, divisor=4, random=NoNoise())
    leaf = rows[0].clone().requires_grad_(True)
    with step.frozen() as frozen:
        frozen(leaf, rows[1]).sum().backward()
    assert leaf.grad is not None
    assert all(p.grad is None and getattr(p, "grad_sample", None) is None for p in network.parameters())
    before = nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    step.step(losses, rows)
    assert not torch.equal(before, nn.utils.parameters_to_vector(network.parameters()))
