"""Cures for non-convergence and mode collapse that read no patient: public numbers, fakes, and private weights.

cure                  what it reads                     source
turns                 how well fakes are told           fixed ratio; adaptive: Bie, Kamath, Zhang 2023
replay of fakes       fakes of earlier generators       Shrivastava et al. 2017; here for noise-to-image alone
penalty on fakes      slopes at generated images        Mescheder et al. 2018 (R2)
spectral projection   weights after the noise           Yoshida and Miyato 2017, as a projection

Two time scales are two learning rates; label smoothing and views are part of each row's own loss (gans/recipe.py); the
moving average of the generator is taken over rounds (client/shared_model.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
DECAY = 0.99
"""Of the moving average of how many fakes are told."""
TOLD = 0.6
"""Below this share of told fakes the discriminator needs more steps."""
SETTLED = 200
"""Generator steps at one rate before the next may be taken."""
REMEMBERED = 1024
"""Fakes that are kept for replay."""


class Turns:
    """When the generator has its turn: after every `rate` discriminator steps.

    Adaptive: the rate goes up to the next of RATES, and never down, once fewer than TOLD of the fakes are told.

    Args:
        rate: discriminator steps for each generator step, at first.
    """

    def __init__(self, rate: int, *, adaptive: bool) -> None:
        self.rate, self.adaptive = rate, adaptive
        self.told, self.settled = 1.0, 0

    def due(self, steps_done: int) -> bool:
        return steps_done % self.rate == 0

    def saw(self, answers: Tensor) -> None:
        """What the discriminator answered to fakes; above zero it took them for real."""
        self.told = DECAY * self.told + (1 - DECAY) * float((_is_it_real(answers) < 0).float().mean())
        self.settled += 1
        higher = [rate for rate in RATES if rate > self.rate]
        if self.settled >= SETTLED and self.told <= TOLD and higher:
            self.rate, self.told, self.settled = higher[0], 1.0, 0

    def state(self) -> list[float]:
        """To be kept from round to round."""
        return [self.rate, self.told, self.settled]

    def load(self, state: Sequence[float]) -> None:
        self.rate, self.told, self.settled = int(state[0]), float(state[1]), int(state[2])


class Replay:
    """Some of a step's fakes are fakes of earlier steps, so that the discriminator does not forget them.

    Only for fakes that are made of no patient; nothing is kept from one round to the next.

    Args:
        share: of the fakes of a step, 0 to 0.9.
        random: public randomness.
    """

    def __init__(self, share: float, random: torch.Generator) -> None:
        self.share, self.random = share, random
        self.kept: list[tuple[Tensor, ...]] = []

    def mixed(self, inputs: tuple[Tensor, ...], n_real: int) -> tuple[Tensor, ...]:
        """The same number of rows; `n_real` rows of patients come first and are left alone."""
        if not self.share:
            return inputs
        fresh = tuple(x[n_real:].detach() for x in inputs)
        n_fakes = len(fresh[0])
        mixed = inputs
        if self.kept:
            pool = [torch.cat(parts) for parts in zip(*self.kept, strict=True)]
            n_old = min(round(self.share * n_fakes), len(pool[0]))
            which = torch.randperm(len(pool[0]), generator=self.random)[:n_old].to(pool[0].device)
            mixed = tuple(
                torch.cat([x[: n_real + n_fakes - n_old], old[which]]) for x, old in zip(inputs, pool, strict=True)
            )
        self.kept = [*self.kept, fresh][-max(1, REMEMBERED // max(1, n_fakes)) :]
        return mixed


def _is_it_real(answers: Tensor) -> Tensor:
    """The answers (N,) to that question: of several columns the first, the others may be of classes."""
    return answers.flatten(1)[:, 0] if answers.ndim > 1 else answers


def penalty_gradient(network: nn.Module, fakes_N1SS: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """Gradient, for each weight, of half the mean squared slope of the answers "is it real?" at generated images.

    The network is used as it is: hooks must be off. No patient is in it, so nothing is clipped and nothing noised.
    """
    weights = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    images = fakes_N1SS.detach().requires_grad_()
    answers = torch.func.functional_call(network, weights, (images, labels_N))
    (slopes,) = torch.autograd.grad(_is_it_real(answers).sum(), images, create_graph=True)
    penalty = slopes.flatten(1).square().sum(1).mean() / 2
    found = torch.autograd.grad(penalty, list(weights.values()), allow_unused=True)
    return {name: g for name, g in zip(weights, found, strict=True) if g is not None}


@torch.no_grad()
def descend(network: nn.Module, gradients: dict[str, Tensor], rate: float) -> None:
    """One plain step of gradient descent."""
    weights = dict(network.named_parameters())
    for name, gradient in gradients.items():
        weights[name].sub_(gradient, alpha=rate)


@torch.no_grad()
def project_spectral(network: nn.Module) -> None:
    """Divide each weight matrix (outputs x the rest) by its largest singular value where that exceeds 1.

    Of a convolution that is the flattened kernel. It lengthens no window of its input; the whole input by at most the
    root of how many windows a pixel is in: 2 for 4 x 4 with stride 2.
    """
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.div_(torch.linalg.matrix_norm(weight.flatten(1), ord=2).clamp(min=1.0))
