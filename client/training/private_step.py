"""One differentially private step on the network that sees patients (DP-SGD, Abadi et al. 2016), through Opacus.

Each row of a batch is clipped by itself to L2 norm C, the rows are summed, Gaussian noise of standard deviation
sigma * C is added, and the result is divided by a public constant. A patient is in at most one row, so with or
without that patient the clipped sum moves by at most C.

    case                                result
    no patient was sampled              only fakes are summed; noise is added, the step is charged
    a row's gradient is NaN or infinite that row counts as zero (decided from that row alone)
    a row's norm is exactly zero        it stays zero
    network mixes rows (BatchNorm, ...) refused before any patient is read: `refuse_unsafe`
    gradients of an earlier batch left  Opacus raises: nothing is ever accumulated over two batches
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from fedmedgan.client.training.randomness import RandomSource, round_to_grid
from fedmedgan.client.training.witness import LOUD, NoWitness, ProbePass
from fedmedgan.shared.errors import ModelError, PrivacyError

CLIP_MARGIN = 1e-5
"""Rows are clipped to C (1 - margin): float32 overshoots by up to 1.4e-6 (measured), the noise is for C in full."""


class _NoisyOptimizer(DPOptimizer):
    """Opacus' optimiser with noise from our own random source, added in float64, and before a witness."""

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

    def clip_and_accumulate(self) -> None:
        gradients = self.grad_samples
        norms_PN = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        self.witness.saw_rows(gradients, norms_PN)
        finite_N = norms_PN.isfinite().all(0)  # not where any value is NaN or infinite
        if not finite_N.all():
            for gradient in gradients:
                gradient[~finite_N] = 0
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        for p in self.params:
            noise = self.random.normal(p.summed_grad.shape, self.noise_std).to(p.device)
            p.grad = round_to_grid(p.summed_grad.double() + noise).to(p.dtype).view_as(p)

    @staticmethod
    def _show(optimizer: _NoisyOptimizer) -> None:
        """Runs last before Adam: what the witness sees is what Adam gets."""
        params = optimizer.params
        clipped, gradients = [p.summed_grad for p in params], [p.grad for p in params]
        optimizer.witness.saw_step(clipped, gradients, optimizer.expected_batch_size)


class PrivateStep:
    """DP-SGD with Adam on one network.

    Args:
        network: is trained in place; every forward between `step` calls must go through `rows`.
        noise_multiplier: sigma, noise standard deviation over `clip_norm`.
        clip_norm: C, in gradient units.
        divisor: the clipped, noised sum is divided by this PUBLIC number of rows.
        random: where the noise comes from.
        witness: looks at the tensors of every step; None: nobody does.

    Raises:
        PrivacyError: PRIVACY_MODEL, the network mixes rows or Opacus cannot differentiate it row by row.
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
    ) -> None:
        refuse_unsafe(network)
        self.module = GradSampleModule(network, loss_reduction="sum")
        self.module.forbid_grad_accumulation()
        self.optimizer = _NoisyOptimizer(
            optimizer,
            random=random,
            clip_norm=clip_norm,
            witness=witness or NoWitness(),
            noise_multiplier=noise_multiplier,
            expected_batch_size=divisor,
            loss_reduction="mean",
        )

    def step(self, row_losses: Callable[[nn.Module], Tensor]) -> Tensor:
        """One step on ``row_losses(network) -> (rows,)``. Returns the losses, detached; they are NOT private."""
        losses = self._backward(row_losses)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def probe(self, row_losses: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """Show the witness what rows do to each other and that they are clipped. Nothing is trained.

        Args:
            row_losses: ``(network, *inputs) -> (rows,)``, the same as in `step`.
            inputs: (rows + 1, ...) each, of no patient. In a second pass the last row stands in for the first.
        """

        def loud(network: nn.Module, rows: Sequence[Tensor]) -> Tensor:
            return row_losses(network, *rows) * LOUD

        rows = [x[:-1] for x in inputs]
        first = self._probe_pass(lambda network: loud(network, rows))
        other_rows = [torch.cat([x[-1:], x[1:-1]]) for x in inputs]
        changed = self._probe_pass(lambda network: loud(network, other_rows))
        self.module.disable_hooks()
        with _images_need_no_gradient():
            row_1 = torch.autograd.grad(loud(self.module, rows)[1], self.optimizer.params)
        self.module.enable_hooks()
        self.optimizer.witness.saw_probe(first, changed, torch.cat([g.flatten() for g in row_1]))

    def _probe_pass(self, row_losses: Callable[[nn.Module], Tensor]) -> ProbePass:
        losses = self._backward(row_losses)
        gradients_ND = torch.cat([g.flatten(1) for g in self.optimizer.grad_samples], dim=1)
        self.optimizer.clip_and_accumulate()
        clipped = [p.summed_grad for p in self.optimizer.params]
        self.optimizer.zero_grad(set_to_none=True)
        return ProbePass(losses, gradients_ND, clipped)

    def _backward(self, row_losses: Callable[[nn.Module], Tensor]) -> Tensor:
        """Leaves the gradient of each row at the weights; returns the losses, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = row_losses(self.module)
        with _images_need_no_gradient():
            losses.sum().backward()
        return losses.detach()

    def frozen(self) -> _Frozen:
        """Context in which the network is used but not trained: no hooks, no gradients for its weights."""
        return _Frozen(self.module)

    def close(self) -> None:
        """Take the hooks off the network again."""
        self.module.to_standard_module()


@contextmanager
def _images_need_no_gradient() -> Iterator[None]:
    """Which is how it should be, and what torch warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


class _Frozen:
    def __init__(self, module: GradSampleModule) -> None:
        self.module = module

    def __enter__(self) -> nn.Module:
        self.module.disable_hooks()
        self.module.requires_grad_(False)
        return self.module

    def __exit__(self, *_: object) -> None:
        self.module.requires_grad_(True)
        self.module.enable_hooks()


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
