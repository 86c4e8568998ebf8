"""Are synthetic images of use? Train a classifier on them, test it on real ones (TSTR).

The classifier, its number of steps and its settings are fixed beforehand, and it sees no real test image
before the one measurement: no early stopping, no choice among checkpoints, no threshold tuned on the test
set. The reference "train on real" is the same function with real training images of OTHER patients
(`split_patients`).

The result is computed from real patients without noise, so no epsilon covers it. Under a study it stays at
the hospital unless the hospital decides otherwise; simulations print it: their data are public or drawn.

Source: Esteban, Hyland, Raetsch, "Real-valued (medical) time series generation with recurrent conditional
GANs", 2017.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.shared.errors import DataError

STEPS = 300
BATCH = 32
LEARNING_RATE = 5e-3
FEWEST_OF_A_CLASS = 5
"""Images of each class, in training and in testing; below it a figure would mean nothing."""
LARGEST_SIDE = 64
"""Larger images are averaged down to this many pixels a side."""


@dataclass(frozen=True)
class Utility:
    """Scores of the classifier on the real test images, one for each seed of the classifier.

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
    """Train the fixed classifier on `synthetic_N1HW`, test it once on `real_N1HW`; once for each seed.

    Batches hold every class with equal chance, so the mixture of labels in the training set plays no part.

    Args:
        synthetic_N1HW: training images in [-1, 1], array or tensor of any float type.
        labels: their classes 0..K-1, shape (N,).
        real_N1HW: test images of the same size, of patients that no training image shows.
        real_labels: their classes, shape (M,).
        seeds: one classifier each. The same seed gives the same result again on a CPU.
        device: where to train.

    Raises:
        DataError: DATA_EVALUATION, in these cases:

            ==================================================  ============================
            images not (N, 1, H, W), H or W below 8             shape
            sizes differ between training and testing           shape
            one label an image is not given                     shape
            labels negative or not whole numbers                labels
            NaN or infinity in an image                         not finite
            a single class                                      at least two are needed
            a class that only one side has                      classes differ
            fewer than FEWEST_OF_A_CLASS images of a class      too few
            no seed                                             at least one is needed
            ==================================================  ============================
    """
    tests = {"": (real_N1HW, real_labels)}
    return train_once_test_on_each(synthetic_N1HW, labels, tests, seeds=seeds, device=device)[""]


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
            raise DataError("DATA_EVALUATION", "training and test images differ in their classes")
    if not seeds:
        raise DataError("DATA_EVALUATION", "no seed was given")

    images = images.to(device)
    target_N = torch.from_numpy(np.searchsorted(classes, label_N)).to(device)
    classifiers = [_train(images, target_N, len(classes), seed) for seed in seeds]
    return {
        name: _measure(classifiers, test_images.to(device), np.searchsorted(classes, test_label_N), len(images))
        for name, (test_images, test_label_N) in checked.items()
    }


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


def split_patients(patient_N: Any, holdout_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows for training and rows held out, no patient in both.

    Args:
        patient_N: patient of each image, integers or strings.
        holdout_fraction: fraction of the PATIENTS to hold out, in (0, 1); at least one stays on either side.
        seed: chooses the patients; independent of the order of the images.

    Returns:
        Sorted row numbers (training, held out).

    Raises:
        DataError: DATA_EVALUATION, fewer than two patients or a fraction outside (0, 1).
    """
    patient_N = np.asarray(patient_N)
    patients = np.unique(patient_N)
    if not 0 < holdout_fraction < 1:
        raise DataError("DATA_EVALUATION", f"the hold-out fraction {holdout_fraction} is not between 0 and 1")
    if patient_N.ndim != 1 or len(patients) < 2:
        raise DataError("DATA_EVALUATION", "at least two patients are needed to hold one out")
    count = min(max(round(holdout_fraction * len(patients)), 1), len(patients) - 1)
    held = np.random.default_rng(seed).choice(patients, size=count, replace=False)
    is_held_N = np.isin(patient_N, held)
    return np.flatnonzero(~is_held_N), np.flatnonzero(is_held_N)


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


def _train(images_N1HW: Tensor, target_N: Tensor, classes: int, seed: int) -> _Classifier:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # the usual initialisation would draw from torch's global generator
        classifier = _Classifier(classes)
    classifier.to_empty(device=images_N1HW.device)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:  # the scale of a GroupNorm
                parameter.fill_(1)
            else:  # He initialisation
                spread = (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    counts_K = torch.bincount(target_N.cpu(), minlength=classes)
    weight_N = (1 / counts_K.float())[target_N.cpu()]
    optimiser = torch.optim.Adam(classifier.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.multinomial(weight_N, BATCH, replacement=True, generator=generator)
        optimiser.zero_grad()
        loss = functional.cross_entropy(classifier(images_N1HW[rows]), target_N[rows])
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    return classifier


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


def _as_array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _checked(images: Any, labels: Any, role: str) -> tuple[Tensor, NDArray[np.int64]]:
    """Images as float32, averaged down to at most LARGEST_SIDE, and labels as integers; or a DataError."""
    images_N1HW = torch.from_numpy(np.array(_as_array(images), dtype=np.float32))
    label_N = _as_array(labels)
    shape = images_N1HW.shape
    if images_N1HW.ndim != 4 or shape[1] != 1 or min(shape[2:]) < 8:
        raise DataError("DATA_EVALUATION", f"the {role} images have shape {tuple(shape)}, not (N, 1, H, W)")
    if label_N.shape != (len(images_N1HW),):
        raise DataError("DATA_EVALUATION", f"the {role} images and their labels differ in number")
    if label_N.dtype.kind not in "iu" or (label_N < 0).any():
        raise DataError("DATA_EVALUATION", f"the {role} labels are not whole numbers from 0")
    if not bool(torch.isfinite(images_N1HW).all()):
        raise DataError("DATA_EVALUATION", f"the {role} images hold values that are not finite")
    classes, counts = np.unique(label_N, return_counts=True)
    if len(classes) < 2:
        raise DataError("DATA_EVALUATION", f"the {role} images are all of one class")
    if counts.min() < FEWEST_OF_A_CLASS:
        raise DataError(
            "DATA_EVALUATION",
            f"fewer than {FEWEST_OF_A_CLASS} {role} images of a class",
            f"class {classes[counts.argmin()]}",
        )
    longest = max(shape[2:])
    if longest > LARGEST_SIDE:
        sides = [max(8, round(side * LARGEST_SIDE / longest)) for side in shape[2:]]
        images_N1HW = functional.interpolate(images_N1HW, size=sides, mode="area")
    return images_N1HW, label_N.astype(np.int64)
