"""Quality and variety apart: precision and recall, density and coverage, by nearest neighbours in features.

A ball lies about each image of one side, with the distance to its k-th nearest neighbour of the same side as radius.

    precision   share of synthetic images in a ball of a real one: is what is made plausible?
    recall      share of real images in a ball of a synthetic one: is what is real also made?
    density     balls of real images that a synthetic image lies in, on average, over k; may exceed 1
    coverage    share of balls of real images that hold a synthetic one; unlike recall, outliers made do not help

A generator that makes one good image of each class has a high precision and a low recall and coverage.

Neither torchmetrics nor scikit-learn has these. Against real patients no epsilon covers them: docs/evaluation.md.

Sources: Kynkaanniemi, Karras, Laine, Lehtinen, Aila 2019 (arXiv 1904.06991), k = 3; Naeem, Oh, Uh, Choi, Yoo 2020
(arXiv 2002.09797), k = 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmedgan.client.release.images import at_least
from fedmedgan.shared.errors import DataError

PRECISION_K = 3
COVERAGE_K = 5
FEWEST = 20
"""Images on each side."""
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class PrecisionRecall:
    """Both in [0, 1]."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """Density is 0 or more, 1 for equal distributions; coverage is in [0, 1]."""

    density: float
    coverage: float


def precision_recall(synthetic_NF: Tensor, real_MF: Tensor, *, k: int = PRECISION_K) -> PrecisionRecall:
    """Improved precision and recall. Compare only numbers of the same N and M.

    Raises:
        NotMeasurable: DATA_EVALUATION, fewer than FEWEST images on a side, or not more than k.
        DataError: DATA_EVALUATION, different features on the two sides, or not finite.
    """
    synthetic, real = _checked(synthetic_NF, real_MF, k)
    return PrecisionRecall(
        precision=float((_balls_around(synthetic, real, _radii(real, k)) > 0).double().mean()),
        recall=float((_balls_around(real, synthetic, _radii(synthetic, k)) > 0).double().mean()),
    )


def density_coverage(synthetic_NF: Tensor, real_MF: Tensor, *, k: int = COVERAGE_K) -> DensityCoverage:
    """Density and coverage. Raises like `precision_recall`."""
    synthetic, real = _checked(synthetic_NF, real_MF, k)
    radius_M = _radii(real, k)
    balls_N = _balls_around(synthetic, real, radius_M)
    nearest_M = torch.cat([_distances(part, synthetic).amin(dim=1) for part in real.split(ROWS_AT_ONCE)])
    return DensityCoverage(
        density=float(balls_N.double().mean() / k), coverage=float((nearest_M <= radius_M).double().mean())
    )


def _radii(points_NF: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest OTHER row: rank k + 1, for rank 1 is the row itself."""
    parts = [_distances(part, points_NF).kthvalue(k + 1, dim=1).values for part in points_NF.split(ROWS_AT_ONCE)]
    return torch.cat(parts)


def _balls_around(points_NF: Tensor, centres_MF: Tensor, radius_M: Tensor) -> Tensor:
    """In how many balls each point lies, edges included."""
    parts = [(_distances(part, centres_MF) <= radius_M).sum(dim=1) for part in points_NF.split(ROWS_AT_ONCE)]
    return torch.cat(parts)


def _distances(points_NF: Tensor, others_MF: Tensor) -> Tensor:
    # The faster way by a product of matrices gives equal rows a distance other than 0.
    return torch.cdist(points_NF, others_MF, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(synthetic_NF: Tensor, real_MF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if synthetic_NF.ndim != 2 or real_MF.ndim != 2 or synthetic_NF.shape[1] != real_MF.shape[1]:
        raise DataError("DATA_EVALUATION", "the two sides do not have the same features")
    if not bool(synthetic_NF.isfinite().all() and real_MF.isfinite().all()):
        raise DataError("DATA_EVALUATION", "features hold values that are not finite")
    for side in (synthetic_NF, real_MF):
        at_least(len(side), max(FEWEST, k + 1), "a comparison by nearest neighbours")
    return synthetic_NF.double(), real_MF.double()
