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
    a layer's input changes in place          PrivacyError
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
    WHOLE,
    GradientMethod,
    RowLosses,
    WeightGradients,
    WrittenOut,
    check_rows,
    check_views,
    fold_views,
    working_bytes,
)
from fedmedgan.shared.errors import PrivacyError

Sides = tuple[Tensor, Tensor, bool]
"""left (rows, T, L) and right (rows, T, R): a row's gradient is the sum over T positions of left x right. At the end,
whether the weight's channels come last in it."""
BLOCK = 1 / 32
"""Share of a chunk's bytes that the right side of a product may take; more is worked on block by block."""
FEW_CHANNELS = 4


class Call(NamedTuple):
    """One call of a layer, on the way forward."""

    layer: nn.Module
    entered: Tensor
    version: int
    """Counts changes in place of what entered."""
    output: GradientEdge
    """Where the gradient at what came out is found, whatever becomes of that tensor."""


class Use(NamedTuple):
    """One call of a layer, there and back."""

    entered: Tensor
    """(rows, ...): what went in."""
    came_back: Tensor
    """(rows, ...): gradient at what came out."""

    def rows(self, start: int, stop: int) -> Use:
        return Use(self.entered[start:stop], self.came_back[start:stop])

    def positions(self, layer: nn.Module) -> int:
        """T: how often the layer's weight is used for one row."""
        outer = self.entered if isinstance(layer, nn.ConvTranspose2d) else self.came_back
        channels = outer.shape[1] if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else outer.shape[-1]
        return outer[0].numel() // channels


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
        left_NL, right_NR = self.left_NL[records], self.right_NR[records]
        if at == WHOLE:
            return self._as_weight((left_NL[:, :, None] * right_NR[:, None]).flatten(1)).flatten(1)
        at_K = self._places(at).to(left_NL.device)
        return left_NL[:, at_K // right_NR.shape[1]] * right_NR[:, at_K % right_NR.shape[1]]

    def forget(self, records_N: Tensor) -> None:
        self.left_NL = self.left_NL.masked_fill(records_N[:, None], 0)
        self.right_NR = self.right_NR.masked_fill(records_N[:, None], 0)

    def weighted_sum(self, weights_N: Tensor) -> Tensor:
        summed_LR = (self.left_NL * weights_N[:, None]).T @ self.right_NR
        return self._as_weight(summed_LR.flatten()).contiguous()


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
        self._memory: dict[nn.Module, Tensor] = {}

    def close(self) -> None:
        self._memory.clear()

    def _differentiate(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> tuple[Tensor, list[WeightGradients]]:
        records = len(inputs[0])
        losses, calls = self._forward(row_losses, inputs)
        came_back = torch.autograd.grad(losses.sum(), [call.output for call in calls], allow_unused=True)
        uses: dict[nn.Module, list[Use]] = {layer: [] for layer in self._layers}
        for call, gradient in zip(calls, came_back, strict=True):
            if call.entered._version != call.version:
                raise PrivacyError("PRIVACY_MODEL", "what entered a layer was changed in place afterwards")
            if gradient is not None:
                uses[call.layer].append(Use(call.entered, gradient))
        del calls, came_back
        parts: list[WeightGradients | None] = [None] * len(self.params)
        with torch.no_grad():
            for layer, mine in self._layers.items():
                of_layer = uses.pop(layer)
                for name, place in mine.items():
                    parts[place] = self._gradients(layer, name, of_layer, records)
        return losses.detach(), [part for part in parts if part is not None]

    def _forward(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Call]]:
        """Losses, and each call of a layer."""
        calls: list[Call] = []

        def note(layer: nn.Module, entered: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if output.requires_grad:
                kept = entered[0].detach()
                calls.append(Call(layer, kept, kept._version, get_gradient_edge(output)))
            return output.clone() if output._is_view() else output  # a view that changes in place loses its edge

        handles = [layer.register_forward_hook(note) for layer in self._layers]
        try:
            losses = row_losses(self.network, *inputs)
        finally:
            for handle in handles:
                handle.remove()
        check_views(losses, len(inputs[0]))
        return losses, calls

    def _gradients(self, layer: nn.Module, name: str, uses: list[Use], records: int) -> WeightGradients:
        """Of one weight of a layer, summed over uses and views."""
        weight = layer.get_parameter(name).detach()
        if not uses:
            return WrittenOut(weight.new_zeros(records, weight.numel()), weight.shape)
        if name == "bias":
            rows = [use.came_back for use in uses]
        elif isinstance(layer, nn.GroupNorm | nn.InstanceNorm2d):
            rows = [_normalised(layer, use.entered) * use.came_back for use in uses]
        else:
            return self._products(layer, uses, records, weight)
        summed = [fold_views(_over_positions(layer, r), records) for r in rows]
        return WrittenOut(summed[0] if len(summed) == 1 else torch.stack(summed).sum(0), weight.shape)

    def _products(self, layer: nn.Module, uses: list[Use], records: int, weight: Tensor) -> WeightGradients:
        """Sum over positions, uses and views of left x right, a block of rows at a time."""
        sides, shape, right = _SIDES[type(layer)], weight.shape, weight[0].numel()
        if len(uses) == 1 and len(uses[0].entered) == records and uses[0].positions(layer) == 1:
            left_N1L, right_N1R, channels_last = sides(layer, uses[0])
            return Outer(left_N1L.squeeze(1), right_N1R.squeeze(1), shape, channels_last=channels_last)
        total_NLR, channels_last = self._space(layer, records, weight), False
        for use in uses:
            check_rows(len(use.entered), records)
            size = max(1, int(BLOCK * working_bytes(total_NLR.device)) // (4 * use.positions(layer) * right))
            for view in range(0, len(use.entered), records):
                is_first = view == 0 and use is uses[0]  # with beta = 0, what lies there is ignored
                for start in range(0, records, size):
                    stop = min(records, start + size)
                    left_BTL, right_BTR, channels_last = sides(layer, use.rows(view + start, view + stop))
                    total_NLR[start:stop].baddbmm_(left_BTL.mT, right_BTR, beta=0 if is_first else 1)
        return WrittenOut(total_NLR.flatten(1), shape, channels_last=channels_last)

    def _space(self, layer: nn.Module, records: int, weight: Tensor) -> Tensor:
        """(records, L, R) to write on. It is kept: asking the system for fresh pages costs more than the arithmetic."""
        if len(self._memory.get(layer, ())) < records:
            self._memory[layer] = weight.new_empty(records, len(weight), weight[0].numel())
        return self._memory[layer][:records]


def supports(network: nn.Module, params: Sequence[nn.Parameter]) -> bool:
    """Whether each of `params` belongs to one layer of a known kind, and to nothing else."""
    mine, owners = {id(p) for p in params}, Counter[int]()
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


def _over_positions(layer: nn.Module, x: Tensor) -> Tensor:
    """(rows, channels): channels are the last axis of a Linear layer, the second one elsewhere."""
    axes = range(1, x.ndim - 1) if isinstance(layer, nn.Linear) else range(2, x.ndim)
    return x.sum(tuple(axes)) if axes else x


def _normalised(layer: nn.GroupNorm | nn.InstanceNorm2d, entered: Tensor) -> Tensor:
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features
    return functional.group_norm(entered, groups, eps=layer.eps)


def _of_linear(layer: nn.Linear, use: Use) -> Sides:
    return _positions(use.came_back), _positions(use.entered), False


def _of_embedding(layer: nn.Embedding, use: Use) -> Sides:
    one_hot = functional.one_hot(use.entered, layer.num_embeddings).to(use.came_back.dtype)
    return _positions(one_hot), _positions(use.came_back), False


def _of_convolution(layer: nn.Conv2d, use: Use) -> Sides:
    return use.came_back.flatten(2).mT, *_patches(layer, use.entered, use.came_back.shape[2:])


def _of_transposed_convolution(layer: nn.ConvTranspose2d, use: Use) -> Sides:
    """A convolution backwards: what went in met the patches of what came back."""
    return use.entered.flatten(2).mT, *_patches(layer, use.came_back, use.entered.shape[2:])


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


def _patches(layer: nn.Conv2d | nn.ConvTranspose2d, image: Tensor, grid: torch.Size) -> tuple[Tensor, bool]:
    """What each of T = grid positions sees of an image (rows, C, H, W).

    Returns:
        (rows, T, C * kernel height * kernel width), and whether channels come last in it: then whole runs of memory are
        copied, which is two to seven times as fast (measured), unless there are hardly any channels.
    """
    assert not isinstance(layer.padding, str)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    rows, channels, height, width = image.shape
    if channels < FEW_CHANNELS:
        padded = functional.pad(image, (pw, pw, ph, ph))
        row, channel, y, x = padded.stride()
        seen = padded.as_strided((rows, channels, kh, kw, *grid), (row, channel, y * dh, x * dw, y * sh, x * sw))
        return seen.reshape(rows, channels * kh * kw, -1).mT, False
    padded = image.new_zeros(rows, height + 2 * ph, width + 2 * pw, channels)
    padded[:, ph : ph + height, pw : pw + width] = image.movedim(1, -1)
    row, y, x, channel = padded.stride()
    seen = padded.as_strided((rows, *grid, kh, kw, channels), (row, y * sh, x * sw, y * dh, x * dw, channel))
    return seen.reshape(rows, -1, kh * kw * channels), True
