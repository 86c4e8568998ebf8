"""Near-duplicates by perceptual hash: how many there are, which synthetic images copy a real one, and a filter.

The hash: the image at 32 x 32, its cosine transform, the 16 x 16 lowest frequencies without the mean, and of each
whether it lies above their median: 255 bits. Images are near-duplicates if at most LARGEST_DISTANCE bits differ.
Brightness and contrast leave the hash alone, light noise nearly so; a shift by a pixel of 28 does not.

The distance was set on public images (docs/evaluation.md). It finds copies, not likeness: an image that was learned
by heart and comes back altered is a matter for the membership attacks of the audit.

`drop_duplicates` reads synthetic images alone, so it is free of privacy cost and may be applied to every release. To
drop synthetic images BECAUSE they are near a patient's is another thing: what is missing then tells of that patient.

Source: Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, section 3.2.1, with more
frequencies: 64 bits are too few to tell chest radiographs apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn
from torch.nn import functional

from fedmedgan.client.release.images import as_images, at_least
from fedmedgan.shared.errors import DataError

SIDE = 32
FREQUENCIES = 16
BITS = FREQUENCIES * FREQUENCIES - 1
LARGEST_DISTANCE = 20
ROWS_AT_ONCE = 512
_SMALLEST = 1e-4
"""Frequencies below it are 0: what rounding leaves of an even image is not a pattern."""

Bits = NDArray[np.bool_]


def perceptual_hashes(images_N1HW: Any) -> Bits:
    """(N, BITS) of images in [-1, 1]. Raises DataError like `as_images`."""
    images = functional.interpolate(as_images(images_N1HW, "given"), size=(SIDE, SIDE), mode="bilinear", antialias=True)
    waves = dctn(images[:, 0].double().numpy(), axes=(1, 2), norm="ortho")[:, :FREQUENCIES, :FREQUENCIES]
    waves = np.where(np.abs(waves) < _SMALLEST, 0.0, waves).reshape(len(images), FREQUENCIES**2)[:, 1:]
    return waves > np.median(waves, axis=1, keepdims=True)


def drop_duplicates(images_N1HW: Any, *, distance: int = LARGEST_DISTANCE) -> NDArray[np.int64]:
    """Rows that stay when each image that is a near-duplicate of an earlier, kept one is dropped.

    Labels play no part: one image under two labels is still one image. Classes may lose unequally.

    Args:
        images_N1HW: synthetic images in [-1, 1].
        distance: most bits by which near-duplicates differ, 0..BITS.

    Returns:
        Sorted row numbers. The first image always stays; none of those kept are near-duplicates of each other.

    Raises:
        DataError: DATA_EVALUATION, like `as_images`; or `distance` outside 0..BITS.
    """
    hashes_NB = perceptual_hashes(images_N1HW)
    _checked(distance)
    kept: list[int] = []
    for start in range(0, len(hashes_NB), ROWS_AT_ONCE):
        block = hashes_NB[start : start + ROWS_AT_ONCE]
        is_new_N = ~np.any(_near(block, hashes_NB[kept], distance), axis=1)
        near_NN = _near(block, block, distance)
        for row in np.flatnonzero(is_new_N):
            if is_new_N[row]:
                kept.append(start + int(row))
                is_new_N[row + 1 :] &= ~near_NN[row, row + 1 :]
    return np.array(kept, np.int64)


def duplicate_rate(images_N1HW: Any, *, distance: int = LARGEST_DISTANCE) -> float:
    """Share of images that `drop_duplicates` would drop: near 1 for a generator that makes one image only.

    Raises:
        NotMeasurable: DATA_EVALUATION, fewer than two images. DataError like `drop_duplicates`.
    """
    images = as_images(images_N1HW, "given")
    at_least(len(images), 2, "the duplicate rate")
    return 1 - len(drop_duplicates(images, distance=distance)) / len(images)


def copied_rate(images_N1HW: Any, real_M1HW: Any, *, distance: int = LARGEST_DISTANCE) -> float:
    """Share of images that are near-duplicates of a real one. Reads patients, if the real images show any.

    Raises:
        NotMeasurable: DATA_EVALUATION, no image on a side. DataError like `drop_duplicates`.
    """
    hashes_NB, real_MB = perceptual_hashes(images_N1HW), perceptual_hashes(real_M1HW)
    _checked(distance)
    at_least(min(len(hashes_NB), len(real_MB)), 1, "the rate of copies")
    blocks = [hashes_NB[start : start + ROWS_AT_ONCE] for start in range(0, len(hashes_NB), ROWS_AT_ONCE)]
    return float(np.concatenate([np.any(_near(block, real_MB, distance), axis=1) for block in blocks]).mean())


def _near(first_NB: Bits, second_MB: Bits, distance: int) -> Bits:
    """(N, M): whether at most `distance` bits differ. Exact: whole numbers below 2**24 in float32."""
    first, second = (np.where(bits, np.float32(1), np.float32(-1)) for bits in (first_NB, second_MB))
    return np.asarray((BITS - first @ second.T) / 2 <= distance)


def _checked(distance: int) -> None:
    if not 0 <= distance <= BITS:
        raise DataError("DATA_EVALUATION", f"the distance {distance} of near-duplicates is not within 0..{BITS}")
