"""WGAN with gradient penalty (Gulrajani et al. 2017), private through torch.func.

Each record is one patient's image, one generated image of the same label, and a point between the two where the
critic's slope is held near 1. All three terms of a record are clipped together: they depend on that one patient. No
hooks-based method can differentiate this loss row by row, so this recipe asks for the functional one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmedgan.client.gans.cdcgan import Discriminator, Generator
from fedmedgan.client.gans.recipe import Fakes, Records, Synthesis
from fedmedgan.client.training.randomness import RandomSource

PENALTY = 10.0


class WGANGP(Synthesis):
    """Critic: fake minus real plus PENALTY * (slope - 1)^2."""

    fake_rows = False
    method = "functional"
    ignores = ("training.views", "training.real_label", "training.replay", "training.adaptive")

    def build(self) -> tuple[Generator, Discriminator]:
        return Generator(self.images, self.gan), Discriminator(self.images, self.gan)

    def discriminator_inputs(
        self, generator: nn.Module, records: Records, fakes: Fakes, random: RandomSource
    ) -> tuple[Tensor, ...]:
        real, labels = records.images_R1SS, records.labels_R
        latent = random.normal((len(labels), self.gan.latent), 1.0).to(real)
        between = random.uniform(len(labels)).to(real)
        with torch.no_grad():
            made = generator(latent, labels) if len(labels) else real
        return real, made, labels, between

    def discriminator_losses(self, discriminator: nn.Module, *inputs: Tensor) -> Tensor:
        real, made, labels, between = inputs
        mixed = real + between[:, None, None, None] * (made - real)
        slopes = torch.func.grad(lambda images: discriminator(images, labels).sum())(mixed)
        penalty = (slopes.flatten(1).square().sum(1).add(1e-12).sqrt() - 1).square()
        return discriminator(made, labels) - discriminator(real, labels) + PENALTY * penalty

    def fake_loss(self, answers: Tensor, labels_N: Tensor) -> Tensor:
        return -answers.mean()


RECIPE = WGANGP
