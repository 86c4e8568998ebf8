"""Everything that is measured of a generator's images, in one call and under one rule (`rule`).

    evaluate(images, labels, rule=Rule.PUBLIC, real_data="drawn phantoms",
             real=..., real_labels=..., holdout=..., holdout_labels=..., extractor=...)
    evaluate(images, labels, rule=Rule.LOCAL, ...same...).may_leave()
    evaluate(images, labels, rule=Rule.RELEASE)

A measure is handed the inputs that it names in METRICS and no others, and whether it is sensitive follows from these
names. So a measure that is called free has not seen a real image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmedgan.client.release import coverage, distances, duplicates, similarity
from fedmedgan.client.release.classifiers import (
    BATCH,
    FEWEST_OF_A_CLASS,
    LARGEST_SIDE,
    LEARNING_RATE,
    STEPS,
    Utility,
    train_on_real_test_on_synthetic,
    train_on_synthetic_test_on_real,
    train_once_test_on_each,
)
from fedmedgan.client.release.features import FeatureExtractor
from fedmedgan.client.release.holdout import split_patients
from fedmedgan.client.release.images import NotMeasurable, as_images, as_labels
from fedmedgan.client.release.rule import Evaluation, Measurement, NotMeasured, Privacy, Rule, Value
from fedmedgan.shared.errors import DataError, PrivacyError

__all__ = [
    "BATCH",
    "FEWEST_OF_A_CLASS",
    "LARGEST_SIDE",
    "LEARNING_RATE",
    "METRICS",
    "STEPS",
    "Evaluation",
    "Rule",
    "Utility",
    "evaluate",
    "split_patients",
    "train_on_real_test_on_synthetic",
    "train_on_synthetic_test_on_real",
    "train_once_test_on_each",
]

SEED = 0
"""Of pairs and subsets that are drawn."""


@dataclass(frozen=True)
class Metric:
    """One measure: the inputs that it is handed, by name, and what it makes of them."""

    reads: tuple[str, ...]
    measure: Callable[..., Mapping[str, float]]
    settings: Mapping[str, Value] = field(default_factory=dict)


def evaluate(
    synthetic: Any | None = None,
    labels: Any | None = None,
    *,
    rule: Rule,
    real: Any | None = None,
    real_labels: Any | None = None,
    holdout: Any | None = None,
    holdout_labels: Any | None = None,
    paired: tuple[Any, Any] | None = None,
    masks: tuple[Any, Any] | None = None,
    extractor: FeatureExtractor | None = None,
    metrics: Collection[str] | None = None,
    made_from_patients: bool = False,
    real_data: str = "",
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "cpu",
) -> Evaluation:
    """Measure synthetic images. Images are (N, 1, H, W) in [-1, 1], arrays or tensors; labels classes 0..K-1, (N,).

    Args:
        synthetic: images of a generator, made from noise and labels.
        labels: their classes; without, images count as one class and no classifier is trained.
        rule: see `Rule`. There is no default.
        real: real images, such as those that the generator was trained on.
        real_labels: their classes.
        holdout: real images of patients that are in no training set: the only ones that TSTR is tested on.
        holdout_labels: their classes.
        paired: images made from inputs, and the real images that they should be: PSNR, SSIM, MAE.
        masks: predicted masks and true ones, class of each pixel: Dice, IoU.
        extractor: the declared features of FID, KID, precision, recall, density and coverage.
        metrics: names of METRICS, whose inputs must be given. If None all whose inputs are given; the others are in
            `not_measured`, but for pairs and masks, which are inputs of another kind.
        made_from_patients: the synthetic images were made from patients' images, as image-to-image recipes do; then
            no number is free.
        real_data: under the public rule, which real images these are, in words.
        seeds: one classifier each.
        device: where classifiers are trained.

    Raises:
        PrivacyError: PRIVACY_RELEASE, no known rule; real images under the rule "release"; real images under the rule
            "public" without `real_data`.
        DataError: DATA_EVALUATION, images or labels of a wrong form; an unknown metric, or one whose inputs are not
            given. DATA_DUPLICATE, a held-out image is also among the real ones.

    ========================================  =====================================================
    case                                      result
    ========================================  =====================================================
    no extractor, no real or held-out images  what needs them is in `not_measured`, with the reason
    the same under the rule "release"         not mentioned: a release has no real images
    too few images, or a single class         the measure is in `not_measured`, with the reason
    no more images than features              FID is in `not_measured`; the others are measured
    a number that comes out as NaN            in `not_measured`
    no labels                                 classifiers are not trained; diversity over all images
    the hospital asks for `may_leave()`       free measurements only
    ========================================  =====================================================
    """
    rule = Rule.of(rule)
    given = {"real": real, "holdout": holdout, "paired": paired, "masks": masks}
    reads_real = made_from_patients or any(value is not None for value in given.values())
    if reads_real and rule is Rule.RELEASE:
        raise PrivacyError("PRIVACY_RELEASE", "real images were given to an evaluation for a release")
    if reads_real and rule is Rule.PUBLIC and not real_data.strip():
        raise PrivacyError("PRIVACY_RELEASE", "it is not said which public or drawn images the real ones are")

    inputs: dict[str, Any] = {"seeds": seeds, "device": device}
    inputs |= _images("synthetic", synthetic, "labels", labels)
    inputs |= _images("real", real, "real_labels", real_labels)
    inputs |= _images("holdout", holdout, "holdout_labels", holdout_labels)
    for name, pair in (("paired", paired), ("masks", masks)):
        inputs |= {} if pair is None else {name: pair}
    if synthetic is not None:
        inputs["groups"] = inputs.get("labels", np.zeros(len(inputs["synthetic"]), np.int64))
    _refuse_unequal(inputs)

    if extractor is None:
        possible = set(inputs)
    else:
        possible = {*inputs, *(f"{name}_features" for name in ("synthetic", "real") if name in inputs)}
    chosen = _chosen(metrics, possible)
    for name in ("synthetic", "real"):
        if extractor is not None and any(f"{name}_features" in METRICS[metric].reads for metric in chosen):
            inputs[f"{name}_features"] = extractor.extract(inputs[name])

    found: list[Measurement] = []
    missed: list[NotMeasured] = []
    if metrics is None and synthetic is not None and rule is not Rule.RELEASE:
        for name in [name for name in METRICS if name not in chosen and name not in _OF_PAIRS]:
            privacy = _privacy(METRICS[name], rule, made_from_patients) if reads_real else "free"
            missed.append(NotMeasured(name, privacy, _not_given(METRICS[name], possible)))
    for name in chosen:
        metric = METRICS[name]
        privacy = _privacy(metric, rule, made_from_patients)
        handed = {key: inputs[key] for key in metric.reads}
        try:
            values = metric.measure(**handed)
            found.append(Measurement(name, privacy, values, _settings(metric, handed, extractor)))
        except NotMeasurable as error:
            missed.append(NotMeasured(name, privacy, f"{error.what}; {error.where}" if error.where else error.what))
    return Evaluation(rule, tuple(found), tuple(missed), real_data if reads_real and rule is Rule.PUBLIC else "")


# --- what goes in ----------------------------------------------------------------------------------------


def _images(name: str, images: Any, labels_name: str, labels: Any) -> dict[str, Any]:
    if images is None:
        if labels is not None:
            raise DataError("DATA_EVALUATION", f"labels were given for {name} images, but no images")
        return {}
    checked = as_images(images, name)
    return {name: checked} | ({} if labels is None else {labels_name: as_labels(labels, len(checked), name)})


def _refuse_unequal(inputs: Mapping[str, Any]) -> None:
    sets = {name: inputs[name] for name in ("synthetic", "real", "holdout") if name in inputs}
    if len({tuple(images.shape[1:]) for images in sets.values()}) > 1:
        raise DataError("DATA_EVALUATION", f"{', '.join(sets)} images differ in size")
    if "real" in sets and "holdout" in sets:
        held, real = ({image.tobytes() for image in sets[name].numpy()} for name in ("holdout", "real"))
        if held & real:
            raise DataError("DATA_DUPLICATE", "a held-out image is also among the real images")


def _chosen(metrics: Collection[str] | None, possible: Collection[str]) -> list[str]:
    if metrics is None:
        return [name for name, metric in METRICS.items() if set(metric.reads) <= set(possible)]
    if unknown := sorted(set(metrics) - set(METRICS)):
        hint = f"one of {', '.join(METRICS)}"
        raise DataError("DATA_EVALUATION", f"no measure is called {', '.join(unknown)}", hint=hint)
    for name in metrics:
        if missing := [key for key in METRICS[name].reads if key not in possible]:
            where = ", ".join(missing).replace("_features", " with an extractor")
            raise DataError(
                "DATA_EVALUATION", f"{name} needs what is not given", where, hint="give it, or leave it out"
            )
    return [name for name in METRICS if name in metrics]


def _not_given(metric: Metric, possible: Collection[str]) -> str:
    """Which inputs of a measure were not given, in words."""
    needed = ["real" if name == "real_features" else name for name in metric.reads]
    missing = [name for name in needed if name not in possible]
    # without images nobody asks for their labels
    return ", ".join(_ABSENT[name] for name in missing if name.removesuffix("_labels") not in set(missing) - {name})


# --- what comes out --------------------------------------------------------------------------------------


def _privacy(metric: Metric, rule: Rule, made_from_patients: bool) -> Privacy:
    reads_real = made_from_patients or not SYNTHETIC_ONLY.issuperset(metric.reads)
    if not reads_real:
        return "free"
    return "public" if rule is Rule.PUBLIC else "sensitive"


def _settings(metric: Metric, handed: Mapping[str, Any], extractor: FeatureExtractor | None) -> dict[str, Value]:
    settings = dict(metric.settings)
    for name, value in handed.items():
        if isinstance(value, Tensor):
            settings[f"{name.removesuffix('_features')}_images"] = len(value)
        elif name in ("paired", "masks"):
            settings["pairs"] = len(value[0])
        elif name == "seeds":
            settings["seeds"] = len(value)
    if extractor is not None and any(name.endswith("_features") for name in handed):
        settings |= extractor.declaration()
    return settings


# --- the measures ----------------------------------------------------------------------------------------


def _ms_ssim(synthetic: Tensor, groups: NDArray[np.int64]) -> dict[str, float]:
    return {"ms_ssim": similarity.diversity(synthetic, groups, seed=SEED)}


def _duplicates(synthetic: Tensor) -> dict[str, float]:
    return {"duplicate_rate": duplicates.duplicate_rate(synthetic)}


def _copies(synthetic: Tensor, real: Tensor) -> dict[str, float]:
    return {"copied_rate": duplicates.copied_rate(synthetic, real)}


def _fid(synthetic_features: Tensor, real_features: Tensor) -> dict[str, float]:
    return {"fid": distances.frechet_distance(synthetic_features, real_features)}


def _kid(synthetic_features: Tensor, real_features: Tensor) -> dict[str, float]:
    mean, deviation = distances.kernel_distance(synthetic_features, real_features, seed=SEED)
    return {"kid": mean, "kid_deviation": deviation}


def _mmd(synthetic: Tensor, real: Tensor) -> dict[str, float]:
    return {"mmd": distances.mmd_of_images(synthetic, real, seed=SEED)}


def _precision_recall(synthetic_features: Tensor, real_features: Tensor) -> dict[str, float]:
    found = coverage.precision_recall(synthetic_features, real_features)
    return {"precision": found.precision, "recall": found.recall}


def _density_coverage(synthetic_features: Tensor, real_features: Tensor) -> dict[str, float]:
    found = coverage.density_coverage(synthetic_features, real_features)
    return {"density": found.density, "coverage": found.coverage}


def _tstr(
    synthetic: Tensor, labels: Any, holdout: Tensor, holdout_labels: Any, seeds: Sequence[int], device: str
) -> dict[str, float]:
    found = train_on_synthetic_test_on_real(synthetic, labels, holdout, holdout_labels, seeds=seeds, device=device)
    return _of_utility("tstr", found)


def _trts(
    real: Tensor, real_labels: Any, synthetic: Tensor, labels: Any, seeds: Sequence[int], device: str
) -> dict[str, float]:
    found = train_on_real_test_on_synthetic(real, real_labels, synthetic, labels, seeds=seeds, device=device)
    return _of_utility("trts", found)


def _trtr(
    real: Tensor, real_labels: Any, holdout: Tensor, holdout_labels: Any, seeds: Sequence[int], device: str
) -> dict[str, float]:
    tests = {"holdout": (holdout, holdout_labels)}
    found = train_once_test_on_each(real, real_labels, tests, seeds=seeds, device=device)
    return _of_utility("trtr", found["holdout"])


def _of_utility(name: str, found: Utility) -> dict[str, float]:
    return {
        f"{name}_accuracy": found.accuracy,
        f"{name}_accuracy_deviation": found.accuracy_deviation,
        f"{name}_auc": found.auc,
        f"{name}_auc_deviation": found.auc_deviation,
        f"{name}_chance": found.chance,
    }


def _paired(paired: tuple[Any, Any]) -> dict[str, float]:
    scores = {"psnr": similarity.psnr(*paired), "ssim": similarity.ssim(*paired), "mae": similarity.mae(*paired)}
    return {name: float(score_N.mean()) for name, score_N in scores.items()}


def _masks(masks: tuple[Any, Any]) -> dict[str, float]:
    return similarity.dice_and_iou(*masks)


SYNTHETIC_ONLY = frozenset({"synthetic", "labels", "groups", "synthetic_features", "seeds", "device"})
"""Inputs that show no real image. All others do, so a new input is sensitive until it is listed here."""

_ABSENT = {
    "synthetic_features": "no extractor was given",
    "labels": "no labels of the synthetic images were given",
    "real": "no real images were given",
    "real_labels": "no labels of the real images were given",
    "holdout": "no held-out images were given",
    "holdout_labels": "no labels of the held-out images were given",
}
_OF_PAIRS = ("paired", "masks")
_FEATURES = ("synthetic_features", "real_features")
_CLASSIFIER: Mapping[str, Value] = {"steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE}

METRICS: Mapping[str, Metric] = {
    "ms_ssim": Metric(("synthetic", "groups"), _ms_ssim, {"most_pairs": similarity.PAIRS}),
    "duplicates": Metric(("synthetic",), _duplicates, {"distance": duplicates.LARGEST_DISTANCE}),
    "copies": Metric(("synthetic", "real"), _copies, {"distance": duplicates.LARGEST_DISTANCE}),
    "fid": Metric(_FEATURES, _fid),
    "kid": Metric(_FEATURES, _kid, {"subsets": distances.KID_SUBSETS}),
    "mmd": Metric(("synthetic", "real"), _mmd, {"side": distances.MMD_SIDE, "most_images": distances.MMD_MOST}),
    "precision_recall": Metric(_FEATURES, _precision_recall, {"k": coverage.PRECISION_K}),
    "density_coverage": Metric(_FEATURES, _density_coverage, {"k": coverage.COVERAGE_K}),
    "tstr": Metric(("synthetic", "labels", "holdout", "holdout_labels", "seeds", "device"), _tstr, _CLASSIFIER),
    "trts": Metric(("real", "real_labels", "synthetic", "labels", "seeds", "device"), _trts, _CLASSIFIER),
    "trtr": Metric(("real", "real_labels", "holdout", "holdout_labels", "seeds", "device"), _trtr, _CLASSIFIER),
    "paired": Metric(("paired",), _paired),
    "masks": Metric(("masks",), _masks),
}
"""Every measure by its name. A name may make several numbers."""
