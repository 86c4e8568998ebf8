"""Conditional DCGAN: noise and a label in, an image out.

Radford et al. 2015 (DCGAN), Mirza & Osindero 2014 (conditional). Three choices serve privacy: no BatchNorm anywhere (in
the discriminator it would mix patients); the label enters the discriminator through class-specific output heads (one
logit a class, the label picks one), which under DP-SGD learns far better than a label map at the input; and the
generator doubles its grid by copying and convolving (Odena et al. 2016) instead of transposed convolutions, whose
checkerboards a discriminator under noise never learns to see.

Only the discriminator sees private images. A private record is one patient's image with its label.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.shared.study import Gan, Images

MAX_WIDTH_FACTOR = 8


def _shape(images: Images, width: int) -> tuple[int, list[int]]:
    """Side of the coarsest grid, and channels from fine to coarse."""
    base = 7 if images.size == 28 else 4
    halvings = (images.size // base).bit_length() - 1
    return base, [width * min(2**i, MAX_WIDTH_FACTOR) for i in range(halvings)]


def _norm(gan: Gan, channels: int) -> nn.Module:
    return nn.GroupNorm(min(8, channels), channels) if gan.norm == "group" else nn.Identity()


class Generator(nn.Module):
    """latent (N, Z) float and labels (N,) int64 -> images (N, 1, S, S) in [-1, 1]."""

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        self.base, channels = _shape(images, gan.generator_width)
        self.classes, self.coarse = len(images.classes), channels[-1]
        self.project = nn.Linear(gan.latent + self.classes, self.coarse * self.base**2)
        blocks: list[nn.Module] = [_norm(gan, self.coarse), nn.LeakyReLU(0.2)]
        for wide, narrow in pairwise(channels[::-1]):
            blocks += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, 1, 1), _norm(gan, narrow)]
            blocks += [nn.LeakyReLU(0.2)]
        blocks += [nn.Upsample(scale_factor=2), nn.Conv2d(channels[0], 1, 3, 1, 1), nn.Tanh()]
        self.upsample = nn.Sequential(*blocks)

    def forward(self, latent_NZ: Tensor, labels_N: Tensor) -> Tensor:
        one_hot = functional.one_hot(labels_N, self.classes).to(latent_NZ.dtype)
        coarse = self.project(torch.cat([latent_NZ, one_hot], dim=1))
        return self.upsample(coarse.view(-1, self.coarse, self.base, self.base))


class Discriminator(nn.Module):
    """images (N, 1, S, S) and labels (N,) int64 -> logits (N,): is this a real image of that class?"""

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        base, channels = _shape(images, gan.discriminator_width)
        blocks: list[nn.Module] = [nn.Conv2d(1, channels[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for narrow, wide in pairwise(channels):
            blocks += [nn.Conv2d(narrow, wide, 4, 2, 1), _norm(gan, wide), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*blocks)
        self.heads = nn.Conv2d(channels[-1], len(images.classes), base)

    def forward(self, images_N1SS: Tensor, labels_N: Tensor) -> Tensor:
        logits_NC = self.heads(self.features(images_N1SS)).flatten(1)
        return logits_NC.gather(1, labels_N[:, None]).squeeze(1)


def build(images: Images, gan: Gan) -> tuple[Generator, Discriminator]:
    """Both networks with the study's initial weights: equal at every site, whatever the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(gan.init_seed)
        return Generator(images, gan), Discriminator(images, gan)


def discriminator_losses(logits_N: Tensor, is_real_N: Tensor) -> Tensor:
    """Loss of each row by itself (N,): binary cross-entropy (Goodfellow et al. 2014)."""
    return functional.binary_cross_entropy_with_logits(logits_N, is_real_N, reduction="none")


def generator_loss(fake_logits_N: Tensor) -> Tensor:
    """Non-saturating loss (Goodfellow et al. 2014), a scalar: generated images only."""
    return functional.softplus(-fake_logits_N).mean()
