"""Anomaly scores from a trained synthesis model, after f-AnoGAN (Schlegl et al. 2019, Medical Image Analysis 54).

An encoder learns to find the latent point that an image comes from. What the model cannot make again from that point,
the model has never seen: the score is the distance between an image and its reconstruction, in pixels and in what the
discriminator sees.

The paper trains its encoder on patients' images. Here it learns from generated images alone ("ziz" in the paper),
so it costs no privacy. Scores of a patient's image are that patient's data: they stay at the hospital.

The score of an image depends on that image alone, not on who else is scored: BatchNorm keeps to the statistics of one
fixed batch of generated images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.gans.parts.layers import pyramid
from fedmedgan.client.gans.recipe import Synthesis
from fedmedgan.client.release.classifiers import FEWEST_OF_A_CLASS
from fedmedgan.client.release.images import as_array, as_images, as_labels, at_least
from fedmedgan.shared.errors import DataError, StudyError
from fedmedgan.shared.study import Study

STEPS, BATCH = 1500, 64
LEARNING_RATE = 2e-3
FEATURES_WEIGHT = 1.0
"""kappa of the paper."""
ROWS_AT_ONCE = 256
"""Also the number of generated images that BatchNorm's statistics are of."""


class Encoder(nn.Module):
    """images (N, 1, S, S) and labels (N,) -> latent (N, Z)."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        base, channels = pyramid(study.images, 16)
        widths = [1, *channels]
        blocks: list[nn.Module] = []
        for narrow, wide in zip(widths, channels, strict=False):
            blocks += [nn.Conv2d(narrow, wide, 4, 2, 1), nn.GroupNorm(4, wide), nn.LeakyReLU(0.2)]
        self.classes = len(study.images.classes)
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.answer = nn.Linear(channels[-1] * base**2 + self.classes, study.gan.latent)

    def forward(self, images_N1SS: Tensor, labels_N: Tensor) -> Tensor:
        one_hot = functional.one_hot(labels_N, self.classes).to(images_N1SS.dtype)
        return self.answer(torch.cat([self.features(images_N1SS), one_hot], dim=1))


class AnomalyScorer:
    """Scores images against what a trained model takes for normal.

    Args:
        generator, discriminator: trained; left as they are. Without a discriminator, or with one of a recipe whose
            discriminator has no features, distances are those of pixels alone.
        study: of a synthesis recipe.
        steps: of the encoder, on generated images; a minute or so on a CPU at 28 x 28.
        seed: of the encoder's weights and of the images that it learns from.

    Raises:
        StudyError: CONFIG_RANGE, the recipe makes images of images, or its discriminator compares those of a batch.
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module | None, study: Study, *, steps: int = STEPS, seed: int = 0
    ) -> None:
        if not isinstance(recipes.load(study), Synthesis):
            hint = "train a recipe that makes images from noise"
            raise StudyError("CONFIG_RANGE", "anomaly scores need a synthesis model", "gan.recipe", hint=hint)
        if discriminator is not None and study.gan.minibatch_stddev:
            what, where = "the discriminator sees in each image those beside it", "gan.minibatch_stddev"
            raise StudyError("CONFIG_RANGE", what, where, hint="train without it")
        self.study = study
        latent = torch.randn(ROWS_AT_ONCE, study.gan.latent, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(ROWS_AT_ONCE) % len(study.images.classes)
        self.generator, images = _settled(generator, latent, labels)
        features = getattr(discriminator, "features", None)
        self.features = _settled(features, images)[0] if features is not None else None
        self.encoder = self._trained(steps, seed)

    @property
    def looks_at(self) -> str:
        """What distances are of, in words."""
        return "pixels alone" if self.features is None else "pixels and the discriminator's features"

    def _trained(self, steps: int, seed: int) -> Encoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = Encoder(self.study)
        random = torch.Generator().manual_seed(seed)
        adam = torch.optim.Adam(encoder.parameters(), LEARNING_RATE)
        with _fixed(self.generator):
            for _ in range(steps):
                latent = torch.randn(BATCH, self.study.gan.latent, generator=random)
                labels = torch.randint(len(self.study.images.classes), (BATCH,), generator=random)
                with torch.no_grad():
                    images = self.generator(latent, labels)
                found = encoder(images, labels)
                again = self.generator(found, labels)
                adam.zero_grad()
                loss = functional.mse_loss(found, latent) + functional.mse_loss(again, images)
                loss.backward()
                adam.step()
        return encoder.eval()

    @torch.no_grad()
    def reconstruct(self, images_N1SS: Any, labels: Any) -> NDArray[np.float32]:
        """What the model makes of the latent points of these images, (N, 1, S, S). Raises like `scores`."""
        images, label_N = self._checked(images_N1SS, labels)
        parts = zip(images.split(ROWS_AT_ONCE), label_N.split(ROWS_AT_ONCE), strict=True)
        return torch.cat([self.generator(self.encoder(x, y), y) for x, y in parts]).numpy()

    @torch.no_grad()
    def scores(self, images_N1SS: Any, labels: Any) -> NDArray[np.float64]:
        """Score of each image (N,): the higher, the less it looks like `labels` says. Sensitive where images are.

        Args:
            images_N1SS: in [-1, 1].
            labels: the class that each image is held against, usually that of healthy patients.

        Raises:
            DataError: DATA_EVALUATION, shapes, labels or values that cannot be.
        """
        images, label_N = self._checked(images_N1SS, labels)
        again = torch.from_numpy(self.reconstruct(images, label_N))
        score_N = (images - again).square().flatten(1).mean(1)
        if self.features is not None:
            pairs = zip(images.split(ROWS_AT_ONCE), again.split(ROWS_AT_ONCE), strict=True)
            apart = [(self.features(x) - self.features(y)).square().flatten(1).mean(1) for x, y in pairs]
            score_N = score_N + FEATURES_WEIGHT * torch.cat(apart)
        return score_N.double().numpy()

    def _checked(self, images_N1SS: Any, labels: Any) -> tuple[Tensor, Tensor]:
        images = as_images(images_N1SS, "scored")
        size = self.study.images.size
        if images.shape[2:] != (size, size):
            raise DataError("DATA_EVALUATION", f"the images have not the study's {size} x {size} pixels")
        label_N = as_labels(labels, len(images), "scored")
        if len(label_N) and label_N.max() >= len(self.study.images.classes):
            raise DataError("DATA_EVALUATION", "a label is no class of the study")
        return images, torch.from_numpy(label_N)


def normal_against_rest(scores_N: Any, is_normal_N: Any) -> float:
    """Area under the ROC curve: the chance that the score of an image that is not normal is above that of a normal one.

    0.5 is chance, 1 is perfect. Computed from patients it is sensitive.

    Args:
        scores_N: of `AnomalyScorer.scores`.
        is_normal_N: booleans, (N,).

    Raises:
        NotMeasurable: DATA_EVALUATION, fewer than FEWEST_OF_A_CLASS images that are normal, or that are not.
    """
    is_normal = as_array(is_normal_N).astype(bool)
    at_least(int(is_normal.sum()), FEWEST_OF_A_CLASS, "the AUC of normal images")
    at_least(int((~is_normal).sum()), FEWEST_OF_A_CLASS, "the AUC of images that are not normal")
    return float(roc_auc_score(~is_normal, as_array(scores_N)))


@torch.no_grad()
def _settled(network: nn.Module, *batch: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy whose BatchNorm layers keep to the statistics of this batch, so that rows are independent; and its answer.

    Training keeps no running statistics (`parts.layers.norm`): each layer would take those of the batch at hand.
    """
    settled = copy.deepcopy(network).cpu().eval()
    for layer in settled.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and not layer.track_running_stats:
            layer.track_running_stats, layer.momentum = True, 1.0
            layer.running_mean = torch.zeros(layer.num_features)
            layer.running_var = torch.ones(layer.num_features)
            layer.train()
    answers: Tensor = settled(*batch)
    return settled.eval(), answers


@contextmanager
def _fixed(network: nn.Module) -> Iterator[None]:
    """Weights need no gradient meanwhile."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
