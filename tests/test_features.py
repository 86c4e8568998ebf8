"""The declared feature extractor: the same weights again, known by their hash, loaded only when whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedmedgan.client import checkpoint
from fedmedgan.client.release.features import FEATURES, FeatureExtractor, load_extractor, train_extractor
from fedmedgan.shared.errors import DataError, ModelError
from fedmedgan.simulations.phantoms import draw_anatomy, radiographs

STEPS = 60


def phantoms(count: int, seed: int, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = radiographs(draw_anatomy(rng, count), labels, side, rng)
    return (images[:, None] * 2 - 1).astype(np.float32), labels


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return train_extractor(*phantoms(400, 0), trained_on="400 drawn phantoms", steps=STEPS)


def test_the_same_images_and_seed_give_the_same_weights_on_any_number_of_threads(extractor):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = train_extractor(*phantoms(400, 0), trained_on="the same, told otherwise", steps=STEPS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert again.sha256 == extractor.sha256
    assert torch.equal(torch.get_rng_state(), state)
    assert train_extractor(*phantoms(400, 0), trained_on="x", seed=1, steps=STEPS).sha256 != extractor.sha256


def test_it_learns_and_says_how_well():
    learned = train_extractor(*phantoms(800, 0), trained_on="phantoms", steps=250)
    assert learned.accuracy > 0.85
    images, labels = phantoms(200, 0)
    meaningless = np.random.default_rng(1).permutation(labels)  # which can be learned by heart only
    assert train_extractor(images, meaningless, trained_on="x", steps=150).accuracy < 0.8


def test_features_have_mean_0_and_deviation_1_where_it_was_trained(extractor):
    features_NF = extractor.extract(phantoms(400, 0)[0])
    assert features_NF.shape == (400, FEATURES)
    assert features_NF.dtype == torch.float64
    np.testing.assert_allclose(features_NF.mean(dim=0), 0, atol=1e-4)
    np.testing.assert_allclose(features_NF.std(dim=0), 1, atol=1e-3)


def test_larger_images_are_scaled_to_the_size_that_it_knows(extractor):
    images = phantoms(20, 3)[0]
    larger = images.repeat(2, axis=2).repeat(2, axis=3)
    same, scaled = extractor.extract(images), extractor.extract(larger)
    other = extractor.extract(phantoms(20, 4)[0])
    assert (same - scaled).square().mean() < 0.3 * (same - other).square().mean()


def test_a_file_gives_the_extractor_back(extractor, tmp_path):
    path = tmp_path / "extractor.safetensors"
    assert extractor.save(path) == extractor.sha256
    loaded = load_extractor(path)
    assert loaded.declaration() == extractor.declaration()
    assert loaded.declaration()["extractor_trained_on"] == "400 drawn phantoms"
    images = phantoms(20, 5)[0]
    assert torch.equal(loaded.extract(images), extractor.extract(images))


def test_another_weight_or_size_is_another_hash(extractor, tmp_path):
    path = tmp_path / "extractor.safetensors"
    extractor.save(path)
    changed = load_extractor(path)
    changed.mean[3] += 1
    assert changed.sha256 != extractor.sha256
    changed = load_extractor(path)
    changed.side = 32
    assert changed.sha256 != extractor.sha256


def _rewritten(extractor: FeatureExtractor, path: Path, change) -> None:
    extractor.save(path)
    arrays, notes = checkpoint.read(path)
    change(arrays, notes)
    checkpoint.write(path, arrays, **notes)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda arrays, notes: notes.update(kind="a generator"), "MODEL_MISMATCH"),
        (lambda arrays, notes: notes.pop("trained_on"), "MODEL_MISMATCH"),
        (lambda arrays, notes: arrays.pop("body.0.weight"), "MODEL_MISMATCH"),
        (lambda arrays, notes: arrays.update(more=np.zeros(3, np.float32)), "MODEL_MISMATCH"),
        (lambda arrays, notes: arrays.update(mean=np.zeros(3, np.float32)), "MODEL_MISMATCH"),
        (lambda arrays, notes: arrays.update(mean=np.zeros(FEATURES)), "MODEL_MISMATCH"),
        (lambda arrays, notes: arrays.update(side=np.array([4096])), "MODEL_MISMATCH"),
        (lambda arrays, notes: arrays.pop("side"), "MODEL_MISMATCH"),
        (lambda arrays, notes: arrays.update(mean=np.full(FEATURES, np.nan, np.float32)), "MODEL_NOT_FINITE"),
    ],
)
def test_a_file_that_is_no_extractor_is_not_loaded(extractor, tmp_path, change, code):
    path = tmp_path / "extractor.safetensors"
    _rewritten(extractor, path, change)
    with pytest.raises(ModelError) as caught:
        load_extractor(path)
    assert caught.value.code == code


def test_a_damaged_file_is_not_loaded(extractor, tmp_path):
    path = tmp_path / "extractor.safetensors"
    extractor.save(path)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="MODEL_HASH"):
        load_extractor(path)


IMAGES, LABELS = phantoms(40, 0)


@pytest.mark.parametrize(
    ("images", "labels", "trained_on", "message"),
    [
        (IMAGES, LABELS, "  ", "not said"),
        (IMAGES, LABELS * 0, "x", "two classes"),
        (IMAGES, LABELS * 2, "x", "two classes"),
        (IMAGES[:15], LABELS[:15], "x", "two classes"),
        (IMAGES[:, :, :12], LABELS, "x", "square"),
        (IMAGES * 2, LABELS, "x", "outside"),
        (IMAGES * np.nan, LABELS, "x", "not finite"),
        (IMAGES, LABELS[1:], "x", "differ in number"),
    ],
)
def test_what_it_is_not_trained_on(images, labels, trained_on, message):
    with pytest.raises(DataError, match=message):
        train_extractor(images, labels, trained_on=trained_on, steps=1)


def test_images_that_it_cannot_look_at(extractor):
    with pytest.raises(DataError, match="outside"):
        extractor.extract(IMAGES + 3)
