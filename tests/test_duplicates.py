"""Duplicates made by hand are found, different images are not; and what the filter keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from fedmedgan.client.release.duplicates import (
    BITS,
    LARGEST_DISTANCE,
    copied_rate,
    drop_duplicates,
    duplicate_rate,
    perceptual_hashes,
)
from fedmedgan.client.release.images import NotMeasurable
from fedmedgan.shared.errors import DataError
from fedmedgan.simulations.phantoms import draw_anatomy, radiographs


def different(count: int, seed: int, side: int = 28) -> np.ndarray:
    images = gaussian_filter(np.random.default_rng(seed).normal(size=(count, 1, side, side)), (0, 0, 0.8, 0.8))
    return (images / np.abs(images).max() * 0.8).astype(np.float32)


def phantoms(count: int, seed: int, side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    images = radiographs(draw_anatomy(rng, count), rng.integers(0, 2, count), side, rng)
    return (images[:, None] * 2 - 1).astype(np.float32)


@pytest.mark.parametrize("side", [28, 64, 128])
def test_copies_with_other_brightness_contrast_or_light_noise_are_found(side):
    images = different(30, 1, side)
    rng = np.random.default_rng(2)
    for copies in (
        images,
        images * 0.8 + 0.1,
        np.round(images * 60) / 60,
        np.clip(images + rng.normal(0, 0.01, images.shape), -1, 1),
    ):
        assert copied_rate(copies, images) == 1
        both = np.concatenate([images, copies])
        assert drop_duplicates(both).tolist() == list(range(30))
        assert duplicate_rate(both) == 0.5


def test_different_images_are_left_alone():
    images = different(300, 1)
    assert duplicate_rate(images) == 0
    assert copied_rate(images, different(300, 2)) == 0
    assert copied_rate(-images, images) == 0


def test_drawn_radiographs_which_are_much_alike_are_mostly_told_apart():
    images = phantoms(300, 1)
    assert duplicate_rate(images) < 0.03
    assert duplicate_rate(images[np.arange(300) % 10]) == pytest.approx(290 / 300)


def test_even_images_are_duplicates_of_each_other_whatever_rounding_leaves():
    rng = np.random.default_rng(0)
    grey = np.linspace(-1, 1, 20)[:, None, None, None] * np.ones((20, 1, 28, 28))
    grey = np.clip(grey + rng.normal(0, 1e-7, grey.shape), -1, 1)
    assert len(drop_duplicates(grey)) == 1
    assert not perceptual_hashes(grey).any()


def apart(hashes: np.ndarray, i: int, j: int) -> int:
    return int((hashes[i] != hashes[j]).sum())


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 60), st.integers(0, 99), st.sampled_from([0, 5, LARGEST_DISTANCE, 100, BITS]))
def test_what_is_kept(count, seed, distance):
    """Against loops: each image stays exactly if no kept one before it is near."""
    rng = np.random.default_rng(seed)
    basis = different(8, seed)
    images = np.clip(basis[rng.integers(0, 8, count)] + rng.normal(0, 0.02, (count, 1, 28, 28)), -1, 1)
    hashes, kept = perceptual_hashes(images), []
    for i in range(count):
        if all(apart(hashes, i, j) > distance for j in kept):
            kept.append(i)
    assert drop_duplicates(images, distance=distance).tolist() == kept


def test_more_images_than_go_at_once(monkeypatch):
    images = different(90, 1)[np.random.default_rng(0).integers(0, 90, 200)]
    whole = drop_duplicates(images), copied_rate(images, images[:30])
    monkeypatch.setattr("fedmedgan.client.release.duplicates.ROWS_AT_ONCE", 16)
    assert drop_duplicates(images).tolist() == whole[0].tolist()
    assert copied_rate(images, images[:30]) == whole[1]


def test_the_hash_is_half_ones_and_of_the_size_that_is_said():
    hashes = perceptual_hashes(different(5, 1))
    assert hashes.shape == (5, BITS)
    assert hashes.sum(axis=1).tolist() == [BITS // 2] * 5


def test_few_images_and_wrong_ones():
    images = different(3, 1)
    assert drop_duplicates(images[:1]).tolist() == [0]
    assert drop_duplicates(images[:0]).tolist() == []
    with pytest.raises(NotMeasurable):
        duplicate_rate(images[:1])
    for sides in ((images, images[:0]), (images[:0], images)):
        with pytest.raises(NotMeasurable):
            copied_rate(*sides)
    for distance in (-1, BITS + 1):
        with pytest.raises(DataError, match="distance"):
            drop_duplicates(images, distance=distance)
    with pytest.raises(DataError, match="outside"):
        duplicate_rate(images * 9)
    with pytest.raises(DataError, match="not finite"):
        copied_rate(images, images * np.nan)
