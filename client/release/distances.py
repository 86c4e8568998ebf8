"""How far are synthetic images from real ones, as sets: FID, KID and MMD.

FID and KID are those of torchmetrics, on features of a declared extractor (`features`); MMD with an RBF kernel is
written here, for it has none. Both sides are exchangeable, so arguments are called first and second.

Against real patients these numbers are covered by no epsilon: docs/evaluation.md.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fedmedgan.client.release.images import as_images, at_least
from fedmedgan.shared.errors import DataError

FEWEST = 20
"""Images on each side, for KID and MMD."""
KID_SUBSETS = 50
KID_SUBSET_SIZE = 500
MMD_SIDE = 32
"""Images are averaged down to this many pixels a side before MMD."""
MMD_MOST = 1000
"""Images on each side; of more, this many are drawn."""


def frechet_distance(first_NF: Tensor, second_MF: Tensor) -> float:
    """FID: squared Frechet distance of two normal distributions fitted to features; 0 for equal ones.

    Biased upwards, the more so the fewer images: compare only numbers of the same N and M, never with those that
    others publish, which are of other features.

    Args:
        first_NF, second_MF: features, one row an image.

    Raises:
        NotMeasurable: DATA_EVALUATION, no more images than features on a side: the covariance would be singular.
        DataError: DATA_EVALUATION, different features on the two sides, or not finite.

    Source: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter 2017 (arXiv 1706.08500).
    """
    features = _checked(first_NF, second_MF)
    for side in (first_NF, second_MF):
        at_least(len(side), features + 1, f"FID of {features} features")
    metric = FrechetInceptionDistance(_AsGiven(features), normalize=True, input_img_size=(1, 1, features))
    metric.set_dtype(torch.float64)
    metric.update(first_NF.double(), real=True)
    metric.update(second_MF.double(), real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(first_NF: Tensor, second_MF: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """KID: unbiased squared MMD of features under (x.y / F + 1)**3; mean and deviation over subsets.

    KID_SUBSETS subsets of KID_SUBSET_SIZE images, or of half the smaller side if that is fewer. Can be slightly
    negative for equal distributions. The deviation is that of subsets, not the error of the mean.

    Raises:
        NotMeasurable: DATA_EVALUATION, fewer than FEWEST images on a side.
        DataError: DATA_EVALUATION, different features on the two sides, or not finite.

    Source: Binkowski, Sutherland, Arbel, Gretton 2018 (arXiv 1801.01401).
    """
    features = _checked(first_NF, second_MF)
    for side in (first_NF, second_MF):
        at_least(len(side), FEWEST, "KID")
    size = min(KID_SUBSET_SIZE, len(first_NF) // 2, len(second_MF) // 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = KernelInceptionDistance(_AsGiven(features), subsets=KID_SUBSETS, subset_size=size, normalize=True)
    metric.update(first_NF.double(), real=True)
    metric.update(second_MF.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws its subsets from the global generator
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def mmd_of_images(first_N1HW: object, second_M1HW: object, *, seed: int = 0) -> float:
    """`mmd` of pixels, averaged down to MMD_SIDE a side: a distance that needs no extractor.

    Raises:
        DataError: DATA_EVALUATION, like `as_images`; sizes differ; NotMeasurable like `mmd`.
    """
    first, second = as_images(first_N1HW, "first"), as_images(second_M1HW, "second")
    if first.shape[1:] != second.shape[1:]:
        raise DataError("DATA_EVALUATION", "the images of the two sides differ in size")
    return mmd(_pixels(first), _pixels(second), seed=seed)


def mmd(first_NF: Tensor, second_MF: Tensor, *, seed: int = 0) -> float:
    """Unbiased squared MMD under exp(-|x - y|**2 / (2 h**2)); h is the median distance of all rows of both sides.

    ======================================  ==========================================================
    case                                    result
    ======================================  ==========================================================
    equal distributions                     about 0, and below it as often as above
    more than half of all pairs identical   the median is 0, so h is the mean distance instead
    all rows of both sides identical        0
    more than MMD_MOST rows on a side       so many are drawn, by `seed`
    fewer than FEWEST rows on a side        NotMeasurable
    ======================================  ==========================================================

    Source: Gretton, Borgwardt, Rasch, Schoelkopf, Smola, JMLR 13 (2012), lemma 6 and section 8.

    Raises:
        NotMeasurable, DataError: DATA_EVALUATION, see the table; different features, or not finite.
    """
    _checked(first_NF, second_MF)
    for side in (first_NF, second_MF):
        at_least(len(side), FEWEST, "MMD")
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        side[torch.randperm(len(side), generator=generator)[:MMD_MOST]].double() for side in (first_NF, second_MF)
    )
    count = len(first)
    rows = torch.cat([first, second])
    squared = torch.cdist(rows, rows).square()
    pairs = squared[torch.triu_indices(len(rows), len(rows), offset=1).unbind()]
    width = pairs.median()
    if float(width) == 0:
        width = pairs.sqrt().mean().square()
    if float(width) == 0:
        return 0.0
    kernel = torch.exp(-squared / (2 * width))
    within = [_mean_off_diagonal(block) for block in (kernel[:count, :count], kernel[count:, count:])]
    return float(within[0] + within[1] - 2 * kernel[:count, count:].mean())


class _AsGiven(nn.Module):
    """torchmetrics wants a network; ours has run already, once for all measures."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features_NF: Tensor) -> Tensor:
        return features_NF


def _mean_off_diagonal(square_NN: Tensor) -> Tensor:
    count = len(square_NN)
    return (square_NN.sum() - square_NN.diagonal().sum()) / (count * (count - 1))


def _pixels(images_N1HW: Tensor) -> Tensor:
    sides = [min(side, MMD_SIDE) for side in images_N1HW.shape[2:]]
    return functional.interpolate(images_N1HW, size=sides, mode="area").flatten(1)


def _checked(first_NF: Tensor, second_MF: Tensor) -> int:
    """Number of features."""
    if first_NF.ndim != 2 or second_MF.ndim != 2 or first_NF.shape[1] != second_MF.shape[1]:
        raise DataError("DATA_EVALUATION", "the two sides do not have the same features")
    if not bool(first_NF.isfinite().all() and second_MF.isfinite().all()):
        raise DataError("DATA_EVALUATION", "features hold values that are not finite")
    return first_NF.shape[1]
