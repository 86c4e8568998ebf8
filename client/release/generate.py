"""Images from a trained generator."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedmedgan.shared.study import Study

BATCH = 256


@torch.no_grad()
def generate(generator: nn.Module, study: Study, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` synthetic images, classes in equal shares.

    Returns:
        images float32 (count, 1, S, S) in [-1, 1], and labels int64 (count,).
    """
    source = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(study.images.classes)
    latent = torch.randn(count, study.gan.latent, generator=source)
    generator = generator.cpu().eval()
    images = [generator(z, y) for z, y in zip(latent.split(BATCH), labels.split(BATCH), strict=True)]
    return torch.cat(images).numpy(), labels.numpy()
