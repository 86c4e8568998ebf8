"""Anomaly scores: what the model knows scores low, what it does not know scores high."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_study
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.release.anomaly import AnomalyScorer
from fedmedgan.shared.errors import DataError, StudyError


class Stripes(nn.Module):
    """A "trained" generator: stripes whose place and brightness are the latent point; the class turns them."""

    def forward(self, latent_NZ: Tensor, labels_N: Tensor) -> Tensor:
        axis = torch.linspace(-2, 2, 28)
        wave = torch.sin(3 * axis[None, :] + latent_NZ[:, :1]) * torch.sigmoid(latent_NZ[:, 1:2])
        across = wave[:, None, None, :].expand(-1, 1, 28, 28)
        return torch.where(labels_N.view(-1, 1, 1, 1) == 0, across, across.transpose(2, 3))


@pytest.fixture(scope="module")
def scorer() -> AnomalyScorer:
    torch.set_num_threads(1)
    study = tiny_study(gan={"latent": 2})
    return AnomalyScorer(Stripes(), recipes.load(study).networks()[1], study, steps=150)


def some(label: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    labels = torch.full((n,), label)
    latent = torch.randn(n, 2, generator=torch.Generator().manual_seed(9))
    return Stripes()(latent, labels).numpy(), labels.numpy()


def test_images_of_the_model_score_low_and_with_a_blot_high(scorer):
    images, labels = some(0)
    blotted = images.copy()
    blotted[:, :, 8:16, 8:16] = 1
    scores = scorer.scores(np.concatenate([images, blotted]), np.concatenate([labels, labels]))
    assert roc_auc_score(np.repeat([0, 1], len(images)), scores) > 0.95


def test_an_image_is_held_against_the_class_that_is_named(scorer):
    images, labels = some(0)
    assert scorer.scores(images, labels).mean() < 0.5 * scorer.scores(images, 1 - labels).mean()


def test_a_reconstruction_is_near_the_image(scorer):
    images, labels = some(1)
    again = scorer.reconstruct(images, labels)
    assert again.shape == images.shape
    assert np.square(again - images).mean() < 0.3 * np.square(images).mean()


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
def test_a_score_is_of_its_image_alone(norm):
    gan = {"generator_norm": norm, "norm": norm, "generator_width": 8}
    study = tiny_study(gan=gan, privacy="none")
    networks = recipes.load(study).networks()
    before = [p.clone() for network in networks for p in network.parameters()]
    one = AnomalyScorer(*networks, study, steps=5)
    random = torch.Generator().manual_seed(3)
    images, labels = (torch.rand(20, 1, 28, 28, generator=random) * 2 - 1).numpy(), np.arange(20) % 2
    together = one.scores(images, labels)
    alone = [one.scores(images[i : i + 1], labels[i : i + 1])[0] for i in range(20)]
    np.testing.assert_allclose(alone, together, rtol=1e-6)
    assert np.ptp(together) > 1e-3
    after = [p for network in networks for p in network.parameters()]
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, after, strict=True))


def test_batch_statistics_are_those_of_many_generated_images():
    """The model as it is used for generating: a large batch, classes in turn."""
    study = tiny_study(gan={"generator_norm": "batch"})
    generator, discriminator = recipes.load(study).networks()
    one = AnomalyScorer(generator, discriminator, study, steps=1)
    latent, labels = torch.randn(256, 8, generator=torch.Generator().manual_seed(7)), torch.arange(256) % 2
    with torch.no_grad():
        torch.testing.assert_close(one.generator(latent, labels), generator(latent, labels), rtol=0, atol=0.05)


def test_a_discriminator_that_compares_images_is_refused():
    study = tiny_study(gan={"minibatch_stddev": True}, privacy="none")
    with pytest.raises(StudyError, match="minibatch_stddev"):
        AnomalyScorer(*recipes.load(study).networks(), study, steps=1)


def test_bad_input_is_refused(scorer):
    images, labels = some(0, 6)
    for bad in (
        (images[:, :, :20, :20], labels),
        (images, labels + 5),
        (images, labels[:3]),
        (images * np.nan, labels),
    ):
        with pytest.raises(DataError) as caught:
            scorer.scores(*bad)
        assert caught.value.code == "DATA_EVALUATION"


def test_an_image_to_image_model_is_no_synthesis_model():
    study = tiny_study(gan={"recipe": "pix2pix", "private": "both", "task": "denoise"})
    with pytest.raises(StudyError, match="synthesis"):
        AnomalyScorer(*recipes.load(study).networks(), study, steps=1)
