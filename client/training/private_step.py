"""One differentially private step on a network that sees patients (DP-SGD, Abadi et al. 2016).

The gradient of each record (one patient's data in this step) is clipped as a whole to L2 norm C, records are summed,
Gaussian noise of standard deviation sigma * C is added, and the result is divided by a public constant. A patient is in
at most one record, so with or without that patient the clipped sum moves by at most C.

Records are taken in chunks that fit the processor's cache; clipping is by record, so chunks change nothing.

    case                                   result
    no patient was sampled                 nothing is differentiated; noise is added, the step is charged
    a record's gradient is NaN or infinite that record counts as zero (decided from that record alone)
    a record's norm is exactly zero        it stays zero
    network mixes rows (BatchNorm, ...)    refused before any patient is read: `refuse_unsafe`
    an earlier step ended in an error      what it had summed is thrown away: nothing is added up over two steps
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from fedmedgan.client.training.book_keeping import BookKeeping, supports
from fedmedgan.client.training.randomness import RandomSource, round_to_grid
from fedmedgan.client.training.row_gradients import (
    Functional,
    GradientMethod,
    Hooks,
    RowGradients,
    RowLosses,
    working_bytes,
)
from fedmedgan.client.training.witness import LOUD, NoWitness, ProbePass
from fedmedgan.shared.errors import ModelError, PrivacyError

CLIP_MARGIN = 1e-5
"""Records are clipped to C (1 - margin): float32 overshoots by up to 1.4e-6 (measured), the noise is for C in full."""
ACTIVATIONS = 40
"""Values that pass through a network for each value of a record: a rough guess, which only sets the size of chunks."""

METHODS: dict[str, type[GradientMethod]] = {m.name: m for m in (Hooks, BookKeeping, Functional)}
Method = Literal["auto", "hooks", "book-keeping", "functional"]


class _NoisyOptimizer(DPOptimizerFastGradientClipping):
    """Opacus' optimiser for gradients that are clipped before it: with our clipping, noise, and a witness."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        random: RandomSource,
        clip_norm: float,
        witness: NoWitness,
        **options: Any,
    ):
        super().__init__(optimizer, max_grad_norm=clip_norm * (1 - CLIP_MARGIN), **options)
        self.random, self.noise_std, self.witness = random, options["noise_multiplier"] * clip_norm, witness
        self.attach_step_hook(self._show)

    def clip_and_add(self, rows: RowGradients) -> None:
        """Clip each record of one chunk and add it to the sum of the step."""
        norms_PN = rows.norms_PN()
        self.witness.saw_rows(rows, norms_PN)
        norms_N = norms_PN.norm(dim=0)
        factors_N = (self.max_grad_norm / (norms_N + 1e-6)).clamp(max=1.0)
        finite_N = norms_PN.isfinite().all(0)  # not where any value is NaN or infinite
        if not finite_N.all():
            rows.forget(~finite_N)
            factors_N[~finite_N] = 0
        for p, clipped in zip(self.params, rows.clipped(factors_N), strict=True):
            p.summed_grad = clipped if p.summed_grad is None else p.summed_grad.add_(clipped)

    def accumulate(self) -> None:
        """Nothing: `clip_and_add` has summed, and what lies in ``p.grad`` is of no interest."""

    def add_noise(self) -> None:
        sizes = [p.numel() for p in self.params]
        noise_D = self.random.normal((sum(sizes),), self.noise_std, self.params[0].device)
        for p, noise in zip(self.params, noise_D.split(sizes), strict=True):
            p.grad = round_to_grid(p.summed_grad.double() + noise.view_as(p)).to(p.dtype)

    @staticmethod
    def _show(optimizer: _NoisyOptimizer) -> None:
        """Runs last before Adam: what the witness sees is what Adam gets."""
        params = optimizer.params
        clipped, gradients = [p.summed_grad for p in params], [p.grad for p in params]
        optimizer.witness.saw_step(clipped, gradients, optimizer.expected_batch_size)


class PrivateStep:
    """DP-SGD with Adam on one network, or on several in one module.

    Args:
        network: is trained in place. Between calls it is a plain module.
        optimizer: over the weights that are trained and clipped together.
        noise_multiplier: sigma, noise standard deviation over `clip_norm`.
        clip_norm: C, in gradient units.
        divisor: the clipped, noised sum is divided by this PUBLIC number of records.
        random: where the noise comes from.
        witness: looks at the tensors of every step; None: nobody does.
        method: how gradients of records are made, `row_gradients`. "auto" is book-keeping where all layers allow it,
            else Opacus' hooks. Losses with a gradient inside need "functional".

    Attributes:
        method: what was chosen.
        taken: steps so far, each of which has to be paid for.

    Raises:
        PrivacyError: PRIVACY_MODEL, the network mixes rows or cannot be differentiated row by row.
        ModelError: MODEL_MISMATCH, nothing to train.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clip_norm: float,
        divisor: int,
        random: RandomSource,
        witness: NoWitness | None = None,
        method: Method = "auto",
    ) -> None:
        refuse_unsafe(network)
        self.network = network
        self.optimizer = _NoisyOptimizer(
            optimizer,
            random=random,
            clip_norm=clip_norm,
            witness=witness or NoWitness(),
            noise_multiplier=noise_multiplier,
            expected_batch_size=divisor,
            loss_reduction="mean",
        )
        params = self.optimizer.params
        book_keeping = supports(network, params)
        if method == "book-keeping" and not book_keeping:
            raise PrivacyError("PRIVACY_MODEL", "a layer is not known to book-keeping", type(network).__name__)
        self.method: str = ("book-keeping" if book_keeping else "hooks") if method == "auto" else method
        self._gradients = METHODS[self.method](network, params)
        self.taken = 0

    def step(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> Tensor:
        """One step. Returns the losses, detached; they are NOT private.

        Args:
            row_losses: ``(network, *inputs) -> (views * records,)``. Row ``v * records + i`` belongs to record i, in
                the losses and in whatever enters a layer; all rows of a record are clipped together. It is called with
                some of the records at a time.
            inputs: (records, ...) each.

        Raises:
            PrivacyError: PRIVACY_MODEL, rows of a layer cannot be told apart by record.
            ModelError: MODEL_MISMATCH, the losses are not one for each row.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.taken += 1
        losses = []
        for chunk in self._chunks(inputs):
            rows = self._gradients.backward(row_losses, chunk)
            self.optimizer.clip_and_add(rows)
            losses.append(rows.losses.view(-1, rows.records) if rows.records else rows.losses[None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.cat(losses, dim=1).flatten()

    def _chunks(self, inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Records that are worked on at a time: so many that their gradients and activations fit the cache."""
        params, records = self.optimizer.params, len(inputs[0])
        values = sum(p.numel() for p in params) + ACTIVATIONS * sum(x.shape[1:].numel() for x in inputs)
        chunks = math.ceil(records * 4 * values / working_bytes(params[0].device))
        return zip(*(x.tensor_split(max(1, min(chunks, records))) for x in inputs), strict=True)

    def gradients_of(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> RowGradients:
        """The gradient of each record, neither clipped nor noised: for records of nobody. Nothing is trained."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._gradients.backward(row_losses, inputs)

    def probe(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> None:
        """Show the witness what records do to each other and that they are clipped. Nothing is trained.

        Args:
            row_losses: the same as in `step`.
            inputs: (records + 1, ...) each, of no patient. In a second pass the last one stands in for the first.
        """

        def loud(network: nn.Module, *records: Tensor) -> Tensor:
            return row_losses(network, *records) * LOUD

        records = [x[:-1] for x in inputs]
        first = self._probe_pass(loud, records)
        changed = self._probe_pass(loud, [torch.cat([x[-1:], x[1:-1]]) for x in inputs])
        losses = loud(self.network, *records).view(-1, len(records[0]))
        row_1 = torch.autograd.grad(losses[:, 1].sum(), self.optimizer.params, materialize_grads=True)
        self.optimizer.witness.saw_probe(first, changed, torch.cat([g.flatten() for g in row_1]))

    def _probe_pass(self, row_losses: RowLosses, inputs: Sequence[Tensor]) -> ProbePass:
        self.optimizer.zero_grad(set_to_none=True)
        rows = self._gradients.backward(row_losses, inputs)
        gradients_ND = torch.cat([rows.values(i) for i in range(len(rows.parts))], dim=1)
        norms_N = rows.norms_PN().norm(dim=0)
        self.optimizer.clip_and_add(rows)
        clipped = [p.summed_grad for p in self.optimizer.params]
        self.optimizer.zero_grad(set_to_none=True)
        return ProbePass(rows.losses.view(-1, rows.records).T, gradients_ND, norms_N, clipped)

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """Context in which the network is used but not trained: no gradients for its weights."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            yield self.network
        finally:
            for p in trained:
                p.requires_grad_(True)

    def close(self) -> None:
        """Give back memory."""
        self._gradients.close()


def refuse_hidden_state(network: nn.Module) -> None:
    """Refuse what would be shared without noise: buffers, and weights that no private step changes.

    Raises:
        PrivacyError: PRIVACY_MODEL.
    """
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    if hidden := sorted(set(network.state_dict()) - trained):
        what = f"{hidden[0]} is part of the model, and no private step trains it: it could hold a patient"
        raise PrivacyError("PRIVACY_MODEL", what, type(network).__name__)


def refuse_unsafe(network: nn.Module) -> None:
    """Refuse what Opacus refuses, and what it silently gets wrong.

    Measured with Opacus 1.6.0: BatchNorm without affine weights passes its validator and has sensitivity 4.95 C;
    a convolution with reflect or circular padding gets wrong per-row gradients in hooks mode.

    Raises:
        PrivacyError: PRIVACY_MODEL.
        ModelError: MODEL_MISMATCH, nothing to train.
    """
    if not any(p.requires_grad for p in network.parameters()):
        raise ModelError("MODEL_MISMATCH", "the network has no weights to train", type(network).__name__)
    problems = [str(e).splitlines()[0] for e in ModuleValidator.validate(network, strict=False)]
    for name, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            if layer.track_running_stats:
                problems.append(f"{name} keeps running statistics of patients")
            elif not isinstance(layer, nn.modules.instancenorm._InstanceNorm):
                problems.append(f"{name} is a BatchNorm: it mixes patients")
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.padding_mode != "zeros":
            problems.append(f"{name} pads with {layer.padding_mode!r}: put a padding layer before it")
    if problems:
        raise PrivacyError("PRIVACY_MODEL", problems[0], type(network).__name__)
