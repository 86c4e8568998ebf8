"""Wasserstein GAN (Arjovsky, Chintala, Bottou 2017): a critic whose answers are limited in how fast they change.

The limit is set after each step, on weights that are already private, so it costs no privacy: either every weight is
clipped to [-CLIP, CLIP] as in the paper, or, with `training.spectral_projection`, the largest singular value of each
flattened kernel is brought to at most 1, which keeps more of what a layer can say. That limits a convolution up to a
factor (`stabilisers.project_spectral`), and neither limits a critic with normalisation, which scales up again what was
scaled down: set `gan.norm = "none"`. Not to be confused with the clipping of gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmedgan.client.gans.cdcgan import Discriminator, Generator
from fedmedgan.client.gans.recipe import Synthesis

CLIP = 0.05
"""The paper's 0.01 belongs to networks of hundreds of channels; with tens of them answers would hardly differ."""


class WGAN(Synthesis):
    """Critic: mean of fakes minus mean of reals."""

    ignores = ("training.real_label", "training.adaptive")  # no answer of a critic means "a fake"

    def build(self) -> tuple[Generator, Discriminator]:
        return Generator(self.images, self.gan), Discriminator(self.images, self.gan)

    def row_losses(self, answers: Tensor, is_real_N: Tensor, labels_N: Tensor) -> Tensor:
        return answers * (1 - 2 * (is_real_N > 0).to(answers.dtype))

    def fake_loss(self, answers: Tensor, labels_N: Tensor) -> Tensor:
        return -answers.mean()

    def after_discriminator_step(self, discriminator: nn.Module) -> None:
        if not self.study.training.spectral_projection:
            with torch.no_grad():
                for weights in discriminator.parameters():
                    weights.clamp_(-CLIP, CLIP)


RECIPE = WGAN
