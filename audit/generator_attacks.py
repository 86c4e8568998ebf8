"""Does a finished generator give away whose images it was trained on?

The attacker has generated images and one patient's images, and asks: was this patient in the training set? Patients
whose images lie unusually near a generated image are suspects. The test: the training patients must not lie nearer
than as many OTHER patients of the same source, who were held out. Four attacks, one score a patient:

- nearest neighbour in pixels, averaged down to 16 x 16; and in the features of a fixed random convolutional network
  (Saxe et al. 2011; no weights are downloaded): the smallest distance to any generated image;
- GAN-Leaks, calibrated (Chen, Yu, Zhang, Fritz 2020, arXiv 1909.03935): that distance in features less the distance to
  a reference, because an ordinary image lies near everything. The reference is what another generator makes, or, if
  none is given, the images of all other patients here: both sides are treated alike, so no bias comes in;
- the same scores at a false positive rate of 1 % (Carlini et al. 2022): a generator that copies one patient in fifty
  hardly moves an average.

Gate. Per patient, the AUC is the chance that a training patient scores above a held-out one; 0.5 is no leak.

    failed     a lower confidence limit above 0.5 (or more patients found at 1 % than chance allows); the limits of the
               four attacks hold TOGETHER at the confidence given (Bonferroni), so an honest generator fails one time
               in twenty at most
    passed     no failure, and the upper limit of each AUC is at most TOLERATED_AUC: a large leak is ruled out
    too-few    neither: so few patients that a large leak may have been missed. This is not a pass

Why 0.6: the limits are only as narrow as the patients are many. On each side 180 patients let a generator without a
leak pass 0.6 about nineteen times in twenty (one AUC; the scores of three are alike but not equal), while 0.55 would
take 720 and most hospitals could never pass. A hospital with thousands of patients reads the limits themselves.

The holdout must be drawn at random from the same patients as the training set: images of another year or another
scanner are told apart by that alone. No epsilon covers the result; like the images it stays at the hospital.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from fedmedgan.audit.bounds import (
    CONFIDENCE,
    Finding,
    Verdict,
    auc,
    auc_limits,
    judge,
    smallest_auc_found,
    true_positives,
)
from fedmedgan.shared.errors import DataError

TOLERATED_AUC = 0.6
FALSE_POSITIVE_RATE = 0.01
FEWEST_PATIENTS = 20
"""On each side; below it nothing is computed that could be called a pass."""
FEWEST_FOR_ONE_PERCENT = 100
PIXEL_SIDE = 16
FEATURE_SIDE = 32
FEATURE_CHANNELS = (16, 32)
NETWORK_SEED = 20_481
ROWS_AT_ONCE = 512
ATTACKS = 4

Floats = NDArray[np.float64]


def generator_attacks(
    generated_N1SS: ArrayLike,
    training_N1SS: ArrayLike,
    training_patients: ArrayLike,
    holdout_N1SS: ArrayLike,
    holdout_patients: ArrayLike,
    *,
    reference_N1SS: ArrayLike | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[Finding, ...]:
    """All four attacks on one generator.

    Args:
        generated_N1SS: samples of the generator, in [-1, 1]; the more, the nearer the nearest: some thousands.
        training_N1SS: real images that it was trained on.
        training_patients: patient of each of them, number or name, the same for one patient on both sides.
        holdout_N1SS: real images of other patients of the same source, about as many.
        holdout_patients: patient of each of them.
        reference_N1SS: samples of a generator that saw neither side, for GAN-Leaks.
        seed: of the bootstrap.

    Raises:
        DataError: DATA_EVALUATION, in these cases:

            ==================================================  ====================
            images not (N, 1, S, S), none, or of unequal sizes  shape
            NaN or infinity in an image                         not finite
            images and patients differ in number                number
            a patient on both sides                             nobody is in and out
            ==================================================  ====================

    ====================================================  ===================================
    case                                                  result
    ====================================================  ===================================
    fewer than 20 patients on a side                      "too-few" unless a leak is plain
    fewer than 100 patients held out                      at 1 %: failed or "too-few"
    a patient with nine images                            one score: the nearest of the nine
    a generator that makes one image only                 passes: it shows nothing of anybody
    ====================================================  ===================================
    """
    started = time.perf_counter()
    generated, train, held = _images(generated_N1SS), _images(training_N1SS), _images(holdout_N1SS)
    reference = None if reference_N1SS is None else _images(reference_N1SS)
    if len({tuple(x.shape[1:]) for x in (generated, train, held, reference) if x is not None}) > 1:
        raise DataError("DATA_EVALUATION", "generated, training and held-out images differ in size")
    who_N, members = _patients(training_patients, holdout_patients, len(train), len(held))
    real = torch.cat([train, held])

    pixels = _nearest(_pixels(real), _pixels(generated))
    features = _features(real)
    near = _nearest(features, _features(generated))
    usual = _nearest(features, features, who_N) if reference is None else _nearest(features, _features(reference))
    scores = {
        "nearest neighbour, pixels": _per_patient(-pixels, who_N),
        "nearest neighbour, features": _per_patient(-near, who_N),
        "GAN-Leaks, calibrated": _per_patient(usual - near, who_N),
    }
    numbers = {
        "generated_images": len(generated),
        "training_patients": members,
        "training_images": len(train),
        "holdout_patients": int(who_N.max()) + 1 - members,
        "holdout_images": len(held),
    }
    level = (1 - confidence) / ATTACKS
    findings = [
        _auc_finding(name, score_P[:members], score_P[members:], numbers, confidence, level, seed)
        for name, score_P in scores.items()
    ]
    leaks_P = scores["GAN-Leaks, calibrated"]
    findings.append(_one_percent_finding(leaks_P[:members], leaks_P[members:], numbers, confidence, level))
    seconds = (time.perf_counter() - started) / ATTACKS
    return tuple(replace(finding, seconds=seconds) for finding in findings)


def gate(findings: Sequence[Finding]) -> Verdict:
    """One verdict on a generator: the worst of its attacks; without any attack "too-few"."""
    verdicts = {finding.verdict for finding in findings}
    if "failed" in verdicts:
        return "failed"
    return "passed" if verdicts == {"passed"} else "too-few"


def _auc_finding(
    name: str,
    member_P: Floats,
    other_P: Floats,
    numbers: dict[str, int],
    confidence: float,
    level: float,
    seed: int,
) -> Finding:
    measured = auc(member_P, other_P)
    lower, upper, ceiling = auc_limits(member_P, other_P, lower_level=level, upper_level=1 - confidence, seed=seed)
    smallest = smallest_auc_found(len(member_P), len(other_P), level=level)
    verdict = judge(lower, ceiling, 0.5)
    if verdict == "passed" and (upper > TOLERATED_AUC or min(len(member_P), len(other_P)) < FEWEST_PATIENTS):
        verdict = "too-few"
    return Finding(
        name=name,
        quantity="AUC",
        estimate=measured,
        lower_bound=lower,
        confidence=confidence,
        ceiling=ceiling,
        allowed=0.5,
        numbers={**numbers, "upper_bound": upper, "smallest_auc_found": smallest},
        seconds=0.0,
        verdict=verdict,
        explanation=(
            f"A training patient scores above a held-out one with chance {measured:.3f} (0.5 is no leak), at least "
            f"{lower:.3f} and at most {upper:.3f}. Of leaks of {smallest:.2f}, nine in ten would have been found with "
            f"so many patients; an attack that is always right could have shown at most {ceiling:.3f}."
        ),
    )


def _one_percent_finding(
    member_P: Floats, other_P: Floats, numbers: dict[str, int], confidence: float, level: float
) -> Finding:
    found = true_positives(member_P, other_P, false_positive_rate=FALSE_POSITIVE_RATE, level=level)
    verdict = judge(found.lower, found.ceiling, found.by_chance)
    few = len(member_P) < FEWEST_PATIENTS or len(other_P) < FEWEST_FOR_ONE_PERCENT
    return Finding(
        name="GAN-Leaks, calibrated, at 1 % false positives",
        quantity="TPR at 1 % FPR",
        estimate=found.rate,
        lower_bound=found.lower,
        confidence=confidence,
        ceiling=found.ceiling,
        allowed=found.by_chance,
        numbers={
            **numbers,
            "caught": found.caught,
            "false_positives": found.false_positives,
            "upper_bound": found.upper,
        },
        seconds=0.0,
        verdict="too-few" if verdict == "passed" and few else verdict,
        explanation=(
            f"{found.caught} of {len(member_P)} training patients score above all but {found.false_positives} of "
            f"{len(other_P)} held-out ones: {found.rate:.1%}, at least {found.lower:.1%} and at most "
            f"{found.upper:.1%}. Without a leak the lower limit stays at or below {found.by_chance:.1%}; an attack "
            f"that is always right could have shown at most {found.ceiling:.1%}."
        ),
    )


def _images(values: ArrayLike) -> Tensor:
    """As float32 (N, 1, S, S), or a DataError."""
    images = torch.from_numpy(np.array(values, dtype=np.float32))
    if images.ndim != 4 or images.shape[1] != 1 or min(images.shape) < 1 or images.shape[2] != images.shape[3]:
        raise DataError("DATA_EVALUATION", f"images have shape {tuple(images.shape)}, not (N, 1, S, S)")
    if not bool(images.isfinite().all()):
        raise DataError("DATA_EVALUATION", "images hold values that are not finite")
    return images


def _patients(training: ArrayLike, holdout: ArrayLike, train: int, held: int) -> tuple[NDArray[np.int64], int]:
    """Number of each image's patient, those of the training set first; and how many of those there are."""
    names_T, names_H = np.asarray(training).astype(str), np.asarray(holdout).astype(str)
    if names_T.shape != (train,) or names_H.shape != (held,):
        raise DataError("DATA_EVALUATION", "images and patients differ in number")
    if len(np.intersect1d(names_T, names_H)):
        raise DataError("DATA_EVALUATION", "a patient is both in the training set and held out")
    unique_T, number_T = np.unique(names_T, return_inverse=True)
    _, number_H = np.unique(names_H, return_inverse=True)
    return np.concatenate([number_T, number_H + len(unique_T)]), len(unique_T)


def _per_patient(score_N: Floats, who_N: NDArray[np.int64]) -> Floats:
    """The highest score of each patient's images."""
    best_P = np.full(int(who_N.max()) + 1, -np.inf)
    np.maximum.at(best_P, who_N, score_N)
    return best_P


def _nearest(from_NF: Tensor, to_MF: Tensor, who_N: NDArray[np.int64] | None = None) -> Floats:
    """Euclidean distance of each row to the nearest of `to_MF`; with `who_N` to the nearest of ANOTHER patient."""
    found = []
    for start in range(0, len(from_NF), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distances = torch.cdist(from_NF[rows], to_MF)
        if who_N is not None:
            distances[torch.from_numpy(who_N[rows, None] == who_N[None])] = torch.inf
        found.append(distances.min(dim=1).values)
    return torch.cat(found).double().numpy()


def _pixels(images_N1SS: Tensor) -> Tensor:
    return _at_most(images_N1SS, PIXEL_SIDE).flatten(1)


@torch.no_grad()
def _features(images_N1SS: Tensor) -> Tensor:
    """(N, 512): two layers of random convolutions, averaged over a 4 x 4 grid. The same network always."""
    source, layers, channels = torch.Generator().manual_seed(NETWORK_SEED), [], 1
    for wide in FEATURE_CHANNELS:
        layers.append(torch.randn(wide, channels, 5, 5, generator=source) * (2 / (25 * channels)) ** 0.5)
        channels = wide
    found = []
    for part in _at_most(images_N1SS, FEATURE_SIDE).split(ROWS_AT_ONCE):
        for weight in layers:
            part = functional.relu(functional.conv2d(part, weight, stride=2, padding=2))
        found.append(functional.adaptive_avg_pool2d(part, 4).flatten(1))
    return torch.cat(found)


def _at_most(images_N1SS: Tensor, side: int) -> Tensor:
    """Averaged down to `side` pixels; smaller images stay as they are."""
    if images_N1SS.shape[-1] <= side:
        return images_N1SS
    return functional.interpolate(images_N1SS, size=(side, side), mode="area")
