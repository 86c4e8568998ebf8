"""Book-keeping against Opacus' hooks and a loop over single records, layer by layer, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from fedmedgan.client.training import row_gradients
from fedmedgan.client.training.book_keeping import BookKeeping, Outer, supports
from fedmedgan.client.training.row_gradients import Functional, Hooks
from fedmedgan.shared.errors import PrivacyError

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def squares(network: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient differs at each output and for each row."""
    out = network(*inputs).flatten(1)
    return (out**2 * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sum(1)


def twice(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Four rows of each record, in two calls of two views."""
    return squares(network, torch.cat([x, 0.5 * x.flip(-1)])) + 0.3 * squares(network, torch.cat([x * x, x]))


def one_by_one(network: nn.Module, row_losses, inputs) -> list[torch.Tensor]:
    """Each weight's gradient, one record after the other: (N, D)."""
    params, rows = list(network.parameters()), []
    for i in range(len(inputs[0])):
        losses = row_losses(network, *(x[i : i + 1] for x in inputs))
        rows.append(torch.autograd.grad(losses.sum(), params, materialize_grads=True))
    return [torch.stack([row[k] for row in rows]).flatten(1) for k in range(len(params))]


def check(network: nn.Module, row_losses, inputs, others=(Hooks,)) -> None:
    """Everything that book-keeping answers, against a loop and other methods."""
    network = network.double()
    params = list(network.parameters())
    true = one_by_one(network, row_losses, inputs)
    assert supports(network, params)
    rows = BookKeeping(network, params).backward(row_losses, inputs)
    weights_N = torch.linspace(0.1, 1.0, len(inputs[0]), dtype=torch.float64)
    for k, p in enumerate(params):
        torch.testing.assert_close(rows.values(k), true[k], **EXACT)
        some = slice(p.numel() // 3, p.numel() // 3 + 5)
        torch.testing.assert_close(rows.values(k, some), true[k][:, some], **EXACT)
        torch.testing.assert_close(rows.values(k, some, slice(1, 2)), true[k][1:2, some], **EXACT)
        torch.testing.assert_close(rows.norms_PN()[k], true[k].norm(dim=1), **EXACT)
        torch.testing.assert_close(rows.clipped(weights_N)[k].flatten(), weights_N @ true[k], **EXACT)
        assert rows.clipped(weights_N)[k].shape == p.shape
    for method in others:
        other = method(copied := copy.deepcopy(network), list(copied.parameters())).backward(row_losses, inputs)
        for k in range(len(params)):
            torch.testing.assert_close(other.values(k), true[k], **EXACT)
        torch.testing.assert_close(other.losses, rows.losses, **EXACT)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
from_zero = st.tuples(st.integers(0, 2), st.integers(0, 2))
losses_of = st.sampled_from([squares, twice])


@settings(max_examples=25, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=from_zero,
    bias=st.booleans(),
    n=st.integers(1, 3),
    row_losses=losses_of,
)
def test_convolutions(channels, kernel, stride, dilation, padding, bias, n, row_losses):
    layer = nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=bias)
    check(layer, row_losses, [numbers(n, channels[0], 7, 8)])


@settings(max_examples=25, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    more=from_zero,
    padding=from_zero,
    n=st.integers(1, 3),
    row_losses=losses_of,
)
def test_transposed_convolutions(channels, kernel, stride, dilation, more, padding, n, row_losses):
    assume(all(m < max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)))
    layer = nn.ConvTranspose2d(*channels, kernel, stride, padding, more, dilation=dilation)
    check(layer, row_losses, [numbers(n, channels[0], 5, 6)])


@settings(max_examples=15, deadline=None)
@given(
    between=st.lists(st.integers(1, 3), max_size=2),
    bias=st.booleans(),
    n=st.integers(1, 4),
    row_losses=losses_of,
)
def test_linear_layers(between, bias, n, row_losses):
    check(nn.Linear(4, 3, bias=bias), row_losses, [numbers(n, *between, 4)])


@settings(max_examples=15, deadline=None)
@given(between=st.lists(st.integers(1, 3), max_size=2), n=st.integers(1, 4), views=st.integers(1, 2))
def test_embeddings(between, n, views):
    labels = torch.arange(n * int(torch.tensor([1, *between]).prod())).view(n, *between) % 3
    check(nn.Embedding(4, 5), lambda network, y: squares(network, y.repeat(views, *(1 for _ in between))), [labels])


@settings(max_examples=15, deadline=None)
@given(
    layer=st.sampled_from([nn.GroupNorm(2, 4), nn.GroupNorm(4, 4), nn.InstanceNorm2d(4, affine=True)]),
    n=st.integers(1, 3),
    row_losses=losses_of,
)
def test_norm_layers(layer, n, row_losses):
    layer = copy.deepcopy(layer)
    nn.init.normal_(layer.weight)  # else x_hat equals what comes out
    check(layer, row_losses, [numbers(n, 4, 3, 5)])


@pytest.mark.parametrize(
    ("layer", "one_row"),
    [
        (nn.Conv2d(2, 3, 3), numbers(1, 2, 5, 5)),
        (nn.ConvTranspose2d(2, 3, 3, 2), numbers(1, 2, 5, 5)),
        (nn.Linear(4, 3), numbers(1, 4)),
        (nn.Linear(4, 3), numbers(1, 2, 4)),
        (nn.Embedding(4, 5), torch.tensor([1])),
        (nn.Embedding(4, 5), torch.tensor([[1, 2]])),
        (nn.GroupNorm(2, 4), numbers(1, 4, 3, 5)),
        (nn.InstanceNorm2d(4, affine=True), numbers(1, 4, 3, 5)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_no_record_moves_nothing_in_any_layer(layer, one_row):
    """A Poisson batch may be empty: no rows, and a sum of zeros in the weight's shape."""
    network = copy.deepcopy(layer).double()
    params = list(network.parameters())
    rows = BookKeeping(network, params).backward(squares, [one_row[:0]])
    assert rows.losses.shape == (0,)
    for k, p in enumerate(params):
        assert rows.values(k).shape == (0, p.numel())
        assert rows.norms_PN()[k].shape == (0,)
        assert torch.equal(rows.clipped(torch.zeros(0, dtype=torch.float64))[k], torch.zeros_like(p))


class Mixed(nn.Module):
    """All kinds of layers; two of them are used twice, one is left out by the loss."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.label, self.unused = nn.Embedding(3, 4), nn.Linear(2, 2)
        self.first, self.norm = nn.Conv2d(1, 4, 3, 2, 1), nn.InstanceNorm2d(4, affine=True)
        self.up, self.group = nn.ConvTranspose2d(4, 4, 3, 2, 1, 1), nn.GroupNorm(2, 4)
        self.again, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.act = nn.LeakyReLU(0.2, inplace=inplace)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.first(images) + self.label(labels)[:, :, None, None]))
        x = self.act(self.group(self.up(x)))
        x = self.again(x.movedim(1, -1)).mean((1, 2))
        return self.head(self.again(torch.tanh(x))).squeeze(1)


def several(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    first = functional.softplus(network(torch.cat([images, -images]), labels.repeat(2)))
    return first + network(2 * images, labels).repeat(2) ** 2


@pytest.mark.parametrize("inplace", [False, True])
def test_a_network_of_all_layers_some_used_twice(inplace):
    """Opacus' hooks refuse in-place activations; book-keeping takes the gradient of the layer's own output."""
    others = (Functional,) if inplace else (Hooks, Functional)
    check(Mixed(inplace), several, [numbers(4, 1, 8, 6), torch.tensor([0, 2, 2, 1])], others)


def test_blocks_of_rows_change_nothing(monkeypatch):
    monkeypatch.setattr(row_gradients, "CACHE_BYTES", 8 * 4 * 50)
    check(Mixed(), several, [numbers(5, 1, 8, 6), torch.tensor([0, 2, 2, 1, 0])])


def test_memory_that_is_written_anew_holds_nothing_of_an_earlier_batch():
    network = nn.Conv2d(2, 3, 3).double()
    method = BookKeeping(network, list(network.parameters()))
    big, small = numbers(6, 2, 5, 5), numbers(3, 2, 5, 5, seed=1)
    method.backward(squares, [big * float("nan")])
    for batch in (small, big):
        rows, true = method.backward(squares, [batch]), one_by_one(network, squares, [batch])
        torch.testing.assert_close(rows.values(0), true[0], **EXACT)


def test_weights_that_are_not_trained_are_left_out():
    network = Mixed().double()
    network.first.weight.requires_grad_(False)
    params = [p for p in network.parameters() if p.requires_grad]
    inputs = [numbers(3, 1, 8, 6), torch.tensor([0, 2, 1])]
    rows = BookKeeping(network, params).backward(several, inputs)
    network.first.weight.requires_grad_(True)
    true = one_by_one(network, several, inputs)
    names = [name for name, _ in network.named_parameters() if name != "first.weight"]
    expected = dict(zip([name for name, _ in network.named_parameters()], true, strict=True))
    for k, name in enumerate(names):
        torch.testing.assert_close(rows.values(k), expected[name], **EXACT)


def test_a_layer_without_gradient_counts_as_nothing():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()

    def half_blind(net, x):
        with torch.no_grad():
            seen = net[0](x)
        return net[1](seen + net[0](x)).squeeze(1)

    check(network, half_blind, [numbers(4, 3)])


def test_outer_products_hold_where_squares_overflow():
    """A hostile row of 1e30 with a tiny gradient: the norm is that of the product."""
    left, right = torch.full((1, 2), 1e-28), torch.full((1, 2), 1e30)
    assert float(Outer(left, right, torch.Size([2, 2]), channels_last=False).norm_N()) == pytest.approx(200)


# what it does not take


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, **options)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class BareWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.layer = nn.Parameter(torch.ones(1)), conv()


def shared() -> nn.Module:
    one, other = conv(), conv()
    other.weight = one.weight
    return nn.Sequential(one, other)


def hooked() -> nn.Module:
    layer = conv()
    layer.register_forward_hook(lambda module, entered, output: output * 2)
    return layer


def replaced() -> nn.Module:
    layer = conv()
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    "network",
    [
        conv(groups=2),
        conv(padding_mode="reflect", padding=1),
        conv(padding="same"),
        OwnForward(4, 4, 3),
        BareWeight(),
        shared(),
        hooked(),
        replaced(),
        parametrizations.weight_norm(conv()),
        parametrizations.spectral_norm(conv()),
        nn.LayerNorm(4),
        nn.Embedding(3, 4, padding_idx=0),
        nn.Embedding(3, 4, max_norm=1.0),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.MultiheadAttention(4, 2),
    ],
    ids=lambda network: type(network).__name__,
)
def test_other_layers_are_left_to_hooks(network):
    assert not supports(network, list(network.parameters()))
    assert supports(nn.Sequential(conv(), nn.LayerNorm(4)), list(conv().parameters())) is False
    assert supports(conv(), []) is True


def test_a_known_layer_beside_an_unknown_one_that_is_not_trained_is_fine():
    network = nn.Sequential(conv(), nn.LayerNorm(4))
    assert supports(network, list(network[0].parameters()))


def test_an_input_that_changes_in_place_after_its_layer_is_refused():
    network = nn.Linear(3, 2).double()

    def careless(net, x):
        x = x.clone()
        first = squares(net, x)
        return first + squares(net, x.mul_(2))

    with pytest.raises(PrivacyError, match="in place"):
        BookKeeping(network, list(network.parameters())).backward(careless, [numbers(3, 3)])


@pytest.mark.parametrize("method", [BookKeeping, Hooks])
def test_rows_that_are_no_views_of_records_are_refused(method):
    network = nn.Linear(3, 2).double()

    def rearranged(net, x):
        return net(x.reshape(-1, 3)[:4]).sum() + x[:, 0, 0]

    with pytest.raises(PrivacyError) as caught:
        method(network, list(network.parameters())).backward(rearranged, [numbers(3, 2, 3)])
    assert caught.value.code == "PRIVACY_MODEL"


def test_norms_are_those_of_what_is_added_where_positions_cancel():
    """Gram matrices (ghost norms) of the same record are far off in float32: the reason why there are none here."""
    torch.manual_seed(0)
    layer, images = nn.Conv2d(3, 4, 3, bias=False), torch.rand(1, 3, 1, 1).expand(2, 3, 8, 8).contiguous()
    waves = torch.randn(2, 4, 6, 6) * 1e3
    waves -= waves.mean((2, 3), keepdim=True) - 0.01

    rows = BookKeeping(layer, [layer.weight]).backward(lambda net, x, w: (net(x) * w).sum((1, 2, 3)), [images, waves])
    added = rows.values(0).double().norm(dim=1)
    torch.testing.assert_close(rows.norms_PN()[0].double(), added, rtol=1e-6, atol=0)

    patches, left = functional.unfold(images, 3), waves.flatten(2)
    grams = (patches.mT @ patches) * (left.mT @ left)
    ghost = grams.sum((1, 2)).clamp_min(0).sqrt().double()
    assert ((ghost / added - 1).abs() > 0.1).any()
