"""FID, KID and MMD against slow and obvious ones, and what is too little to measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from fedmedgan.client.release.distances import (
    FEWEST,
    MMD_MOST,
    frechet_distance,
    kernel_distance,
    mmd,
    mmd_of_images,
)
from fedmedgan.client.release.images import NotMeasurable
from fedmedgan.shared.errors import DataError


def normal(count: int, features: int, *, seed: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    mixed = np.random.default_rng(99).normal(size=(features, features))
    rows = np.random.default_rng(seed).normal(size=(count, features)) @ mixed * scale + mean
    return torch.from_numpy(rows)


def fid_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    gap = first.mean(axis=0) - second.mean(axis=0)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    return float(gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * root))


@settings(deadline=None, max_examples=12)
@given(st.integers(2, 12), st.integers(1, 60), st.floats(0, 3), st.floats(0.2, 3))
def test_fid_is_that_of_the_formula(features, more, mean, scale):
    first = normal(features + more + 1, features, seed=1)
    second = normal(features + 40, features, seed=2, mean=mean, scale=scale)
    expected = fid_by_hand(first.numpy(), second.numpy())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_fid_of_a_shift_is_its_square_and_of_equal_sets_0():
    rows = normal(100, 6, seed=1)
    assert frechet_distance(rows, rows + 2) == pytest.approx(6 * 4, rel=1e-5)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-5)
    collapsed = rows[:1].repeat(100, 1)
    to_point = (rows.mean(dim=0) - rows[0]).square().sum() + rows.var(dim=0).sum()
    assert frechet_distance(rows, collapsed) == pytest.approx(float(to_point), rel=1e-6)


def test_fid_needs_more_images_than_features_on_both_sides():
    enough, few = normal(9, 8, seed=1), normal(8, 8, seed=2)
    assert frechet_distance(enough, enough.flip(0)) == pytest.approx(0, abs=1e-5)
    for sides in ((enough, few), (few, enough)):
        with pytest.raises(NotMeasurable, match="FID of 8 features needs at least 9"):
            frechet_distance(*sides)


def kid_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / len(x) + 1) ** 3

    n, m = len(first), len(second)
    within = sum(kernel(first[i], first[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(kernel(second[i], second[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(x, y) for x in first for y in second) / (n * m)


def test_kid_agrees_with_the_estimate_from_all_images():
    first, second = normal(80, 4, seed=1, scale=0.5), normal(80, 4, seed=2, mean=0.7, scale=0.5)
    mean, deviation = kernel_distance(first, second)
    # Subsets of 40 out of 80, 50 of them: their mean scatters about the estimate from all 80.
    assert mean == pytest.approx(kid_by_hand(first.numpy(), second.numpy()), abs=4 * deviation / 50**0.5)
    assert mean > 3 * deviation / 50**0.5


def test_kid_of_subsets_without_a_choice_is_exact(monkeypatch):
    monkeypatch.setattr("fedmedgan.client.release.distances.KID_SUBSET_SIZE", 15)
    rows = normal(15, 4, seed=3, scale=0.5).repeat(2, 1)  # every subset of 15 differs, of equal images not
    same = rows[:1].repeat(30, 1)
    other = rows[1:2].repeat(30, 1)
    mean, deviation = kernel_distance(same, other)
    assert mean == pytest.approx(kid_by_hand(same.numpy()[:15], other.numpy()[:15]), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kid_has_its_own_random_numbers():
    sides = normal(60, 4, seed=1), normal(50, 4, seed=2)
    state = torch.get_rng_state()
    found = kernel_distance(*sides, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert kernel_distance(*sides, seed=5) == found
    assert kernel_distance(*sides, seed=6) != found


def mmd_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    rows = np.concatenate([first, second])
    apart = [np.linalg.norm(a - b) for i, a in enumerate(rows) for b in rows[:i]]
    width = sorted(apart)[(len(apart) - 1) // 2]

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-np.square(x - y).sum() / (2 * width**2)))

    n, m = len(first), len(second)
    within = sum(kernel(first[i], first[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(kernel(second[i], second[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(x, y) for x in first for y in second) / (n * m)


@settings(deadline=None, max_examples=6)
@given(st.integers(FEWEST, 30), st.integers(FEWEST, 30), st.floats(0, 2))
def test_mmd_is_that_of_the_formula(n, m, mean):
    first, second = normal(n, 3, seed=1), normal(m, 3, seed=2, mean=mean)
    assert mmd(first, second) == pytest.approx(mmd_by_hand(first.numpy(), second.numpy()), abs=1e-9)


def test_mmd_of_equal_distributions_is_0_on_average():
    found = [mmd(normal(40, 3, seed=2 * s), normal(40, 3, seed=2 * s + 1)) for s in range(40)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 40**0.5
    assert min(found) < 0 < max(found)
    assert mmd(normal(40, 3, seed=1), normal(40, 3, seed=2, mean=2.0)) > max(found)


def test_mmd_of_collapsed_sets():
    point = torch.ones(30, 3, dtype=torch.float64)
    assert mmd(point, point) == 0
    assert mmd(point, -point) > 0.5
    nearly = point.clone()
    nearly[0] = 5.0  # more than half of all pairs are identical: the median distance is 0
    assert np.isfinite(mmd(nearly, point))


def test_mmd_of_many_images_takes_some_of_them():
    rows = normal(MMD_MOST + 200, 2, seed=1)
    far = rows.clone()
    far[:, 0] += 50
    assert mmd(rows, far) > 0.5
    assert mmd(rows, far, seed=3) != mmd(rows, far, seed=4)


def test_mmd_of_images_averages_them_down():
    rng = np.random.default_rng(0)
    small = rng.uniform(-1, 1, (30, 1, 32, 32)).astype(np.float32)
    other = rng.uniform(-1, 0.5, (25, 1, 32, 32)).astype(np.float32)
    larger = [images.repeat(2, axis=2).repeat(2, axis=3) for images in (small, other)]
    assert mmd_of_images(*larger) == pytest.approx(mmd_of_images(small, other), abs=1e-6)
    assert mmd_of_images(small, other) > 0.01
    with pytest.raises(DataError, match="size"):
        mmd_of_images(small, larger[1])


@pytest.mark.parametrize("measure", [kernel_distance, mmd])
def test_too_few_images(measure):
    enough, few = normal(FEWEST, 4, seed=1), normal(FEWEST - 1, 4, seed=2)
    measure(enough, enough + 1)
    for sides in ((enough, few), (few, enough)):
        with pytest.raises(NotMeasurable, match="at least"):
            measure(*sides)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, mmd])
def test_features_that_cannot_be_compared(measure):
    rows = normal(50, 4, seed=1)
    broken = rows.clone()
    broken[3, 1] = torch.nan
    for sides in ((rows, broken), (broken, rows)):
        with pytest.raises(DataError, match="not finite"):
            measure(*sides)
    with pytest.raises(DataError, match="same features"):
        measure(rows, normal(50, 5, seed=2))
