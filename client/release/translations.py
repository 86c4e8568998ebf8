"""How good a model is that makes images of images: its outputs beside what they should be, under one rule (`rule`).

    Recipe.judged   how                                                       measures
    "pairs"         each output beside its own target, and the input too      PSNR, SSIM, MAE; of masks Dice, IoU
    "domains"       each domain as a set, brought to the other one, beside    KID, MMD
                    the other's own; and as it is

Everything here is made of the images that it is tested on, so nothing is free: public in a simulation, sensitive at a
hospital.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from fedmedgan.client.gans.recipe import Recipe, Records
from fedmedgan.client.release.evaluate import evaluate
from fedmedgan.client.release.features import FeatureExtractor
from fedmedgan.client.release.images import as_array
from fedmedgan.client.release.rule import Evaluation, NotMeasured, Rule
from fedmedgan.client.training.randomness import InsecureRandom, RandomSource
from fedmedgan.shared.errors import StudyError

OF_SETS = ("kid", "mmd")
WITHOUT_FEATURES = ("mmd",)
WHITE = 0.99
ROWS_AT_ONCE = 64


@runtime_checkable
class InPairs(Protocol):
    """A recipe that knows what each output should be."""

    def input_and_output(self, records: Records, random: RandomSource) -> tuple[Tensor, Tensor]:
        """What the generator gets, and what it is to make of it."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Outputs beside their targets, and what had to be bettered."""

    made: Evaluation
    given: Evaluation
    """Of the inputs as they are."""


@dataclass(frozen=True)
class Way:
    """Images of one domain beside those of the other."""

    source: int
    target: int
    """Places in the study's classes, 0 and 1."""
    before: Evaluation
    """Of the images as they are."""
    after: Evaluation
    """Of the images brought to the other domain."""


def of_pairs(
    recipe: Recipe, generator: nn.Module, images: Any, labels: Any, targets: Any, *, rule: Rule, whose: str = ""
) -> Pairs:
    """Means over held-out images of what the generator makes of them, and of the inputs as they are.

    Args:
        recipe: judged by pairs.
        images: (N, 1, S, S) in [-1, 1], array of any float type, of patients that the generator was not trained on.
        labels: their classes, (N,).
        targets: of the same shape as `images`; the images themselves where the study has none.
        rule: see `Rule`.
        whose: under the public rule, whom the images show, in words.

    Raises:
        StudyError: CONFIG_RANGE, the recipe does not say what its outputs should be.
        PrivacyError, DataError: like `evaluate`.
    """
    if not isinstance(recipe, InPairs):
        what, where = "the recipe is judged by pairs and has no input_and_output", f"gan.recipe: {recipe.gan.recipe}"
        raise StudyError("CONFIG_RANGE", what, where, hint="define it in the recipe's file")
    label_N = torch.from_numpy(np.asarray(as_array(labels), np.int64))
    records = Records(_tensor(images), label_N, _tensor(targets))
    given, wanted = recipe.input_and_output(records, InsecureRandom(0))
    with torch.no_grad():
        made = torch.cat([generator(part) for part in given.split(ROWS_AT_ONCE)]).clamp(-1, 1)

    def judged(outputs: Tensor) -> Evaluation:
        masks = (outputs > 0, wanted > 0) if are_masks(wanted) else None
        return evaluate(rule=rule, paired=(outputs, wanted), masks=masks, real_data=whose)

    return Pairs(judged(made), judged(given))


def are_masks(targets_N1HW: Tensor) -> bool:
    """Whether targets are masks: of what is not black, a fifth or more is white.

    A mask that was scaled has grey edges (`client.data.targets`), so two values are too much to ask for. Another
    modality has hardly a pixel at the white end.
    """
    white, grey = targets_N1HW > WHITE, targets_N1HW.abs() <= WHITE
    return int(white.sum()) > int(grey.sum()) / 4


def of_translation(
    features: FeatureExtractor | None,
    generator: nn.Module,
    images: Any,
    labels: Any,
    *,
    rule: Rule,
    whose: str = "",
) -> list[Way]:
    """Held-out images of each domain, as they are and brought to the other one, beside the other's own, as sets.

    Args:
        features: the declared extractor; without, KID is in `not_measured`.
        images: (N, 1, S, S) in [-1, 1], array of any float type.
        labels: the domain of each, 0 or 1, (N,).
        rule: see `Rule`.
        whose: under the public rule, whom the images show, in words.

    Returns:
        Both ways, from the first domain to the second one first.

    Raises:
        PrivacyError, DataError: like `evaluate`.
    """
    image_N1SS, label_N = _tensor(images), as_array(labels)

    def judged(one_side: Tensor, other: Tensor) -> Evaluation:
        found = evaluate(
            one_side,
            rule=rule,
            real=other,
            real_data=whose,
            extractor=features,
            metrics=WITHOUT_FEATURES if features is None else OF_SETS,
            made_from_patients=True,
        )
        return found if features is not None else _without_kid(found)

    ways = []
    for source, target in ((0, 1), (1, 0)):
        ours, others = (image_N1SS[torch.from_numpy(label_N == domain)] for domain in (source, target))
        with torch.no_grad():
            parts = [generator(part, torch.full((len(part),), target)) for part in ours.split(ROWS_AT_ONCE)]
        ways.append(Way(source, target, judged(ours, others), judged(torch.cat(parts).clamp(-1, 1), others)))
    return ways


def _without_kid(found: Evaluation) -> Evaluation:
    missed = NotMeasured("kid", "public" if found.rule is Rule.PUBLIC else "sensitive", "no extractor was given")
    return replace(found, not_measured=(*found.not_measured, missed))


def _tensor(images: Any) -> Tensor:
    return torch.from_numpy(np.asarray(as_array(images), np.float32))
