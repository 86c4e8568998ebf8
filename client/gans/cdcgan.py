"""Conditional DCGAN: noise and a label in, an image out.

Radford et al. 2015 (DCGAN), Mirza & Osindero 2014 (conditional). The label enters the discriminator through
class-specific output heads (one logit a class, the label picks one), which under DP-SGD learns far better than a label
map at the input; and the generator doubles its grid by interpolating and convolving (Odena et al. 2016) instead of
transposed convolutions, whose checkerboards a discriminator under noise never learns to see.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.client.gans.parts.layers import downward, upward
from fedmedgan.client.gans.recipe import Synthesis
from fedmedgan.shared.study import Gan, Images


class Generator(nn.Module):
    """latent (N, Z) float and labels (N,) int64 -> images (N, 1, S, S) in [-1, 1]."""

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        self.upsample, self.coarse, self.base = upward(images, gan)
        self.classes = len(images.classes)
        self.project = nn.Linear(gan.latent + self.classes, self.coarse * self.base**2)

    def forward(self, latent_NZ: Tensor, labels_N: Tensor) -> Tensor:
        one_hot = functional.one_hot(labels_N, self.classes).to(latent_NZ.dtype)
        coarse = self.project(torch.cat([latent_NZ, one_hot], dim=1))
        return self.upsample(coarse.view(-1, self.coarse, self.base, self.base))


class Discriminator(nn.Module):
    """images (N, 1, S, S) and labels (N,) int64 -> logits (N,): is this a real image of that class?"""

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        self.features, channels, base = downward(images, gan)
        self.heads = nn.Conv2d(channels, len(images.classes), base)

    def forward(self, images_N1SS: Tensor, labels_N: Tensor) -> Tensor:
        logits_NC = self.heads(self.features(images_N1SS)).flatten(1)
        return logits_NC.gather(1, labels_N[:, None]).squeeze(1)


class ConditionalDCGAN(Synthesis):
    """The losses of Goodfellow et al. 2014, which are the default."""

    def build(self) -> tuple[Generator, Discriminator]:
        return Generator(self.images, self.gan), Discriminator(self.images, self.gan)


RECIPE = ConditionalDCGAN
