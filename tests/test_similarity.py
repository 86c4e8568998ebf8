"""Pairs, masks and diversity: known values, slow and obvious oracles, and images that are small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from fedmedgan.client.release.images import NotMeasurable
from fedmedgan.client.release.similarity import (
    HIGHEST_PSNR,
    ROWS_AT_ONCE,
    dice_and_iou,
    diversity,
    mae,
    ms_ssim,
    psnr,
    ssim,
)
from fedmedgan.shared.errors import DataError


def noise(count: int, side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 1, side, side)).astype(np.float32)


def smooth(count: int, side: int, seed: int) -> np.ndarray:
    images = gaussian_filter(noise(count, side, seed), (0, 0, side / 10, side / 10))
    return (images / np.abs(images).max()).astype(np.float32)


def ssim_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """Of two images (H, W) in [0, 1], with the constants and the window of the paper."""

    def mean(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5, mode="mirror")

    first, second = first.astype(float), second.astype(float)
    a, b = mean(first), mean(second)
    spread_a, spread_b = mean(first * first) - a * a, mean(second * second) - b * b
    shared = mean(first * second) - a * b
    luminance = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    structure = (2 * shared + 0.03**2) / (spread_a + spread_b + 0.03**2)
    return float((luminance * structure).mean())


@pytest.mark.parametrize("side", [16, 28, 64])
def test_ssim_is_that_of_the_paper(side):
    first = smooth(5, side, 1)
    second = np.clip(first + 0.3 * noise(5, side, 2), -1, 1)
    expected = [ssim_by_hand((a[0] + 1) / 2, (b[0] + 1) / 2) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(ssim(first, second), expected, atol=1e-4)
    assert max(expected) < 0.99
    np.testing.assert_allclose(ssim(first, first), 1, atol=1e-6)


def test_ssim_of_two_even_images_is_their_luminance_term():
    dark, light = np.full((1, 1, 20, 20), -0.5), np.full((1, 1, 20, 20), 0.5)  # 0.25 and 0.75 in [0, 1]
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(dark, light)[0] == pytest.approx(expected, abs=1e-3)


def test_psnr_and_mae_of_a_known_error():
    image = np.zeros((3, 1, 8, 8), np.float32)
    image[2] = 0.2
    other = image + np.float32(0.2)  # 0.1 of the range from black to white
    np.testing.assert_allclose(mae(image, other), 0.1, atol=1e-6)
    np.testing.assert_allclose(psnr(image, other), 20, atol=1e-4)
    assert psnr(image, image).tolist() == [HIGHEST_PSNR] * 3
    half = image.copy()
    half[:, :, :4] += 0.4
    np.testing.assert_allclose(psnr(image, half), 10 * np.log10(1 / (0.2**2 / 2)), atol=1e-4)


def test_many_images_are_compared_in_parts():
    first, second = noise(ROWS_AT_ONCE + 3, 16, 1), noise(ROWS_AT_ONCE + 3, 16, 2)
    for measure in (ssim, ms_ssim):
        whole = measure(first, second)
        assert whole.shape == (ROWS_AT_ONCE + 3,)
        np.testing.assert_allclose(whole[-3:], measure(first[-3:], second[-3:]), atol=1e-6)


@pytest.mark.parametrize("side", [16, 28, 47, 48, 64, 128, 160, 161, 256])
def test_ms_ssim_works_at_every_size(side):
    image = smooth(2, side, 1)
    np.testing.assert_allclose(ms_ssim(image, image), 1, atol=1e-5)
    light = ms_ssim(image, np.clip(image + 0.1 * noise(2, side, 2), -1, 1))
    heavy = ms_ssim(image, np.clip(image + 0.5 * noise(2, side, 2), -1, 1))
    assert np.all((heavy > 0) & (heavy < light) & (light < 1))


def test_ms_ssim_of_two_scales_by_hand():
    first = smooth(1, 28, 1)
    second = np.clip(first + 0.2 * noise(1, 28, 2), -1, 1)
    a, b = (first[0, 0].astype(float) + 1) / 2, (second[0, 0].astype(float) + 1) / 2

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.0, truncate=4.0, mode="mirror")  # 9 pixels

    def terms(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, v = blur(a), blur(b)
        structure = (2 * (blur(a * b) - u * v) + 9e-4) / (blur(a * a) - u * u + blur(b * b) - v * v + 9e-4)
        return (2 * u * v + 1e-4) / (u * u + v * v + 1e-4), structure

    fine = terms(a, b)[1][4:-4, 4:-4].mean()
    luminance, structure = terms(a.reshape(14, 2, 14, 2).mean(axis=(1, 3)), b.reshape(14, 2, 14, 2).mean(axis=(1, 3)))
    expected = fine**0.5 * (luminance * structure).mean() ** 0.5
    assert ms_ssim(first, second)[0] == pytest.approx(expected, abs=1e-4)


def test_diversity_finds_a_collapsed_class_though_classes_differ(monkeypatch):
    monkeypatch.setattr("fedmedgan.client.release.similarity.PAIRS", 200)
    labels = np.arange(40) % 2
    varied = smooth(40, 28, 1)
    collapsed = varied[labels]  # one image a class
    assert diversity(collapsed, labels) == pytest.approx(1, abs=1e-4)
    assert diversity(varied, labels) < 0.6
    assert diversity(collapsed, labels * 0) < 0.9  # without labels, pairs of different classes hide it
    assert diversity(varied, labels, seed=1) != diversity(varied, labels, seed=2)
    assert diversity(varied, labels, seed=1) == diversity(varied, labels, seed=1)


def test_diversity_never_compares_an_image_with_itself_and_leaves_single_images_out():
    two = np.stack([np.full((1, 16, 16), -1.0), np.full((1, 16, 16), 1.0)])
    alone = diversity(two, np.zeros(2, int))
    assert alone < 0.1
    with_single = np.concatenate([two, smooth(1, 16, 1)])
    assert diversity(with_single, np.array([0, 0, 1])) == pytest.approx(alone)
    with pytest.raises(NotMeasurable, match="two images of a class"):
        diversity(with_single, np.array([0, 1, 2]))
    with pytest.raises(NotMeasurable, match="at least 16 pixels"):
        diversity(noise(4, 15, 1), np.zeros(4, int))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 10_000))
def test_dice_and_iou_are_those_of_the_formula(count, classes, seed):
    rng = np.random.default_rng(seed)
    predicted, true = rng.integers(0, classes, (2, count, 1, 3, 3))
    true[0] = 1  # at least one class is there
    dice, iou = [], []
    for label in range(1, classes):
        one, other = predicted == label, true == label
        both = (one & other).sum(axis=(1, 2, 3))
        sizes = one.sum(axis=(1, 2, 3)) + other.sum(axis=(1, 2, 3))
        there = sizes > 0
        if there.any():
            dice.append((2 * both[there] / sizes[there]).mean())
            iou.append((both[there] / (sizes - both)[there]).mean())
    found = dice_and_iou(predicted, true)
    assert found == {"dice": pytest.approx(np.mean(dice)), "iou": pytest.approx(np.mean(iou))}


def test_dice_of_masks_in_the_table():
    true = np.zeros((4, 1, 8, 8), bool)
    predicted = true.copy()
    predicted[1, :, :4] = True  # false alarm
    true[2, :, :4] = True  # missed
    predicted[3, :, :4], true[3, :, :2] = True, True  # twice as large; image 0 holds nothing on either side
    assert dice_and_iou(predicted, true) == {"dice": pytest.approx(2 / 9), "iou": pytest.approx(0.5 / 3)}
    with pytest.raises(NotMeasurable, match="no mask"):
        dice_and_iou(predicted[:1], true[:1])


IMAGES = noise(3, 16, 1)


@pytest.mark.parametrize("measure", [psnr, ssim, mae, ms_ssim])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (IMAGES[:2], "number or size"),
        (IMAGES[:, :, :12], "number or size"),
        (IMAGES[:, 0], "shape"),
        (IMAGES * 3, "outside"),
        (IMAGES * np.nan, "not finite"),
    ],
)
def test_pairs_that_are_none(measure, other, message):
    for pair in ((IMAGES, other), (other, IMAGES)):
        with pytest.raises(DataError, match=message):
            measure(*pair)
    with pytest.raises(NotMeasurable):
        measure(IMAGES[:0], IMAGES[:0])


MASK = np.ones((2, 1, 4, 4), int)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[:, 0], "shape"),
        (MASK[:0], "shape"),
        (MASK[:1], "number or size"),
        (MASK * 0.5, "whole numbers"),
        (MASK * -1, "whole numbers"),
        (MASK * 256, "whole numbers"),
    ],
)
def test_masks_that_are_none(mask, message):
    for pair in ((MASK, mask), (mask, MASK)):
        with pytest.raises(DataError, match=message):
            dice_and_iou(*pair)
