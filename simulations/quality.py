"""How good the images of a comparison arm are, in the words and under the public rule of `client.release.evaluate`.

noise to image         FID, KID, precision, recall, density, coverage; MS-SSIM and near-duplicates
image to its target    PSNR, SSIM, MAE, and of masks Dice and IoU
domain to domain       KID and MMD to images of the other domain, before and after translation

All but MS-SSIM and near-duplicates are against held-out images, of patients whom no hospital has.

FID and KID need features. Their extractor is trained once a report, on phantoms drawn for it and for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmedgan.client.gans.pix2pix import Pix2Pix
from fedmedgan.client.gans.recipe import Records
from fedmedgan.client.release.evaluate import Rule, evaluate
from fedmedgan.client.release.features import LARGEST_SIDE, FeatureExtractor, train_extractor
from fedmedgan.client.training.randomness import InsecureRandom
from fedmedgan.simulations import phantoms

OF_SETS = ("ms_ssim", "duplicates", "fid", "kid", "precision_recall", "density_coverage")
OF_TRANSLATION = ("kid", "mmd")
PHANTOMS, STEPS, SEED = 1000, 150, 30_000
"""What the extractor learns from, for how long: ten seconds of one core at 64 pixels. Nobody else draws from SEED."""
WHITE = 0.99
ROWS_AT_ONCE = 64


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
    recipe: Pix2Pix, generator: nn.Module, images: np.ndarray, labels: np.ndarray, targets: np.ndarray, whose: str
) -> dict[str, float | int]:
    """Means over held-out images of what the generator makes of them, beside the inputs as they are."""
    records = Records(*(torch.from_numpy(a) for a in (images, labels, targets)))
    given, wanted = recipe.input_and_output(records, InsecureRandom(0))
    with torch.no_grad():
        made = torch.cat([generator(part) for part in given.split(ROWS_AT_ONCE)]).clamp(-1, 1)

    def scores(outputs: Tensor) -> dict[str, float]:
        masks = (outputs > 0, wanted > 0) if are_masks(wanted) else None
        return evaluate(rule=Rule.PUBLIC, paired=(outputs, wanted), masks=masks, real_data=whose).numbers()

    return {**scores(made), **{f"{name}_input": n for name, n in scores(given).items()}, "tested_on": len(labels)}


def are_masks(targets_N1HW: Tensor) -> bool:
    """Whether targets are masks: of what is not black, a fifth or more is white.

    A mask that was scaled has grey edges (`client.data.targets`), so two values are too much to ask for. Another
    modality has hardly a pixel at the white end.
    """
    white, grey = targets_N1HW > WHITE, targets_N1HW.abs() <= WHITE
    return int(white.sum()) > int(grey.sum()) / 4


def of_translation(
    features: FeatureExtractor,
    generator: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    domains: Sequence[str],
    whose: str,
) -> list[dict[str, Any]]:
    """Held-out images of each domain, as they are and brought to the other one, beside the other's own, as sets."""
    found = []
    for source, target in ((0, 1), (1, 0)):
        ours, others = (torch.from_numpy(images[labels == domain]) for domain in (source, target))
        with torch.no_grad():
            parts = [generator(part, torch.full((len(part),), target)) for part in ours.split(ROWS_AT_ONCE)]
        before, after = (
            evaluate(
                one_side,
                rule=Rule.PUBLIC,
                real=others,
                real_data=whose,
                extractor=features,
                metrics=OF_TRANSLATION,
                made_from_patients=True,
            ).record()
            for one_side in (ours, torch.cat(parts).clamp(-1, 1))
        )
        found.append({"source": domains[source], "target": domains[target], "before": before, "after": after})
    return found
