"""How good the images of a comparison arm are, in the words and under the public rule of `client.release.evaluate`.

noise to image         FID, KID, precision, recall, density, coverage; MS-SSIM and near-duplicates
image to its target    PSNR, SSIM, MAE, and of masks Dice and IoU              `client.release.translations`
domain to domain       KID and MMD to images of the other domain, before and after translation    the same

All but MS-SSIM and near-duplicates are against held-out images, of patients whom no hospital has.

FID and KID need features. Their extractor is trained once a report, on phantoms drawn for it and for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from fedmedgan.client.gans.recipe import Recipe
from fedmedgan.client.release import translations
from fedmedgan.client.release.evaluate import Rule, evaluate
from fedmedgan.client.release.features import LARGEST_SIDE, FeatureExtractor, train_extractor
from fedmedgan.simulations import phantoms

OF_SETS = ("ms_ssim", "duplicates", "fid", "kid", "precision_recall", "density_coverage")
PHANTOMS, STEPS, SEED = 1000, 150, 30_000
"""What the extractor learns from, for how long: ten seconds of one core at 64 pixels. Nobody else draws from SEED."""


def extractor(size: int) -> FeatureExtractor:
    """The declared extractor of a report on images of `size` pixels: on one machine always the same weights."""
    rng, side = np.random.default_rng(SEED), min(size, LARGEST_SIDE)
    labels = np.arange(PHANTOMS) % len(phantoms.CLASSES)
    images = phantoms.radiographs(phantoms.draw_anatomy(rng, PHANTOMS), labels, side, rng)
    trained_on = f"{PHANTOMS} phantoms drawn for it, at {side} pixels"
    return train_extractor(images[:, None] * 2 - 1, labels, trained_on=trained_on, steps=STEPS)


def of_images(
    features: FeatureExtractor,
    images: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    whose: str,
    *,
    are_real: bool = False,
) -> dict[str, Any]:
    """`Evaluation.record` of images against held-out ones.

    Args:
        whose: whom the held-out images show, in words.
        are_real: the images are the hospitals' own and not made of noise: what no generator can be expected to beat.
    """
    found = evaluate(
        images,
        labels,
        rule=Rule.PUBLIC,
        real=held_out,
        real_data=whose,
        extractor=features,
        metrics=OF_SETS,
        made_from_patients=are_real,
    )
    return found.record()


def of_pairs(
    recipe: Recipe, generator: nn.Module, images: np.ndarray, labels: np.ndarray, targets: np.ndarray, whose: str
) -> dict[str, float | int]:
    """Means over held-out images of what the generator makes of them, beside the inputs as they are."""
    found = translations.of_pairs(recipe, generator, images, labels, targets, rule=Rule.PUBLIC, whose=whose)
    given = {f"{name}_input": number for name, number in found.given.numbers().items()}
    return {**found.made.numbers(), **given, "tested_on": len(labels)}


def of_translation(
    features: FeatureExtractor,
    generator: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    domains: Sequence[str],
    whose: str,
) -> list[dict[str, Any]]:
    """Held-out images of each domain, as they are and brought to the other one, beside the other's own, as sets."""
    found = translations.of_translation(features, generator, images, labels, rule=Rule.PUBLIC, whose=whose)
    return [
        {
            "source": domains[way.source],
            "target": domains[way.target],
            "before": way.before.record(),
            "after": way.after.record(),
        }
        for way in found
    ]
