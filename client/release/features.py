"""The declared feature extractor: what FID, KID, precision and recall look at.

A small classifier that was trained here, on public or drawn images, and whose last hidden layer is the features. The
usual Inception network is not used: its weights would have to be downloaded, and it knows photographs.

A distance in features means nothing without the features, so every result names the extractor by the SHA-256 of its
weights and says which images it was trained on. Numbers under two extractors cannot be compared: a consortium trains
one, and hands the file round.

An extractor trained on patients would carry them into whatever it is sent with. `trained_on` is the caller's word
that it was not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.client import checkpoint
from fedmedgan.client.release.classifiers import FEWEST_OF_A_CLASS, fit
from fedmedgan.client.release.images import SMALLEST_SIDE, as_images, as_labels
from fedmedgan.shared.errors import DataError, ModelError

FEATURES = 64
"""Few, because FID needs more images than features, and hospitals have hundreds."""
STEPS = 800
BATCH = 64
LEARNING_RATE = 3e-3
LARGEST_SIDE = 64
TESTED_ONE_IN = 10
"""One image in so many is kept from training, to say how well the extractor knows its own classes."""
ROWS_AT_ONCE = 256
SMALLEST_DEVIATION = 1e-3
"""A feature that hardly moves is not blown up."""
_KIND = "fedmedgan feature extractor"


class FeatureExtractor(nn.Module):
    """A classifier of square images, and the FEATURES values in front of its answer.

    Features have mean 0 and deviation 1 on the images that the extractor was trained on.
    """

    def __init__(self, side: int, classes: int, *, trained_on: str, accuracy: float = 0.0) -> None:
        super().__init__()
        self.side = side
        """Images of any other size are scaled to this one, in pixels."""
        self.trained_on = trained_on
        """Which public or drawn images, in words."""
        self.accuracy = accuracy
        """On images of the same source that it was not trained on."""
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES),
        )
        self.head = nn.Linear(FEATURES, classes)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("deviation", torch.ones(FEATURES))

    def forward(self, images_N1SS: Tensor) -> Tensor:
        """(N, classes) scores, for training."""
        return self.head(functional.relu(self.body(images_N1SS)))

    @torch.no_grad()
    def extract(self, images_N1HW: Any) -> Tensor:
        """Features float64 (N, FEATURES) of images in [-1, 1], array or tensor.

        Raises:
            DataError: DATA_EVALUATION, like `as_images`.
            ModelError: MODEL_NOT_FINITE.
        """
        images = as_images(images_N1HW, "given")
        parts = [self.body(_scaled(part, self.side)) for part in images.split(ROWS_AT_ONCE)]
        features_NF = (torch.cat(parts).double() - self.mean.double()) / self.deviation.double()
        if not bool(features_NF.isfinite().all()):
            raise ModelError("MODEL_NOT_FINITE", "the features of an image are not finite")
        return features_NF

    @property
    def sha256(self) -> str:
        """Hash of the weights and of the size they look at, 64 hex digits."""
        return checkpoint.content_hash(self._arrays())

    def declaration(self) -> dict[str, str | float]:
        """What every result says of its features."""
        return {
            "extractor_sha256": self.sha256,
            "extractor_trained_on": self.trained_on,
            "extractor_accuracy": self.accuracy,
        }

    def save(self, path: Path) -> str:
        """Write a safetensors file. Returns `sha256`."""
        notes = {"kind": _KIND, "trained_on": self.trained_on, "accuracy": repr(self.accuracy)}
        return checkpoint.write(path, self._arrays(), **notes)

    def _arrays(self) -> checkpoint.Arrays:
        weights = {name: tensor.detach().cpu().numpy() for name, tensor in self.state_dict().items()}
        return weights | {"side": np.array([self.side], np.int64)}


def train_extractor(
    images_N1HW: Any, labels: Any, *, trained_on: str, seed: int = 0, steps: int = STEPS
) -> FeatureExtractor:
    """Train an extractor on public or drawn images. On one thread, so a machine always makes the same weights.

    Another kind of processor may round differently and make other weights: hand the file round, not the recipe.

    Args:
        images_N1HW: square images in [-1, 1]; above LARGEST_SIDE pixels they are averaged down.
        labels: their classes 0..K-1, shape (N,), at least two, each at least 2 * FEWEST_OF_A_CLASS times.
        trained_on: which images these are, in words. Never patients of a hospital: the extractor is public.
        seed: of weights and batches.
        steps: batches of BATCH images.

    Raises:
        DataError: DATA_EVALUATION, images or labels like `as_images` and `as_labels`; not square; too few; a class
            between others is missing; or it is not said what they are.
    """
    images = as_images(images_N1HW, "training")
    label_N = as_labels(labels, len(images), "training")
    counts = np.bincount(label_N)
    if not trained_on.strip():
        raise DataError("DATA_EVALUATION", "it is not said which images the extractor is trained on")
    if images.shape[2] != images.shape[3]:
        raise DataError("DATA_EVALUATION", "the images to train an extractor on are not square")
    if len(counts) < 2 or counts.min() < 2 * FEWEST_OF_A_CLASS:
        what = f"an extractor needs at least two classes and {2 * FEWEST_OF_A_CLASS} images of each, numbered from 0"
        raise DataError("DATA_EVALUATION", what)

    side = min(images.shape[-1], LARGEST_SIDE)
    images, target_N = _scaled(images, side), torch.from_numpy(label_N)
    is_tested_N = np.zeros(len(label_N), bool)
    for label in range(len(counts)):
        is_tested_N[np.flatnonzero(label_N == label)[::TESTED_ONE_IN]] = True
    with _one_thread():
        extractor = fit(
            lambda: FeatureExtractor(side, len(counts), trained_on=trained_on),
            images[~is_tested_N],
            target_N[~is_tested_N],
            seed,
            steps=steps,
            batch=BATCH,
            learning_rate=LEARNING_RATE,
        )
        extractor.eval().requires_grad_(False)
        answers = torch.cat([extractor(part).argmax(1) for part in images[is_tested_N].split(ROWS_AT_ONCE)])
        extractor.accuracy = float((answers == target_N[is_tested_N]).double().mean())
        # Otherwise the scale of an extractor's features, which means nothing, would be the scale of its distances.
        features_NF = torch.cat([extractor.body(part) for part in images.split(ROWS_AT_ONCE)])
        extractor.mean.copy_(features_NF.mean(dim=0))
        extractor.deviation.copy_(features_NF.std(dim=0).clamp(min=SMALLEST_DEVIATION))
    return extractor


def load_extractor(path: Path) -> FeatureExtractor:
    """The extractor of a file that `FeatureExtractor.save` wrote.

    Raises:
        ModelError: MODEL_HASH, missing or damaged; MODEL_MISMATCH, another kind of file; MODEL_NOT_FINITE.
    """
    arrays, notes = checkpoint.read(path)
    try:
        side, classes = int(arrays.pop("side").item()), len(arrays["head.bias"])
        if notes["kind"] != _KIND or not SMALLEST_SIDE <= side <= LARGEST_SIDE:
            raise ValueError
        accuracy, trained_on = float(notes["accuracy"]), str(notes["trained_on"])
        with torch.device("meta"):
            extractor = FeatureExtractor(side, classes, trained_on=trained_on, accuracy=accuracy)
        weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if any(tensor.dtype != torch.float32 for tensor in weights.values()):
            raise ValueError
        extractor.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise ModelError("MODEL_MISMATCH", "the file holds no feature extractor", path.name) from None
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise ModelError("MODEL_NOT_FINITE", "the weights hold values that are not finite", path.name)
    return extractor.eval().requires_grad_(False)


def _scaled(images_N1HW: Tensor, side: int) -> Tensor:
    if images_N1HW.shape[2:] == (side, side):
        return images_N1HW
    return functional.interpolate(images_N1HW, size=(side, side), mode="bilinear", antialias=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over threads come out differently for every number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
