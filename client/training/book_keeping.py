"""The gradient of each record from what goes into layers and what comes back to their outputs (book-keeping).

A layer's weight gradient is a sum over positions of (gradient at the output) x (what the weight met there). So one
forward that keeps inputs, and one backward that stops at outputs, give everything; the ordinary weight gradients, which
hooks compute and throw away, are never made. After Bu et al. 2023, "Differentially Private Optimization on Large Model
at Small Cost" (arXiv 2210.00038), with one difference: their norms come from Gram matrices, where large terms cancel.
Here the norm is taken of the very numbers that are added: rounding cannot bring in more than is clipped away.

    case                                      result
    a layer of another type, or shared        `supports` is False: hooks
    one use, one position (Linear on a row)   the gradient is an outer product and is never written out
    several uses or views                     added up for each record before the norm
    an activation changes the output in place  the gradient is still that of the layer's own output
    a layer's input changes in place          autograd raises
    layer runs without gradient               that use counts as nothing, as in autograd
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from fedmedgan.client.training.row_gradients import (
    GradientMethod,
    RowLosses,
    WeightGradients,
    WrittenOut,
    check_views,
    fold_views,
)

Sides = tuple[Tensor, Tensor]
"""left (rows, T, L) and right (rows, T, R): a row's gradient is the sum over T positions of left x right."""


class Use(NamedTuple):
    """One call of a layer."""

    entered: Tensor
    """(rows, ...): what went in."""
    came_back: Tensor
    """(rows, ...): gradient at what came out."""


class Outer(WeightGradients):
    """As one outer product for each record, left_n x right_n, which is not written out.

    Norms are taken in float64: the squares of a side may under- or overflow where the values of the product do not.
    """

    def __init__(self, left_NL: Tensor, right_NR: Tensor, shape: torch.Size, *, channels_last: bool) -> None:
        super().__init__(shape, channels_last)
        self.left_NL, self.right_NR = left_NL, right_NR

    def norm_N(self) -> Tensor:
        left_N = torch.linalg.vector_norm(self.left_NL, dim=1, dtype=torch.float64)
        right_N = torch.linalg.vector_norm(self.right_NR, dim=1, dtype=torch.float64)
        return (left_N * right_N).to(self.left_NL.dtype)

    def values(self, at: slice, records: slice) -> Tensor:
        at_K, right = self._places(at).to(self.left_NL.device), self.right_NR.shape[1]
        return self.left_NL[records][:, at_K // right] * self.right_NR[records][:, at_K % right]

    def forget(self, records_N: Tensor) -> None:
        self.left_NL, self.right_NR = self.left_NL.clone(), self.right_NR.clone()  # may be parts of other tensors
        self.left_NL[records_N] = self.right_NR[records_N] = 0

    def weighted_sum(self, weights_N: Tensor) -> Tensor:
        summed_LR = (self.left_NL * weights_N[:, None]).T @ self.right_NR
        return self._as_weight(summed_LR.flatten())


class BookKeeping(GradientMethod):
    """Book-keeping, for networks whose trained weights all belong to layers that `supports` knows."""

    name = "book-keeping"

    def __init__(self, network: nn.Module, params: Sequence[nn.Parameter]) -> None:
        super().__init__(network, params)
        place = {id(p): i for i, p in enumerate(params)}
        self._layers = {
            layer: {name: place[id(p)] for name, p in layer.named_parameters(recurse=False) if id(p) in place}
            for layer in network.modules()
        }
        self._layers = {layer: mine for layer, mine in self._layers.items() if mine}

    def _differentiate(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> tuple[Tensor, list[WeightGradients]]:
        records = len(inputs[0])
        losses, calls = self._forward(row_losses, inputs)
        came_back = torch.autograd.grad(losses.sum(), [edge for _, _, edge in calls], allow_unused=True)
        uses: dict[nn.Module, list[Use]] = {layer: [] for layer in self._layers}
        for (layer, entered, _), gradient in zip(calls, came_back, strict=True):
            if gradient is not None:
                uses[layer].append(Use(entered, gradient))
        del calls, came_back
        parts: list[WeightGradients | None] = [None] * len(self.params)
        with torch.no_grad():
            for layer, mine in self._layers.items():
                of_layer = uses.pop(layer)
                for name, place in mine.items():
                    parts[place] = _gradients(layer, name, of_layer, records)
        return losses.detach(), [part for part in parts if part is not None]

    def _forward(
        self, row_losses: RowLosses, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, list[tuple[nn.Module, Tensor, GradientEdge]]]:
        """Losses, and each call of a layer: what went in, and where the gradient of what came out is found."""
        calls: list[tuple[nn.Module, Tensor, GradientEdge]] = []

        def note(layer: nn.Module, entered: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                calls.append((layer, entered[0].detach(), get_gradient_edge(output)))

        handles = [layer.register_forward_hook(note) for layer in self._layers]
        try:
            losses = row_losses(self.network, *inputs)
        finally:
            for handle in handles:
                handle.remove()
        check_views(losses, len(inputs[0]))
        return losses, calls


def supports(network: nn.Module, params: Sequence[nn.Parameter]) -> bool:
    """Whether each of `params` belongs to one layer of a known kind, and to nothing else."""
    mine, owners = {id(p) for p in params}, Counter()
    for layer in network.modules():
        names = {name for name, p in layer.named_parameters(recurse=False) if id(p) in mine}
        owners.update(id(p) for _, p in layer.named_parameters(recurse=False) if id(p) in mine)
        if names and not (names <= {"weight", "bias"} and _is_known(layer)):
            return False
    return all(owners[id(p)] == 1 for p in params)


def _is_known(layer: nn.Module) -> bool:
    if type(layer) not in _KNOWN or "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Embedding):
        return layer.padding_idx is None and layer.max_norm is None and not (layer.scale_grad_by_freq or layer.sparse)
    return not getattr(layer, "track_running_stats", False)


def _gradients(layer: nn.Module, name: str, uses: list[Use], records: int) -> WeightGradients:
    """Of one weight of a layer, summed over uses and views."""
    shape = getattr(layer, name).shape
    if not uses:
        return WrittenOut(torch.zeros(records, shape.numel(), device=getattr(layer, name).device), shape)
    if name == "bias":
        return _added_up([_over_positions(layer, use.came_back) for use in uses], records, shape)
    if isinstance(layer, nn.GroupNorm | nn.InstanceNorm2d):
        products = [_normalised(layer, use.entered) * use.came_back for use in uses]
        return _added_up([_over_positions(layer, product) for product in products], records, shape)
    channels_last = isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    return _products([_SIDES[type(layer)](layer, use) for use in uses], records, shape, channels_last)


def _added_up(rows: Sequence[Tensor], records: int, shape: torch.Size) -> WrittenOut:
    return WrittenOut(torch.stack([fold_views(r, records) for r in rows]).sum(0), shape)


def _products(uses: Sequence[Sides], records: int, shape: torch.Size, channels_last: bool) -> WeightGradients:
    """Sum over positions, uses and views of left x right."""
    if len(uses) == 1 and uses[0][0].shape[:2] == (records, 1):
        left, right = uses[0]
        return Outer(left.squeeze(1), right.squeeze(1), shape, channels_last=channels_last)
    products = [fold_views(torch.bmm(left.mT, right).flatten(1), records) for left, right in uses]
    total = products[0]
    for product in products[1:]:
        total += product
    return WrittenOut(total, shape, channels_last=channels_last)


def _over_positions(layer: nn.Module, x: Tensor) -> Tensor:
    """(rows, channels): channels are the last axis of a Linear layer, the second one elsewhere."""
    axes = range(1, x.ndim - 1) if isinstance(layer, nn.Linear) else range(2, x.ndim)
    return x.sum(tuple(axes)) if axes else x


def _normalised(layer: nn.GroupNorm | nn.InstanceNorm2d, entered: Tensor) -> Tensor:
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features
    return functional.group_norm(entered, groups, eps=layer.eps)


def _of_linear(layer: nn.Linear, use: Use) -> Sides:
    return _positions(use.came_back), _positions(use.entered)


def _of_embedding(layer: nn.Embedding, use: Use) -> Sides:
    one_hot = functional.one_hot(use.entered, layer.num_embeddings).to(use.came_back.dtype)
    return _positions(one_hot), _positions(use.came_back)


def _of_convolution(layer: nn.Conv2d, use: Use) -> Sides:
    grid = use.came_back.shape[2:]
    return use.came_back.flatten(2).mT, _patches(layer, use.entered, grid)


def _of_transposed_convolution(layer: nn.ConvTranspose2d, use: Use) -> Sides:
    """A convolution backwards: what went in met the patches of what came back."""
    grid = use.entered.shape[2:]
    return use.entered.flatten(2).mT, _patches(layer, use.came_back, grid)


_SIDES: dict[type, Callable[..., Sides]] = {
    nn.Linear: _of_linear,
    nn.Embedding: _of_embedding,
    nn.Conv2d: _of_convolution,
    nn.ConvTranspose2d: _of_transposed_convolution,
}
_KNOWN = {*_SIDES, nn.GroupNorm, nn.InstanceNorm2d}


def _positions(x: Tensor) -> Tensor:
    """(rows, ..., D) -> (rows, T, D)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _patches(layer: nn.Conv2d | nn.ConvTranspose2d, image: Tensor, grid: torch.Size) -> Tensor:
    """What each of T = grid positions sees of an image (rows, C, H, W): (rows, T, kernel height * width * C).

    Channels come last, so that whole runs of memory are copied.
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    rows, channels, height, width = image.shape
    padded = image.new_zeros(rows, height + 2 * ph, width + 2 * pw, channels)
    padded[:, ph : ph + height, pw : pw + width] = image.movedim(1, -1)
    along_row, along_y, along_x, along_channel = padded.stride()
    seen = padded.as_strided(
        (rows, *grid, kh, kw, channels),
        (along_row, along_y * sh, along_x * sw, along_y * dh, along_x * dw, along_channel),
    )
    return seen.reshape(rows, -1, kh * kw * channels)
