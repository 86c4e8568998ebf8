"""Images compared one with one: PSNR, SSIM and MAE of pairs, Dice and IoU of masks, MS-SSIM for diversity.

All of it is torchmetrics; here is only what images are handed to it, and which settings hold for small images.
Images go in as [-1, 1] and are compared as [0, 1], because the luminance term of SSIM knows no negative values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.functional.segmentation import dice_score, mean_iou

from fedmedgan.client.release.images import NotMeasurable, as_array, as_images, as_labels, at_least
from fedmedgan.shared.errors import DataError

HIGHEST_PSNR = 100.0
"""dB. Of identical images, whose ratio would be infinite."""
PAIRS = 1000
"""Pairs of images drawn for the diversity."""
ROWS_AT_ONCE = 128
MOST_CLASSES = 256

Floats = NDArray[np.float64]


def psnr(outputs_N1HW: Any, targets_N1HW: Any) -> Floats:
    """Peak signal-to-noise ratio of each pair in dB, for a range of values of 1; at most HIGHEST_PSNR.

    Raises:
        DataError: DATA_EVALUATION, like `as_images`; or the two sides differ in shape.
    """
    outputs, targets = _pairs(outputs_N1HW, targets_N1HW)
    found = peak_signal_noise_ratio(outputs, targets, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return found.clamp(max=HIGHEST_PSNR).double().numpy()


def mae(outputs_N1HW: Any, targets_N1HW: Any) -> Floats:
    """Mean absolute error of each pair, as a part of the range of values. Raises like `psnr`."""
    outputs, targets = _pairs(outputs_N1HW, targets_N1HW)
    return (outputs - targets).abs().mean(dim=(1, 2, 3)).double().numpy()


def ssim(outputs_N1HW: Any, targets_N1HW: Any) -> Floats:
    """Structural similarity of each pair: Gaussian window of deviation 1.5 and 11 pixels, range of values 1.

    In float32, whose rounding is up to 1e-3 of the value where both images are even.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004. Raises like `psnr`.
    """
    outputs, targets = _pairs(outputs_N1HW, targets_N1HW)
    parts = [
        torch.as_tensor(structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")).reshape(-1)
        for one, other in zip(outputs.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts).double().numpy()


def ms_ssim(first_N1HW: Any, second_N1HW: Any) -> Floats:
    """Multi-scale structural similarity of each pair; fewer scales for small images.

    =====================  =======================================  ====================
    shorter side           weights of the scales                    Gaussian deviation
    =====================  =======================================  ====================
    161 pixels and more    .0448 .2856 .3001 .2363 .1333 (source)   1.5
    48 to 160              .4 .3 .3                                 1.5
    16 to 47               .5 .5                                    1.0
    below 16               NotMeasurable
    =====================  =======================================  ====================

    So numbers of images of different size cannot be compared. Negative terms count as 0.

    Source: Wang, Simoncelli, Bovik 2003. Raises like `psnr`.
    """
    first, second = _pairs(first_N1HW, second_N1HW)
    weights, deviation = _scales(min(first.shape[2:]))
    parts = [
        multiscale_structural_similarity_index_measure(
            one, other, data_range=1.0, betas=weights, sigma=deviation, kernel_size=7, reduction="none"
        ).reshape(-1)
        for one, other in zip(first.split(ROWS_AT_ONCE), second.split(ROWS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts).double().numpy()


def diversity(images_N1HW: Any, labels: Any, *, seed: int = 0) -> float:
    """Mean MS-SSIM of up to PAIRS random pairs of the same class: 1 where a class is one image over and over.

    Pairs of one class, because two classes differ also where each of them has collapsed. Compare it with the same
    number of real public images; how alike real images are depends on the kind of image.

    Raises:
        NotMeasurable: DATA_EVALUATION, no class has two images, or images below 16 pixels.
        DataError: DATA_EVALUATION, like `as_images` and `as_labels`.

    Source: Odena, Olah, Shlens 2017 (arXiv 1610.09585), section 4.2.
    """
    images = as_images(images_N1HW, "synthetic")
    label_N = as_labels(labels, len(images), "synthetic")
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(label_N, return_counts=True)
    classes = classes[counts > 1]
    if not len(classes):
        raise NotMeasurable("the diversity needs two images of a class")
    first, second = [], []
    for label in classes:
        rows = np.flatnonzero(label_N == label)
        one = generator.integers(len(rows), size=-(-PAIRS // len(classes)))
        other = (one + generator.integers(1, len(rows), size=len(one))) % len(rows)  # never the image itself
        first.append(rows[one])
        second.append(rows[other])
    return float(ms_ssim(images[np.concatenate(first)], images[np.concatenate(second)]).mean())


def dice_and_iou(predicted_N1HW: Any, true_N1HW: Any) -> dict[str, float]:
    """Overlap of masks: ``dice`` and ``iou``, each a mean over images for each class, then over classes.

    Args:
        predicted_N1HW, true_N1HW: class of each pixel, whole numbers or booleans; 0 is the background and not counted.

    ==========================================  ==================================
    case                                        result
    ==========================================  ==================================
    a class is in neither mask of an image      the image is left out for the class
    a class is in one of the two masks only     0
    a class is in no mask at all                left out
    no mask holds anything                      NotMeasurable
    ==========================================  ==================================

    Raises:
        DataError: DATA_EVALUATION, shapes, or values that are not whole numbers from 0.
    """
    predicted, true = _masks(predicted_N1HW, true_N1HW)
    classes = int(max(predicted.max(), true.max())) + 1
    if classes < 2:
        raise NotMeasurable("no mask holds anything")
    dice_NK = dice_score(predicted, true, classes, include_background=False, average="none", input_format="index")
    iou_NK = mean_iou(predicted, true, classes, include_background=False, per_class=True, input_format="index")
    iou_NK = torch.where(iou_NK < 0, torch.nan, iou_NK)  # torchmetrics writes -1 for a class in neither mask
    return {"dice": _mean_over_classes(dice_NK), "iou": _mean_over_classes(iou_NK)}


def _mean_over_classes(score_NK: Tensor) -> float:
    return float(score_NK.reshape(len(score_NK), -1).double().nanmean(dim=0).nanmean())


def _scales(side: int) -> tuple[tuple[float, ...], float]:
    if side >= 161:
        return (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), 1.5
    if side >= 48:
        return (0.4, 0.3, 0.3), 1.5
    if side >= 16:
        return (0.5, 0.5), 1.0
    raise NotMeasurable("MS-SSIM needs images of at least 16 pixels")


def _pairs(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Both sides in [0, 1]."""
    one, other = as_images(first, "first"), as_images(second, "second")
    if one.shape != other.shape:
        raise DataError("DATA_EVALUATION", "images to compare pair by pair differ in number or size")
    at_least(len(one), 1, "a comparison")
    return (one.clamp(-1, 1) + 1) / 2, (other.clamp(-1, 1) + 1) / 2


def _masks(predicted: Any, true: Any) -> tuple[Tensor, Tensor]:
    pair = []
    for mask_N1HW in (as_array(predicted), as_array(true)):
        if mask_N1HW.ndim != 4 or mask_N1HW.shape[1] != 1 or not mask_N1HW.size:
            raise DataError("DATA_EVALUATION", f"masks have shape {mask_N1HW.shape}, not (N, 1, H, W)")
        if mask_N1HW.dtype.kind not in "biu" or not 0 <= mask_N1HW.min() <= mask_N1HW.max() < MOST_CLASSES:
            raise DataError("DATA_EVALUATION", f"masks hold other values than whole numbers 0..{MOST_CLASSES - 1}")
        pair.append(torch.from_numpy(mask_N1HW[:, 0].astype(np.int64)))
    if pair[0].shape != pair[1].shape:
        raise DataError("DATA_EVALUATION", "masks to compare pair by pair differ in number or size")
    return pair[0], pair[1]
