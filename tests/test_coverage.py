"""Precision, recall, density and coverage against loops, and in cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmedgan.client.release.coverage import FEWEST, density_coverage, precision_recall
from fedmedgan.client.release.images import NotMeasurable
from fedmedgan.shared.errors import DataError


def points(count: int, features: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, features)))


def radius(point: int, of: np.ndarray, k: int) -> float:
    others = [np.linalg.norm(of[point] - other) for i, other in enumerate(of) if i != point]
    return sorted(others)[k - 1]


def in_balls(of: np.ndarray, k: int, point: np.ndarray) -> list[bool]:
    """For each ball around a point of `of`: whether it holds `point`."""
    return [np.linalg.norm(point - centre) <= radius(i, of, k) for i, centre in enumerate(of)]


@settings(deadline=None, max_examples=8)
@given(st.integers(FEWEST, 30), st.integers(FEWEST, 30), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_all_four_are_those_of_loops(n, m, features, k, seed):
    synthetic, real = points(n, features, seed), points(m, features, seed + 1000) * 1.5
    of_real = np.array([in_balls(real.numpy(), k, point) for point in synthetic.numpy()])  # (n, m)
    of_synthetic = np.array([in_balls(synthetic.numpy(), k, point) for point in real.numpy()])
    found = precision_recall(synthetic, real, k=k)
    assert found.precision == pytest.approx(of_real.any(axis=1).mean())
    assert found.recall == pytest.approx(of_synthetic.any(axis=1).mean())
    found = density_coverage(synthetic, real, k=k)
    assert found.density == pytest.approx(of_real.sum() / (k * n))
    assert found.coverage == pytest.approx(of_real.any(axis=0).mean())


def test_more_points_than_go_at_once(monkeypatch):
    synthetic, real = points(90, 3, 1), points(70, 3, 2)
    whole = precision_recall(synthetic, real), density_coverage(synthetic, real)
    monkeypatch.setattr("fedmedgan.client.release.coverage.ROWS_AT_ONCE", 32)
    assert (precision_recall(synthetic, real), density_coverage(synthetic, real)) == whole


def test_equal_sets_and_sets_far_apart():
    real = points(100, 4, 1)
    same = precision_recall(real, real), density_coverage(real, real)
    assert (same[0].precision, same[0].recall, same[1].coverage) == (1, 1, 1)
    far = precision_recall(real + 100, real), density_coverage(real + 100, real)
    assert (far[0].precision, far[0].recall, far[1].density, far[1].coverage) == (0, 0, 0, 0)


def test_a_collapsed_generator_is_precise_and_covers_nothing():
    real = points(200, 4, 1)
    collapsed = real[:1].repeat(100, 1)
    assert precision_recall(collapsed, real).precision == 1
    assert precision_recall(collapsed, real).recall == pytest.approx(1 / 200)
    assert density_coverage(collapsed, real).coverage < 0.1


def test_an_edge_belongs_to_its_ball():
    same = points(1, 4, 1).repeat(30, 1)  # balls of radius 0
    quality, variety = precision_recall(same, same), density_coverage(same, same)
    assert (quality.precision, quality.recall, variety.coverage) == (1, 1, 1)
    assert precision_recall(same + 1e-6, same).precision == 0


def test_outliers_raise_recall_but_not_coverage():
    real, synthetic = points(200, 2, 1), points(200, 2, 2) * 0.05
    outliers = torch.tensor([[9.0, 9.0], [-9.0, 9.0], [9.0, -9.0], [-9.0, -9.0]]).double()
    synthetic = torch.cat([synthetic, outliers])
    assert precision_recall(synthetic, real).recall > 0.9
    assert density_coverage(synthetic, real).coverage < 0.3


@pytest.mark.parametrize("measure", [precision_recall, density_coverage])
def test_too_little_or_wrong(measure):
    enough = points(FEWEST, 3, 1)
    measure(enough, enough)
    for sides in ((enough, enough[1:]), (enough[1:], enough)):
        with pytest.raises(NotMeasurable, match="at least 20"):
            measure(*sides)
    with pytest.raises(NotMeasurable, match="at least 41"):
        measure(enough, points(40, 3, 2), k=40)
    with pytest.raises(DataError, match="same features"):
        measure(enough, points(FEWEST, 4, 1))
    broken = enough.clone()
    broken[0, 0] = torch.inf
    with pytest.raises(DataError, match="not finite"):
        measure(enough, broken)
