"""Layers that several recipes share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fedmedgan.shared.study import Gan, Images

MAX_WIDTH_FACTOR = 8
ATTENTION_GRID = 8
"""Attention acts where a grid has at most this many cells a side; its cost grows with the fourth power."""


def pyramid(images: Images, width: int) -> tuple[int, list[int]]:
    """Side of the coarsest grid, and channels from fine to coarse, one for each halving."""
    base = 7 if images.size == 28 else 4
    halvings = (images.size // base).bit_length() - 1
    return base, [width * min(2**i, MAX_WIDTH_FACTOR) for i in range(halvings)]


def norm(kind: str, channels: int) -> nn.Module:
    """Normalisation of a study: "group", "instance", "batch" or "none".

    Batch statistics are those of the batch at hand, also when images are generated: there is no running average that
    sites would have to share. For a generator of fakes that is safe; in a discriminator it mixes patients.
    """
    if kind == "group":
        return nn.GroupNorm(min(8, channels), channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    return nn.Identity()


class SelfAttention(nn.Module):
    """Self-attention over the cells of a grid (SAGAN, Zhang et al. 2019); starts as the identity. Row by row.

    In place of a gain that starts at zero, a 1 x 1 convolution that does: its gradient is found like any other layer's.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        if self.out.bias is not None:
            nn.init.zeros_(self.out.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        query_NIL, key_NIL = self.query(x_NCHW).flatten(2), self.key(x_NCHW).flatten(2)
        weights_NLL = torch.softmax(query_NIL.transpose(1, 2) @ key_NIL / query_NIL.shape[1] ** 0.5, dim=-1)
        mixed_NCL = self.value(x_NCHW).flatten(2) @ weights_NLL.transpose(1, 2)
        return x_NCHW + self.out(mixed_NCL.view_as(x_NCHW))


class MinibatchStddev(nn.Module):
    """Adds a channel with the standard deviation over the batch (Karras et al. 2018): mixes rows."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        spread = x_NCHW.std(0, correction=0).mean().expand(len(x_NCHW), 1, *x_NCHW.shape[2:])
        return torch.cat([x_NCHW, spread], dim=1)


def downward(images: Images, gan: Gan) -> tuple[nn.Sequential, int, int]:
    """A discriminator's trunk: halves the grid until it is coarse. Returns it, its channels, and the grid's side."""
    base, channels = pyramid(images, gan.discriminator_width)
    blocks: list[nn.Module] = [nn.Conv2d(1, channels[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    side, wide = images.size // 2, channels[0]
    placed = False
    for narrow, wide in pairwise(channels):
        blocks += [nn.Conv2d(narrow, wide, 4, 2, 1), norm(gan.norm, wide), nn.LeakyReLU(0.2)]
        side //= 2
        if gan.attention and not placed and side <= ATTENTION_GRID:
            blocks, placed = [*blocks, SelfAttention(wide)], True
    if gan.minibatch_stddev:
        blocks, wide = [*blocks, MinibatchStddev()], wide + 1
    trunk = nn.Sequential(*blocks)
    if gan.weight_norm:
        for layer in trunk:
            if isinstance(layer, nn.Conv2d):
                parametrizations.weight_norm(layer)
    return trunk, wide, base


def upward(images: Images, gan: Gan, transposed: bool = False) -> tuple[nn.Sequential, int, int]:
    """A generator's trunk: from a coarse grid to an image in [-1, 1]. Returns it, its input channels, and the side.

    Args:
        transposed: with transposed convolutions as in DCGAN; else each grid is interpolated and convolved, which leaves
            no checkerboard (Odena et al. 2016). Bilinear: where pixels are merely copied, a discriminator under noise
            leaves a grain of their size in every image. The finest grid has a layer of its own, without which edges are
            as blurred as the interpolation.
    """
    base, channels = pyramid(images, gan.generator_width)
    blocks: list[nn.Module] = [norm(gan.generator_norm, channels[-1]), nn.LeakyReLU(0.2)]
    side, placed = base, False
    finest = 1 if transposed else channels[0]
    for wide, narrow in pairwise([*channels[::-1], finest]):
        if gan.attention and not placed and 2 * side > ATTENTION_GRID:
            blocks, placed = [*blocks, SelfAttention(wide)], True
        if transposed:
            blocks.append(nn.ConvTranspose2d(wide, narrow, 4, 2, 1))
        else:
            blocks += [nn.Upsample(scale_factor=2, mode="bilinear"), *_smooth(wide, narrow)]
        if narrow > 1:
            blocks += [norm(gan.generator_norm, narrow), nn.LeakyReLU(0.2)]
        side *= 2
    if not transposed:
        blocks += _smooth(finest, 1)
    blocks.append(nn.Tanh())
    return nn.Sequential(*blocks), channels[-1], base


def _smooth(wide: int, narrow: int) -> nn.Sequential:
    """3 x 3. Beyond the edge the image goes on as it is: with zeros there, interpolated images get a bright frame.

    A layer of its own pads: per-patient gradients of a generator with a padding mode cannot be found.
    """
    return nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(wide, narrow, 3))
