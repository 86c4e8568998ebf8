"""The first GAN (Goodfellow et al. 2014): two multilayer perceptrons. A baseline, and the smallest recipe to read."""

from __future__ import annotations

from torch import Tensor, nn

from fedmedgan.client.gans.recipe import Synthesis
from fedmedgan.shared.study import Gan, Images

UNITS = 8
"""Units of a hidden layer for each of the study's channels."""


class Generator(nn.Module):
    """latent (N, Z) -> images (N, 1, S, S) in [-1, 1]; labels are not looked at."""

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        self.side, units = images.size, UNITS * gan.generator_width
        self.layers = nn.Sequential(
            *(nn.Linear(gan.latent, units), nn.LeakyReLU(0.2)),
            *(nn.Linear(units, 2 * units), nn.LeakyReLU(0.2)),
            *(nn.Linear(2 * units, images.size**2), nn.Tanh()),
        )

    def forward(self, latent_NZ: Tensor, labels_N: Tensor) -> Tensor:
        return self.layers(latent_NZ).view(-1, 1, self.side, self.side)


class Discriminator(nn.Module):
    """images (N, 1, S, S) -> logits (N,); labels are not looked at."""

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        units = UNITS * gan.discriminator_width
        self.layers = nn.Sequential(
            *(nn.Linear(images.size**2, units), nn.LeakyReLU(0.2)),
            *(nn.Linear(units, units), nn.LeakyReLU(0.2)),
            nn.Linear(units, 1),
        )

    def forward(self, images_N1SS: Tensor, labels_N: Tensor) -> Tensor:
        return self.layers(images_N1SS.flatten(1)).squeeze(1)


class Vanilla(Synthesis):
    """The losses of Goodfellow et al. 2014, which are the default."""

    record = "an image"
    conditional = False
    ignores = ("gan.norm", "gan.generator_norm", "gan.attention", "gan.weight_norm", "gan.minibatch_stddev")

    def build(self) -> tuple[Generator, Discriminator]:
        return Generator(self.images, self.gan), Discriminator(self.images, self.gan)


RECIPE = Vanilla
