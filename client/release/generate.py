"""Images from a trained generator of a synthesis recipe."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.gans.recipe import Synthesis
from fedmedgan.shared.errors import StudyError
from fedmedgan.shared.study import Study

BATCH = 256
"""Images that are made together. A generator with BatchNorm sees its batch: it is always of this size, and holds the
classes in turn, so an image does not depend on how many were asked for."""


@torch.no_grad()
def generate(generator: nn.Module, study: Study, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` synthetic images, classes in equal shares.

    Returns:
        images float32 (count, 1, S, S) in [-1, 1], and labels int64 (count,).

    Raises:
        StudyError: CONFIG_RANGE, the recipe makes images of images.
    """
    if not isinstance(recipes.load(study), Synthesis):
        what, hint = "the recipe makes images of images, not of noise", "give a study of a synthesis recipe"
        raise StudyError("CONFIG_RANGE", what, f"gan.recipe: {study.gan.recipe}", hint=hint)
    source, made = torch.Generator().manual_seed(seed), -(-count // BATCH) * BATCH
    labels = torch.arange(made) % len(study.images.classes)
    latent = torch.randn(made, study.gan.latent, generator=source)
    generator = generator.cpu().eval()
    images = [generator(z, y) for z, y in zip(latent.split(BATCH), labels.split(BATCH), strict=True)]
    return torch.cat(images)[:count].numpy(), labels[:count].numpy()
