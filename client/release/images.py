"""Images and labels as every measure of this folder takes them, or one clear refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmedgan.shared.errors import DataError

SMALLEST_SIDE = 8
TOLERANCE = 1e-3
"""By how much a value may lie outside [-1, 1]: the error of half precision."""


class NotMeasurable(DataError):
    """The images are well formed, but too few or too much alike for this measure. Code DATA_EVALUATION."""

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__("DATA_EVALUATION", what, where)

    def __reduce__(self) -> tuple:
        return (type(self), (self.what, self.where))


def as_array(values: Any) -> np.ndarray:
    """An array of an array, a list or a tensor of any device."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_images(values: Any, role: str) -> Tensor:
    """A float32 copy (N, 1, H, W) of images in [-1, 1], array or tensor of any float type.

    Args:
        values: the images.
        role: what the error calls them.

    Raises:
        DataError: DATA_EVALUATION, not (N, 1, H, W) or a side below 8; NaN or infinity; values outside [-1, 1].
    """
    images_N1HW = torch.from_numpy(np.array(as_array(values), dtype=np.float32))
    shape = images_N1HW.shape
    if images_N1HW.ndim != 4 or shape[1] != 1 or min(shape[2:]) < SMALLEST_SIDE:
        raise DataError("DATA_EVALUATION", f"the {role} images have shape {tuple(shape)}, not (N, 1, H, W)")
    if not bool(torch.isfinite(images_N1HW).all()):
        raise DataError("DATA_EVALUATION", f"the {role} images hold values that are not finite")
    if images_N1HW.numel() and float(images_N1HW.abs().max()) > 1 + TOLERANCE:
        raise DataError("DATA_EVALUATION", f"the {role} images hold values outside [-1, 1]")
    return images_N1HW


def as_labels(values: Any, count: int, role: str) -> NDArray[np.int64]:
    """Classes 0..K-1 of `count` images, shape (N,).

    Raises:
        DataError: DATA_EVALUATION, not one label an image; negative or not whole numbers.
    """
    label_N = as_array(values)
    if label_N.shape != (count,):
        raise DataError("DATA_EVALUATION", f"the {role} images and their labels differ in number")
    if label_N.dtype.kind not in "iu" or (label_N < 0).any():
        raise DataError("DATA_EVALUATION", f"the {role} labels are not whole numbers from 0")
    return label_N.astype(np.int64)


def at_least(count: int, fewest: int, measure: str) -> None:
    """Raises NotMeasurable where there are fewer than `fewest` images; `measure` is what needs them."""
    if count < fewest:
        raise NotMeasurable(f"{measure} needs at least {fewest} images", f"{count} given")
