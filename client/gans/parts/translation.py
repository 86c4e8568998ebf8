"""Image in, image out: what pix2pix and cyclegan share. Both networks see patients, so steps of both are charged."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.client.gans.parts.layers import norm
from fedmedgan.client.gans.recipe import Fakes, Recipe, Records
from fedmedgan.client.training.randomness import InsecureRandom, RandomSource
from fedmedgan.shared.study import Gan, Images

COARSEST = 7
"""Grids are halved while at least this many cells a side are left."""
LOW_DOSE_NOISE = 0.3
"""Standard deviation of the noise of a simulated low dose at white, in units of the range [-1, 1]."""
KEPT_LINES = 0.3
"""Share of the lines of k-space that an undersampled acquisition keeps; the middle tenth always."""


class UNet(nn.Module):
    """images (N, 1, S, S) -> images (N, 1, S, S): what is to be added to the input (Ronneberger et al. 2015).

    The last layer starts near zero, so an untrained network is near the identity.
    """

    def __init__(self, images: Images, gan: Gan) -> None:
        super().__init__()
        depth = 0
        while images.size // 2 ** (depth + 1) >= COARSEST and depth < 4:
            depth += 1
        widths = [min(gan.generator_width * 2**i, 8 * gan.generator_width) for i in range(depth + 1)]
        self.first = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1), nn.LeakyReLU(0.2))
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), norm(gan.generator_norm, b), nn.LeakyReLU(0.2))
            for a, b in pairwise(widths)
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(b, a, 4, 2, 1), norm(gan.generator_norm, a), nn.LeakyReLU(0.2))
            for a, b in reversed(list(pairwise(widths)))
        )
        self.join = nn.ModuleList(nn.Conv2d(2 * a, a, 3, 1, 1) for a in reversed(widths[:-1]))
        self.last = nn.Conv2d(widths[0], 1, 3, 1, 1)
        with torch.no_grad():
            self.last.weight.mul_(0.1)

    def forward(self, images_N1SS: Tensor) -> Tensor:
        grids = [self.first(images_N1SS)]
        for down in self.down:
            grids.append(down(grids[-1]))
        x = grids.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = functional.leaky_relu(join(torch.cat([up(x), grids.pop()], dim=1)), 0.2)
        return images_N1SS + self.last(x)


class PatchDiscriminator(nn.Module):
    """images (N, channels, S, S) -> logits (N, patches): is each patch real? (Isola et al. 2017)"""

    def __init__(self, channels: int, gan: Gan) -> None:
        super().__init__()
        width = gan.discriminator_width
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(width, 2 * width, 4, 2, 1), norm(gan.norm, 2 * width), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(2 * width, 4 * width, 3, 1, 1), norm(gan.norm, 4 * width), nn.LeakyReLU(0.2)),
            nn.Conv2d(4 * width, 1, 3, 1, 1),
        )

    def forward(self, images_NCSS: Tensor) -> Tensor:
        return self.layers(images_NCSS).flatten(1)


def adversarial(logits_NP: Tensor, real: bool) -> Tensor:
    """Binary cross-entropy of each row (N,), the mean over its patches."""
    return functional.softplus(-logits_NP if real else logits_NP).mean(1)


class Translation(Recipe):
    """Both networks read patients; a record's terms, real and generated, are clipped together."""

    private = "both"
    fake_rows = False
    ignores = (
        *("training.views", "training.real_label"),
        *("gan.latent", "gan.attention", "gan.weight_norm", "gan.minibatch_stddev"),
    )

    def public_images(self, count: int, seed: int) -> Tensor:
        """(count, 1, S, S): drawn ellipses, for pictures and losses that read no patient."""
        random, size = torch.Generator().manual_seed(seed), self.images.size
        axis = torch.linspace(-1, 1, size)
        images = torch.full((count, 1, size, size), -0.9)
        for image in images:
            for _ in range(5):
                cy, cx, ry, rx, angle, grey = torch.rand(6, generator=random).tolist()
                y, x = axis[:, None] - (cy - 0.5), axis[None, :] - (cx - 0.5)
                u = x * math.cos(3 * angle) + y * math.sin(3 * angle)
                v = y * math.cos(3 * angle) - x * math.sin(3 * angle)
                inside = (u / (0.15 + 0.5 * rx)) ** 2 + (v / (0.15 + 0.5 * ry)) ** 2 < 1
                image[0] = torch.where(inside, image[0] + 0.2 + 0.6 * grey, image[0])
        return functional.avg_pool2d(functional.pad(images.clamp(-1, 1), (1, 1, 1, 1), mode="replicate"), 3, 1)

    def public_records(self, count: int, seed: int) -> Records:
        """Drawn images; the target of a paired task is the image's bright part."""
        images = self.public_images(count, seed)
        labels = torch.arange(count) % len(self.images.classes)
        return Records(images, labels, torch.where(images > 0, 1.0, -1.0) if self.images.paired else images)

    def public_loss(self, generator: nn.Module, discriminator: nn.Module, fakes: Fakes) -> Tensor:
        device = next(generator.parameters()).device
        records = self.public_records(8, self.gan.init_seed).to(device)
        inputs = self.generator_inputs(records, InsecureRandom(self.gan.init_seed))
        return self.generator_losses(generator, discriminator, *inputs).mean()


def degraded(task: str, images_N1SS: Tensor, random: RandomSource) -> Tensor:
    """What the generator gets, made from the image that it is to give back. Each row of itself alone.

    ====================  ================================================================================
    task                  input
    ====================  ================================================================================
    denoise               simulated low dose: noise whose variance grows with brightness, like counts of photons
    super-resolution-2    mean of 2 x 2 pixels, brought to size by bicubic interpolation; super-resolution-4: of 4 x 4
    k-space               lines of k-space are left out at random, the rest transformed back: magnitude
    ====================  ================================================================================
    """
    if task == "denoise":
        noise = random.normal(images_N1SS.shape, 1.0).to(images_N1SS)
        return (images_N1SS + LOW_DOSE_NOISE * (0.1 + 0.9 * (images_N1SS + 1) / 2).sqrt() * noise).clamp(-1, 1)
    if task.startswith("super-resolution"):
        factor = int(task[-1])
        small = functional.avg_pool2d(images_N1SS, factor)
        return functional.interpolate(small, scale_factor=factor, mode="bicubic").clamp(-1, 1)
    lines = images_N1SS.shape[-1]
    chance = random.uniform(len(images_N1SS) * lines).view(-1, 1, lines, 1)
    middle = (torch.arange(lines) - lines // 2).abs() <= lines // 20
    kept = ((chance < KEPT_LINES) | middle[:, None]).to(images_N1SS.device)
    k_space = torch.fft.fftshift(torch.fft.fft2((images_N1SS + 1) / 2), dim=(-2, -1))
    return torch.fft.ifft2(torch.fft.ifftshift(k_space * kept, dim=(-2, -1))).abs().clamp(0, 1) * 2 - 1
