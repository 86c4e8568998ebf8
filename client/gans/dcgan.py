"""DCGAN: noise in, an image out (Radford, Metz, Chintala 2015).

Transposed convolutions in the generator as in the paper. The paper's BatchNorm is a setting: in the generator it is
safe, in the discriminator it would mix patients (`gan.norm`, `gan.generator_norm`).
"""

from __future__ import annotations

from torch import Tensor, nn

from fedmedgan.client.gans.parts.layers import downward, upward
from fedmedgan.client.gans.recipe import Synthesis
from fedmedgan.shared.study import Gan, Images


class Generator(nn.Module):
    """latent (N, Z) float -> images (N, 1, S, S) in [-1, 1]; labels are not looked at."""

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        self.upsample, self.coarse, self.base = upward(images, gan, transposed=True)
        self.project = nn.Linear(gan.latent, self.coarse * self.base**2)

    def forward(self, latent_NZ: Tensor, labels_N: Tensor) -> Tensor:
        return self.upsample(self.project(latent_NZ).view(-1, self.coarse, self.base, self.base))


class Discriminator(nn.Module):
    """images (N, 1, S, S) -> logits (N,); labels are not looked at."""

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        self.features, channels, base = downward(images, gan)
        self.head = nn.Conv2d(channels, 1, base)

    def forward(self, images_N1SS: Tensor, labels_N: Tensor) -> Tensor:
        return self.head(self.features(images_N1SS)).flatten()


class DCGAN(Synthesis):
    """The losses of Goodfellow et al. 2014, which are the default."""

    record = "an image"
    conditional = False

    def build(self) -> tuple[Generator, Discriminator]:
        return Generator(self.images, self.gan), Discriminator(self.images, self.gan)


RECIPE = DCGAN
