"""Are synthetic images of use? Train a classifier on them, test it on real ones (TSTR); and the other way (TRTS).

The classifier, its number of steps and its settings are fixed beforehand, and it sees no test image before the one
measurement: no early stopping, no choice among checkpoints, no threshold tuned on the test set. The reference "train
on real" is the same function with real training images of OTHER patients (`split_patients`).

Whatever reads real patients here does so without noise, so no epsilon covers it: docs/evaluation.md.

Source: Esteban, Hyland, Raetsch, "Real-valued (medical) time series generation with recurrent conditional
GANs", 2017.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.client.release.images import NotMeasurable, as_images, as_labels
from fedmedgan.shared.errors import DataError

STEPS = 300
BATCH = 32
LEARNING_RATE = 5e-3
FEWEST_OF_A_CLASS = 5
"""Images of each class, in training and in testing; below it a figure would mean nothing."""
LARGEST_SIDE = 64
"""Larger images are averaged down to this many pixels a side."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Utility:
    """Scores of the classifier on the test images, one for each seed of the classifier.

    `accuracy` counts correct answers. `auc` is the area under the ROC curve, one class against the rest,
    averaged over the classes. Deviations are those of a sample, 0 for a single seed. They cover the seed of
    the classifier alone: not the generator's, and not the choice of test patients.
    """

    accuracy: float
    accuracy_deviation: float
    accuracy_per_seed: tuple[float, ...]
    auc: float
    auc_deviation: float
    auc_per_seed: tuple[float, ...]
    chance: float
    """Accuracy of always answering the commonest class of the test set."""
    trained_on: int
    tested_on: int


def train_on_synthetic_test_on_real(
    synthetic_N1HW: Any,
    labels: Any,
    real_N1HW: Any,
    real_labels: Any,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
) -> Utility:
    """TSTR: train the fixed classifier on synthetic images, test it once on real ones; once for each seed.

    Batches hold every class with equal chance, so the mixture of labels in the training set plays no part.

    Args:
        synthetic_N1HW: training images in [-1, 1], array or tensor of any float type.
        labels: their classes 0..K-1, shape (N,).
        real_N1HW: test images of the same size, of patients that no training image shows.
        real_labels: their classes, shape (M,).
        seeds: one classifier each. The same seed gives the same result again on a CPU.
        device: where to train.

    Raises:
        DataError: DATA_EVALUATION, in these cases; the last three as NotMeasurable:

            ==================================================  ============================
            images not (N, 1, H, W), H or W below 8             shape
            sizes differ between training and testing           shape
            one label an image is not given                     shape
            labels negative or not whole numbers                labels
            NaN, infinity or a value outside [-1, 1]            values
            no seed                                             at least one is needed
            a single class                                      at least two are needed
            a class that only one side has                      classes differ
            fewer than FEWEST_OF_A_CLASS images of a class      too few
            ==================================================  ============================
    """
    tests = {"": (real_N1HW, real_labels)}
    return train_once_test_on_each(synthetic_N1HW, labels, tests, seeds=seeds, device=device)[""]


def train_on_real_test_on_synthetic(
    real_N1HW: Any,
    real_labels: Any,
    synthetic_N1HW: Any,
    labels: Any,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
) -> Utility:
    """TRTS: whether synthetic images show what their labels say, to a classifier that knows real ones.

    High for a generator that makes one good image of each class: read it beside TSTR. Arguments and errors like
    `train_on_synthetic_test_on_real`, with the sides exchanged.
    """
    tests = {"": (synthetic_N1HW, labels)}
    return train_once_test_on_each(real_N1HW, real_labels, tests, seeds=seeds, device=device)[""]


def train_once_test_on_each(
    train_N1HW: Any,
    labels: Any,
    tests: Mapping[str, tuple[Any, Any]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
) -> dict[str, Utility]:
    """`train_on_synthetic_test_on_real` for several test sets, name -> (images, labels), with the same classifiers."""
    images, label_N = _checked(train_N1HW, labels, "training")
    classes = np.unique(label_N)
    checked = {name: _checked(*test, "testing") for name, test in tests.items()}
    for test_images, test_label_N in checked.values():
        if images.shape[1:] != test_images.shape[1:]:
            raise DataError("DATA_EVALUATION", "training and test images differ in size")
        if not np.array_equal(classes, np.unique(test_label_N)):
            raise NotMeasurable("training and test images differ in their classes")
    if not seeds:
        raise DataError("DATA_EVALUATION", "no seed was given")

    images = images.to(device)
    target_N = torch.from_numpy(np.searchsorted(classes, label_N)).to(device)
    classifiers = [fit(lambda: _Classifier(len(classes)), images, target_N, seed, steps=STEPS) for seed in seeds]
    return {
        name: _measure(classifiers, test_images.to(device), np.searchsorted(classes, test_label_N), len(images))
        for name, (test_images, test_label_N) in checked.items()
    }


def fit(
    build: Callable[[], Network],
    images_N1HW: Tensor,
    target_N: Tensor,
    seed: int,
    *,
    steps: int,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
) -> Network:
    """Train a classifier of fixed length; every class is drawn equally often.

    Args:
        build: makes the network, of convolutions, GroupNorm and linear layers; its weights are drawn here.
        images_N1HW: training images on the device to train on.
        target_N: classes 0..K-1, each of them at least once, on the same device.
        seed: of weights and batches. Torch's global generator is neither read nor moved.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # the usual initialisation would draw from torch's global generator
        network = build()
    network.to_empty(device=images_N1HW.device)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:  # the scale of a GroupNorm
                parameter.fill_(1)
            else:  # He initialisation
                spread = (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    weight_N = (1 / torch.bincount(target_N.cpu()).float())[target_N.cpu()]
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.multinomial(weight_N, batch, replacement=True, generator=generator)
        optimiser.zero_grad()
        loss = functional.cross_entropy(network(images_N1HW[rows]), target_N[rows])
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    return network


def _measure(
    classifiers: list[_Classifier], images_N1HW: Tensor, truth_N: NDArray[np.int64], trained_on: int
) -> Utility:
    answers = [_predict(classifier, images_N1HW) for classifier in classifiers]
    accuracies = [float((chances_NK.argmax(1) == truth_N).mean()) for chances_NK in answers]
    aucs = [_auc(truth_N, chances_NK) for chances_NK in answers]
    return Utility(
        accuracy=statistics.fmean(accuracies),
        accuracy_deviation=_deviation(accuracies),
        accuracy_per_seed=tuple(accuracies),
        auc=statistics.fmean(aucs),
        auc_deviation=_deviation(aucs),
        auc_per_seed=tuple(aucs),
        chance=float(np.bincount(truth_N).max() / len(truth_N)),
        trained_on=trained_on,
        tested_on=len(truth_N),
    )


class _Classifier(nn.Module):
    """Three strided convolutions. GroupNorm: no statistics of training batches are carried to the test."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.GroupNorm(4, 8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),  # keeps roughly where in the chest a feature lies
            nn.Flatten(),
        )
        self.answer = nn.Linear(32 * 4 * 4, classes)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        return self.answer(self.features(images_N1HW))


@torch.no_grad()
def _predict(classifier: _Classifier, images_N1HW: Tensor) -> NDArray[np.float64]:
    logits = torch.cat([classifier(part) for part in torch.split(images_N1HW, 256)])
    return logits.double().softmax(1).cpu().numpy()


def _auc(truth_N: NDArray[np.int64], chances_NK: NDArray[np.float64]) -> float:
    if chances_NK.shape[1] == 2:
        return float(roc_auc_score(truth_N, chances_NK[:, 1]))
    return float(roc_auc_score(truth_N, chances_NK, multi_class="ovr", average="macro"))


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _checked(images: Any, labels: Any, role: str) -> tuple[Tensor, NDArray[np.int64]]:
    """Images as float32, averaged down to at most LARGEST_SIDE, and labels as integers; or a DataError."""
    images_N1HW = as_images(images, role)
    label_N = as_labels(labels, len(images_N1HW), role)
    classes, counts = np.unique(label_N, return_counts=True)
    if len(classes) < 2:
        raise NotMeasurable(f"the {role} images are all of one class")
    if counts.min() < FEWEST_OF_A_CLASS:
        which = f"class {classes[counts.argmin()]}"
        raise NotMeasurable(f"fewer than {FEWEST_OF_A_CLASS} {role} images of a class", which)
    sides = images_N1HW.shape[2:]
    longest = max(sides)
    if longest > LARGEST_SIDE:
        smaller = [max(8, round(side * LARGEST_SIDE / longest)) for side in sides]
        images_N1HW = functional.interpolate(images_N1HW, size=smaller, mode="area")
    return images_N1HW, label_N
