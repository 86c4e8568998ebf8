"""Train on synthetic, test on real: right answers, wrong inputs, and nothing learned from the test set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmedgan.client.release import classifiers
from fedmedgan.client.release.classifiers import (
    FEWEST_OF_A_CLASS,
    LARGEST_SIDE,
    fit,
    train_on_synthetic_test_on_real,
    train_once_test_on_each,
)
from fedmedgan.client.release.holdout import split_patients
from fedmedgan.shared.errors import DataError
from fedmedgan.simulations.phantoms import draw_anatomy, radiographs


@pytest.fixture
def quick(monkeypatch):
    """For tests that ask not how well a classifier learns."""
    monkeypatch.setattr(classifiers, "STEPS", 80)


def _bars(count: int, classes: int = 2, seed: int = 0, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one brighter row: row 2 * class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.normal(0, 0.3, (count, 1, side, side)).astype(np.float32)
    images[np.arange(count), 0, 2 * labels] += 0.7
    return images.clip(-1, 1), labels


def _phantoms(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = radiographs(draw_anatomy(rng, count), labels, 32, rng)
    return (images[:, None] * 2 - 1).astype(np.float16), labels


def test_a_small_classifier_tells_the_classes_of_phantoms_apart():
    utility = train_on_synthetic_test_on_real(*_phantoms(1200, 0), *_phantoms(300, 1), seeds=(0,))
    assert utility.accuracy > 0.9
    assert utility.auc > 0.95
    assert utility.chance < 0.6
    assert (utility.trained_on, utility.tested_on) == (1200, 300)
    assert utility.accuracy_deviation == 0


def test_labels_that_mean_nothing_teach_nothing():
    images, labels = _bars(200)
    meaningless = np.random.default_rng(1).permutation(labels)
    utility = train_on_synthetic_test_on_real(images, meaningless, *_bars(200, seed=2), seeds=(0,))
    assert 0.3 < utility.auc < 0.7


def test_several_seeds_and_classes(quick):
    utility = train_on_synthetic_test_on_real(*_bars(150, 3), *_bars(90, 3, seed=1), seeds=(4, 5))
    assert utility.accuracy > 0.9
    assert utility.accuracy == pytest.approx(np.mean(utility.accuracy_per_seed))
    assert utility.auc_deviation == pytest.approx(np.std(utility.auc_per_seed, ddof=1))
    assert utility.chance == pytest.approx(1 / 3)


def test_the_same_seed_gives_the_same_result_and_global_random_numbers_are_left_alone(quick):
    noise = np.random.default_rng(1).uniform(-1, 1, (60, 1, 8, 8))  # on which no two classifiers agree
    images = (*_bars(60), noise, np.arange(60) % 2)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = train_on_synthetic_test_on_real(*images, seeds=(7,))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert train_on_synthetic_test_on_real(*images, seeds=(7,)) == first
    other = train_on_synthetic_test_on_real(*images, seeds=(8,))
    assert other != first


def test_the_classifier_does_not_depend_on_what_it_is_tested_with(quick):
    train, (images, labels) = _bars(40), _bars(80, seed=3)
    images = np.concatenate([images[:40], -images[40:]])  # a half that is hard
    easy, hard = (images[:40], labels[:40]), (images[40:], labels[40:])
    whole = train_on_synthetic_test_on_real(*train, images, labels, seeds=(0,))
    parts = train_once_test_on_each(*train, {"easy": easy, "hard": hard}, seeds=(0,))
    assert parts["easy"] == train_on_synthetic_test_on_real(*train, *easy, seeds=(0,))
    easy, hard = parts["easy"], parts["hard"]
    assert whole.accuracy == pytest.approx((easy.accuracy + hard.accuracy) / 2)
    assert hard.accuracy < easy.accuracy


def test_a_rare_class_is_learned_too():
    images, labels = _bars(240)
    keep = np.flatnonzero((labels == 0) | (np.arange(240) % 20 == 1))
    utility = train_on_synthetic_test_on_real(images[keep], labels[keep], *_bars(100, seed=1), seeds=(0,))
    assert utility.accuracy > 0.8


def test_the_mixture_of_labels_in_training_is_not_learned():
    grey, labels = torch.zeros(110, 1, 4, 4), torch.from_numpy((np.arange(110) % 11 == 0).astype(int))
    network = fit(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), grey, labels, 0, steps=300)
    chance = float(network(grey).detach().softmax(1)[0, 1])
    assert 0.4 < chance < 0.6  # what is said of images that say nothing; one in eleven has the label


def test_tensors_and_read_only_arrays_are_taken_and_large_images_are_averaged(quick):
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    small = rng.uniform(-1, 1, (20, 1, 8, LARGEST_SIDE)).astype(np.float16)
    large = small.repeat(2, axis=2).repeat(2, axis=3)
    large.setflags(write=False)
    labels.setflags(write=False)
    tensors = (torch.from_numpy(small), torch.from_numpy(labels.copy()))
    arrays = train_on_synthetic_test_on_real(large, labels, large, labels, seeds=(0,))
    assert arrays == train_on_synthetic_test_on_real(*tensors, *tensors, seeds=(0,))


GOOD = _bars(40)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GOOD[0][:, 0], GOOD[1], "shape"),
        (GOOD[0].repeat(3, axis=1), GOOD[1], "shape"),
        (GOOD[0][:, :, :4], GOOD[1], "shape"),
        (GOOD[0], GOOD[1][:-1], "differ in number"),
        (GOOD[0], GOOD[1] - 1, "whole numbers"),
        (GOOD[0], GOOD[1] + 0.5, "whole numbers"),
        (np.where(GOOD[0] > 0.9, np.nan, GOOD[0]), GOOD[1], "not finite"),
        (np.where(GOOD[0] > 0.9, np.inf, GOOD[0]), GOOD[1], "not finite"),
        (GOOD[0], GOOD[1] * 0, "one class"),
        (GOOD[0][:0], GOOD[1][:0], "one class"),
        (GOOD[0][: 2 * FEWEST_OF_A_CLASS - 1], GOOD[1][: 2 * FEWEST_OF_A_CLASS - 1], "fewer than"),
        (GOOD[0], GOOD[1] + 1, "differ in their classes"),
        (_bars(40, side=9)[0], GOOD[1], "differ in size"),
    ],
)
def test_wrong_images_are_refused_on_both_sides(images: np.ndarray, labels: np.ndarray, message: str):
    for arguments in ((images, labels, *GOOD), (*GOOD, images, labels)):
        with pytest.raises(DataError, match=message) as caught:
            train_on_synthetic_test_on_real(*arguments)
        assert caught.value.code == "DATA_EVALUATION"


def test_no_seed_is_refused():
    with pytest.raises(DataError, match="seed"):
        train_on_synthetic_test_on_real(*GOOD, *GOOD, seeds=())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda p: len(set(p)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_a_split_is_complete_disjoint_and_of_patients(patients: list[int], fraction: float, seed: int):
    patient_N = np.array(patients)
    train, held = split_patients(patient_N, fraction, seed)
    assert sorted([*train, *held]) == list(range(len(patients)))
    assert not set(patient_N[train]) & set(patient_N[held])
    everybody = len(set(patients))
    assert len(set(patient_N[held])) == min(max(round(fraction * everybody), 1), everybody - 1)
    # Another order of the images, or names instead of numbers, holds out the same people.
    order = np.random.default_rng(seed).permutation(len(patients))
    assert set(patient_N[order][split_patients(patient_N[order], fraction, seed)[1]]) == set(patient_N[held])
    named = np.array([f"p{p:02d}" for p in patients])
    np.testing.assert_array_equal(split_patients(named, fraction, seed)[1], held)


@pytest.mark.parametrize(
    ("patients", "fraction"), [([1, 1], 0.5), ([], 0.5), ([1, 2], 0.0), ([1, 2], 1.0), ([1, 2], float("nan"))]
)
def test_a_split_that_is_not_one(patients: list[int], fraction: float):
    with pytest.raises(DataError, match="DATA_EVALUATION"):
        split_patients(np.array(patients), fraction, 0)
