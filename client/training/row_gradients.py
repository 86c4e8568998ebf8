"""The gradient of each record by itself, and two of the three ways to get it: Opacus' hooks and torch.func.

A record is one patient's data in one step. A recipe may make several network rows of it (views: shifted copies, or a
real image and the fake that was made of it), and may use the network several times: row ``v * records + i`` belongs to
record i, and a record's gradient is that of the sum of its losses. It is what is clipped, as a whole.

    hooks          Opacus' GradSampleModule: every layer that Opacus knows; the reference for the others
    functional     torch.func (vmap of grad): anything that a single record's loss can be written with, an inner
                   gradient too (WGAN-GP), which hooks and book-keeping cannot see through
    book-keeping   one forward, one backward to the layers' outputs: `book_keeping`

    case                                   result
    a layer's rows are no whole views      PrivacyError: the network rearranges its batch
    losses are no whole views              ModelError
    a weight was not used                  its gradient is zero
    a weight was used outside its layer    hooks: PrivacyError; book-keeping: the witness' probe fails
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from fedmedgan.shared.errors import ModelError, PrivacyError

RowLosses = Callable[..., Tensor]
"""``(network, *inputs) -> (views * records,)``; of inputs, each (records, ...)."""
WHOLE = slice(None)
CACHE_BYTES = 64 << 20
"""What is worked on at a time on a CPU; measured: with more, and with less, a step takes longer."""
DEVICE_BYTES = 1 << 30


def working_bytes(device: torch.device) -> int:
    """Bytes that one chunk of records should take, about."""
    return CACHE_BYTES if device.type == "cpu" else DEVICE_BYTES


class WeightGradients(ABC):
    """Gradients of one weight tensor, one for each record.

    Args:
        shape: of the weight.
        channels_last: the gradients are stored with axis 1 of the weight (its channels) last.
    """

    def __init__(self, shape: torch.Size, channels_last: bool) -> None:
        self.shape, self.channels_last = shape, channels_last

    @abstractmethod
    def norm_N(self) -> Tensor:
        """L2 norm of each record's gradient."""

    @abstractmethod
    def values(self, at: slice, records: slice) -> Tensor:
        """(records, K): a short slice of the flattened weight, or the `WHOLE`."""

    @abstractmethod
    def forget(self, records_N: Tensor) -> None:
        """Where True, the gradient counts as zero from now on."""

    @abstractmethod
    def weighted_sum(self, weights_N: Tensor) -> Tensor:
        """Sum over records, in the shape of the weight."""

    def _as_weight(self, stored_D: Tensor) -> Tensor:
        """(..., D) as it is stored -> (..., *shape)."""
        if not self.channels_last:
            return stored_D.view(*stored_D.shape[:-1], *self.shape)
        channels, *taps = self.shape[1:]
        return stored_D.view(*stored_D.shape[:-1], self.shape[0], *taps, channels).movedim(-1, -len(taps) - 1)

    def _places(self, at: slice) -> Tensor:
        """Where values of the flattened weight are stored: (K,) int64."""
        at_K = torch.arange(*at.indices(self.shape.numel()))
        if not self.channels_last:
            return at_K
        row, taps, channels = self.shape[1:].numel(), self.shape[2:].numel(), self.shape[1]
        return at_K // row * row + at_K % taps * channels + at_K % row // taps


class WrittenOut(WeightGradients):
    """As one row (D,) for each record."""

    def __init__(self, stored_ND: Tensor, shape: torch.Size, *, channels_last: bool = False) -> None:
        super().__init__(shape, channels_last)
        self.stored_ND = stored_ND

    def norm_N(self) -> Tensor:
        return torch.linalg.vector_norm(self.stored_ND, dim=1)

    def values(self, at: slice, records: slice) -> Tensor:
        stored_ND = self.stored_ND[records]
        if at == WHOLE:
            return self._as_weight(stored_ND).flatten(1)
        return stored_ND[:, at] if not self.channels_last else stored_ND[:, self._places(at).to(stored_ND.device)]

    def forget(self, records_N: Tensor) -> None:
        self.stored_ND = self.stored_ND.masked_fill(records_N[:, None], 0)  # it may be part of another tensor

    def weighted_sum(self, weights_N: Tensor) -> Tensor:
        return self._as_weight(weights_N @ self.stored_ND).contiguous()


class RowGradients:
    """What one backward pass leaves: losses, and the gradient of each record.

    Args:
        losses: (views * records,), detached; not private.
        parts: one for each weight tensor.
    """

    def __init__(self, losses: Tensor, parts: Sequence[WeightGradients], records: int) -> None:
        self.losses, self.parts, self.records = losses, list(parts), records

    @classmethod
    def of_nobody(cls, params: Sequence[nn.Parameter]) -> RowGradients:
        """Of an empty batch: nothing is differentiated."""
        parts = [WrittenOut(p.detach().new_zeros(0, p.numel()), p.shape) for p in params]
        return cls(params[0].detach().new_zeros(0), parts, 0)

    @property
    def shapes(self) -> list[torch.Size]:
        """Of the weight tensors."""
        return [part.shape for part in self.parts]

    def norms_PN(self) -> Tensor:
        """L2 norm of each record's gradient, for each weight tensor by itself."""
        return torch.stack([part.norm_N() for part in self.parts])

    def values(self, weight: int, at: slice = WHOLE, records: slice = WHOLE) -> Tensor:
        """(N, K): a slice of the flattened weight's gradient, of each record; cheap where the slice is short."""
        return self.parts[weight].values(at, records)

    def forget(self, records_N: Tensor) -> None:
        """Where True, the record counts as zero from now on: 0 times NaN is NaN."""
        for part in self.parts:
            part.forget(records_N)

    def clipped(self, factors_N: Tensor) -> list[Tensor]:
        """Sum over records of factor times gradient, one tensor for each weight tensor."""
        return [part.weighted_sum(factors_N) for part in self.parts]


class GradientMethod(ABC):
    """One way to get the gradient of each record. Between calls of `backward` the network is a plain module."""

    name: str

    def __init__(self, network: nn.Module, params: Sequence[nn.Parameter]) -> None:
        self.network, self.params = network, list(params)

    def backward(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> RowGradients:
        """Gradients of every record of `inputs`, each (records, ...), good until the next call; the weights' own
        gradients are not touched, or are none.

        Raises:
            PrivacyError: PRIVACY_MODEL, a layer's rows do not belong to records.
            ModelError: MODEL_MISMATCH, the losses do not.
        """
        records = len(inputs[0])
        if records == 0:
            return RowGradients.of_nobody(self.params)
        losses, parts = self._differentiate(row_losses, inputs)
        return RowGradients(losses, parts, records)

    @abstractmethod
    def _differentiate(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> tuple[Tensor, list[WeightGradients]]:
        """Losses, detached, and one part for each of `params`."""

    def close(self) -> None:  # noqa: B027 - only book-keeping keeps something
        """Give back memory."""


class Hooks(GradientMethod):
    """Opacus' hooks, which write every record's whole gradient next to each weight."""

    name = "hooks"

    def _differentiate(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> tuple[Tensor, list[WeightGradients]]:
        self._clear()
        hooks = GradSampleHooks(self.network, loss_reduction="sum")
        try:
            losses = row_losses(self.network, *inputs)
            check_views(losses, len(inputs[0]))
            with warnings.catch_warnings():  # that images need no gradient, which is how it should be
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                losses.sum().backward()
            return losses.detach(), [self._part(p, len(inputs[0])) for p in self.params]
        finally:
            hooks.cleanup()
            self._clear()

    @staticmethod
    def _part(p: nn.Parameter, records: int) -> WeightGradients:
        written: Tensor | None = getattr(p, "grad_sample", None)
        if written is None and p.grad is not None:
            raise PrivacyError("PRIVACY_MODEL", "a weight is used outside of its layer: its gradient has no rows")
        if written is None:
            return WrittenOut(p.detach().new_zeros(records, p.numel()), p.shape)
        return WrittenOut(fold_views(written.flatten(1), records), p.shape)

    def _clear(self) -> None:
        for p in self.params:
            p.grad = None


class Functional(GradientMethod):
    """torch.func: vmap over records of the gradient of one record's loss, which sees a batch of one record."""

    name = "functional"

    def __init__(self, network: nn.Module, params: Sequence[nn.Parameter]) -> None:
        super().__init__(network, params)
        self._loss = _LossOf(network)
        mine = {id(p) for p in params}
        self._weights = {name: p for name, p in self._loss.named_parameters() if id(p) in mine}

    def _differentiate(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> tuple[Tensor, list[WeightGradients]]:
        def loss_of_one(weights: dict[str, Tensor], *record: Tensor) -> tuple[Tensor, Tensor]:
            alone = [x[None] for x in record]
            losses_V = torch.func.functional_call(self._loss, weights, (row_losses, *alone))
            check_views(losses_V, records=1)
            return losses_V.sum(), losses_V

        differentiate = torch.func.vmap(torch.func.grad(loss_of_one, has_aux=True), (None, *(0 for _ in inputs)))
        weights = {name: p.detach() for name, p in self._weights.items()}
        gradients, losses_NV = differentiate(weights, *inputs)
        of_weight = {id(p): gradients[name] for name, p in self._weights.items()}
        return losses_NV.T.flatten(), [WrittenOut(of_weight[id(p)].flatten(1), p.shape) for p in self.params]


class _LossOf(nn.Module):
    """A network whose call is the loss, so that weights can be put in for the whole of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, row_losses: RowLosses, *inputs: Tensor) -> Tensor:
        return row_losses(self.network, *inputs)


def check_views(losses: Tensor, records: int) -> None:
    """Raises ModelError: MODEL_MISMATCH, unless `losses` is (views * records,)."""
    if losses.ndim != 1 or len(losses) == 0 or len(losses) % records:
        what = f"losses of shape {tuple(losses.shape)} for {records} records: one loss for each row is needed"
        raise ModelError("MODEL_MISMATCH", what)


def check_rows(rows: int, records: int) -> None:
    """Raises PrivacyError: PRIVACY_MODEL, unless the rows are whole views."""
    if rows == 0 or rows % records:
        raise PrivacyError("PRIVACY_MODEL", "a layer's rows are not those of the batch's records")


def fold_views(rows_RD: Tensor, records: int) -> Tensor:
    """(views * records, D) -> (records, D): the sum over views.

    Raises:
        PrivacyError: PRIVACY_MODEL, the rows are no whole views.
    """
    check_rows(len(rows_RD), records)
    return rows_RD if len(rows_RD) == records else rows_RD.view(-1, records, *rows_RD.shape[1:]).sum(0)
