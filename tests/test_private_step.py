"""The private step against what it promises: one patient moves the clipped sum by at most C, and noise is there.

Each promise is kept by each of the three ways to the gradients of single records.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from fedmedgan.client.gans import cdcgan
from fedmedgan.client.training import row_gradients
from fedmedgan.client.training.private_step import PrivateStep, refuse_unsafe
from fedmedgan.client.training.randomness import SystemRandom
from fedmedgan.shared.errors import ModelError, PrivacyError
from fedmedgan.shared.study import Gan, Images

C = 0.7
METHODS = ["hooks", "book-keeping", "functional"]


class NoNoise:
    """A random source that adds nothing, to see the clipped sum itself."""

    name = "none"

    def normal(self, shape, std, device):
        return torch.zeros(shape, dtype=torch.float64)


def losses(network: nn.Module, images, labels, is_real) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(network(images, labels), is_real, reduction="none")


def clipped_sum(network: nn.Module, *inputs, row_losses=losses, clip_norm=C, random=None, method="auto"):
    """What one step on a copy of `network` adds up, times the divisor: one flat vector."""
    network = copy.deepcopy(network)
    before = nn.utils.parameters_to_vector(network.parameters()).detach().double()
    step = private_step(network, clip_norm=clip_norm, random=random or NoNoise(), method=method)
    step.step(row_losses, inputs)
    step.close()
    return before - nn.utils.parameters_to_vector(network.parameters()).detach().double()


def private_step(network: nn.Module, *, noise=1.0, clip_norm=C, divisor=1, random=None, **options) -> PrivateStep:
    sgd = torch.optim.SGD(network.parameters(), lr=1.0)
    options |= {"noise_multiplier": noise, "clip_norm": clip_norm, "divisor": divisor, "random": random or NoNoise()}
    return PrivateStep(network, sgd, **options)


def one_by_one(network: nn.Module, *inputs, row_losses=losses, clip_norm=C) -> torch.Tensor:
    """The same sum, slowly and obviously."""
    params = list(network.parameters())
    total = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    for i in range(len(inputs[0])):
        loss = row_losses(network, *(x[i : i + 1] for x in inputs)).sum()
        gradients = torch.autograd.grad(loss, params, materialize_grads=True)
        row = torch.cat([g.flatten() for g in gradients]).double()
        total += row * min(1.0, clip_norm / (float(row.norm()) + 1e-12))
    return total


def two_views(network: nn.Module, images, labels, is_real) -> torch.Tensor:
    """A shifted copy of each image, and the network once more on both darkened."""
    both, labels, is_real = torch.cat([images, images.roll(2, -1)]), labels.repeat(2), is_real.repeat(2)
    return losses(network, both, labels, is_real) + 0.5 * losses(network, both * 0.5, labels, is_real)


def gradient_penalty(network: nn.Module, real, fake, mix) -> torch.Tensor:
    """WGAN-GP (Gulrajani et al. 2017) of one record: its image, a fake, and a place between them."""
    labels = torch.zeros(len(real), dtype=torch.int64)
    between = real + mix[:, None, None, None] * (fake - real)
    slope = torch.func.grad(lambda x: network(x, labels).sum())(between).flatten(1).norm(dim=1)
    return network(fake, labels) - network(real, labels) + 10 * (slope - 1) ** 2


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


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(0, 5),
    size=st.sampled_from([28, 32]),
    norm=st.sampled_from(["group", "instance", "none"]),
    row_losses=st.sampled_from([losses, two_views]),
    seed=st.integers(0, 99),
)
def test_the_sum_equals_a_loop_over_single_records(method, n, size, norm, row_losses, seed):
    network, records = discriminator(size, norm), batch(n, size, seed)
    found = clipped_sum(network, *records, row_losses=row_losses, method=method)
    expected = one_by_one(network, *records, row_losses=row_losses)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_functional_sees_a_gradient_inside_the_loss():
    """An oracle with autograd's double backward instead of torch.func."""

    def by_autograd(network, real, fake, mix):
        labels = torch.zeros(len(real), dtype=torch.int64)
        between = (real + mix[:, None, None, None] * (fake - real)).requires_grad_(True)
        (slope,) = torch.autograd.grad(network(between, labels).sum(), between, create_graph=True)
        return network(fake, labels) - network(real, labels) + 10 * (slope.flatten(1).norm(dim=1) - 1) ** 2

    network, (real, fake) = discriminator(), (batch(4)[0], batch(4, seed=1)[0])
    records = [real, fake, torch.linspace(0.1, 0.9, 4)]
    found = clipped_sum(network, *records, row_losses=gradient_penalty, method="functional")
    expected = one_by_one(network, *records, row_losses=by_autograd)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_of_records_change_nothing_but_rounding(method, monkeypatch):
    network, records = discriminator(), batch(7)
    step = private_step(copy.deepcopy(network), method=method)
    whole = clipped_sum(network, *records, row_losses=two_views, method=method)
    losses_whole = step.step(two_views, records)
    monkeypatch.setattr(row_gradients, "CACHE_BYTES", 4 * 100_000)
    chunks = list(step._chunks(records))
    assert [len(images) for images, _, _ in chunks] == [3, 2, 2]
    step = private_step(copy.deepcopy(network), method=method)
    torch.testing.assert_close(step.step(two_views, records), losses_whole)
    chunked = clipped_sum(network, *records, row_losses=two_views, method=method)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row_losses", [losses, two_views])
@pytest.mark.parametrize("norm", ["group", "none"])
def test_one_patient_moves_the_clipped_sum_by_at_most_c(method, row_losses, norm):
    network, records = discriminator(28, norm), batch(8)
    all_in = clipped_sum(network, *records, row_losses=row_losses, method=method)
    moved = []
    for i in range(8):
        others = [x[torch.arange(8) != i] for x in records]
        moved.append(float((all_in - clipped_sum(network, *others, row_losses=row_losses, method=method)).norm()))
        assert moved[-1] <= C * (1 + 1e-5)
    assert max(moved) > 0.5 * C, "no record was near the bound: the test would not see a missing clip"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pixel", [1e6, 1e30, float("inf"), float("nan")])
def test_a_hostile_image_moves_the_sum_by_at_most_c_and_leaves_it_finite(method, pixel):
    network, (images, labels, is_real) = discriminator(), batch(6)
    calm = clipped_sum(network, images[1:], labels[1:], is_real[1:], method=method)
    images[0] = pixel
    with_it = clipped_sum(network, images, labels, is_real, method=method)
    assert with_it.isfinite().all()
    assert float((with_it - calm).norm()) <= C * (1 + 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_record_that_is_not_a_number_counts_as_zero_where_gradients_share_memory(method):
    """The losses' gradient is a single one, seen from all rows."""
    network, (images, _, _) = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 1)), batch(4)
    expected = one_by_one(network, images[1:], row_losses=lambda net, x: net(x).squeeze(1))
    images[0] = float("nan")
    found = clipped_sum(network, images, row_losses=lambda net, x: net(x).squeeze(1), method=method)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_record_whose_gradient_is_zero_stays_zero(method):
    network, (images, labels, is_real) = discriminator(), batch(4)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])

    def some_count(net, images, labels, is_real, weights):
        return losses(net, images, labels, is_real) * weights

    found = clipped_sum(network, images, labels, is_real, weights, row_losses=some_count, method=method)
    expected = one_by_one(network, images[::2], labels[::2], is_real[::2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_losses_come_back_row_by_row(method):
    network, records = discriminator(), batch(3)
    expected = two_views(network, *records).detach()
    torch.testing.assert_close(private_step(network, method=method).step(two_views, records), expected)
    assert private_step(network, method=method).step(two_views, batch(0)).shape == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_added_up_over_two_steps(method):
    """Not of a step that ended in an error, and not what somebody's own backward left at the weights."""
    network, records = discriminator(), batch(5)
    expected = one_by_one(network, *records)
    step = private_step(network, method=method)
    calls = []

    def fails_at_the_second_chunk(net, *inputs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return losses(net, *inputs)

    step._chunks = lambda inputs: [[x[:2] for x in inputs], [x[2:] for x in inputs]]
    with pytest.raises(KeyboardInterrupt):
        step.step(fails_at_the_second_chunk, records)
    losses(network, *[x[:0] for x in records]).sum().backward()
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    before = nn.utils.parameters_to_vector(network.parameters()).detach().double()
    step.step(losses, records)
    found = before - nn.utils.parameters_to_vector(network.parameters()).detach().double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_losses_that_are_not_one_for_each_row_are_refused(method):
    network, records = discriminator(), batch(4)
    for wrong in (lambda *a: losses(*a).mean(), lambda *a: losses(*a)[:, None], lambda *a: losses(*a)[:0]):
        with pytest.raises(ModelError) as caught:
            private_step(copy.deepcopy(network), method=method).step(wrong, records)
        assert caught.value.code == "MODEL_MISMATCH"
    if method != "functional":  # which sees one record at a time
        with pytest.raises(ModelError):
            private_step(network, method=method).step(lambda *a: losses(*a)[:3], records)


def test_book_keeping_is_chosen_where_every_layer_allows_it():
    plain, parametrized = discriminator(), discriminator()
    parametrizations.weight_norm(parametrized.heads)
    assert private_step(plain).method == "book-keeping"
    assert private_step(parametrized).method == "hooks"
    assert private_step(discriminator(), method="functional").method == "functional"
    with pytest.raises(PrivacyError) as caught:
        private_step(parametrized, method="book-keeping")
    assert caught.value.code == "PRIVACY_MODEL"


def test_hooks_refuse_a_weight_that_is_used_outside_its_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.head(functional.linear(x, self.layer.weight, self.layer.bias)).squeeze(1)

    with pytest.raises(PrivacyError) as caught:
        private_step(Tied(), method="hooks").step(lambda network, x: network(x), [torch.ones(2, 3)])
    assert caught.value.code == "PRIVACY_MODEL"


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
    network_size = sum(p.numel() for p in network.parameters())
    before = nn.utils.parameters_to_vector(network.parameters()).detach().double()
    private_step(network, noise=sigma, divisor=10, random=SystemRandom()).step(losses, batch(0, 64))
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


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_network_gets_no_gradients_and_learns_again_afterwards(method):
    network, rows = discriminator(), batch(4)
    step = private_step(network, divisor=4, method=method)
    leaf = rows[0].clone().requires_grad_(True)
    with step.frozen() as frozen:
        frozen(leaf, rows[1]).sum().backward()
    assert leaf.grad is not None
    assert all(p.grad is None and getattr(p, "grad_sample", None) is None for p in network.parameters())
    before = nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    step.step(losses, rows)
    assert not torch.equal(before, nn.utils.parameters_to_vector(network.parameters()))
