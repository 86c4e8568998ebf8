"""What is measured of a comparison arm's images, and which of them are written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import tiny_study
from pydantic import TypeAdapter
from torch import nn

from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.release import translations
from fedmedgan.client.release.features import FeatureExtractor
from fedmedgan.simulations import arms, phantoms, quality
from fedmedgan.simulations.record import Quality

SIDE = 28
WHOSE = "drawn phantoms"


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Phantoms, their labels, and masks of their lungs with grey edges, as scaling leaves them."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 2
    images, lungs = phantoms.radiographs_and_lungs(phantoms.draw_anatomy(rng, count), labels, 4 * SIDE, rng)
    images, lungs = (a.reshape(count, 1, SIDE, 4, SIDE, 4).mean((3, 5)) * 2 - 1 for a in (images, lungs))
    return images.astype(np.float32), labels, lungs.astype(np.float32)


@pytest.fixture(scope="module")
def features() -> FeatureExtractor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "STEPS", 20)
        return quality.extractor(SIDE)


def read(found: dict) -> Quality:
    """The record as the report reads it; a part that must stay could not be."""
    return TypeAdapter(Quality).validate_json(json.dumps(found))


def test_images_of_noise_are_measured_against_held_out_ones(features):
    images, labels, _ = drawn(120, 1)
    held_out = drawn(100, 2)[0]
    good = read(quality.of_images(features, images, labels, held_out, WHOSE))
    worse = np.clip(images + np.random.default_rng(0).normal(0, 0.4, images.shape), -1, 1)
    bad = read(quality.of_images(features, worse, labels, held_out, WHOSE)).numbers
    assert set(good.numbers) == {
        "fid", "kid", "kid_deviation", "ms_ssim", "duplicate_rate", "precision", "recall", "density", "coverage",
    }  # fmt: skip
    assert good.statement.endswith(WHOSE)
    assert bad["fid"] > 2 * good.numbers["fid"]
    assert bad["kid"] > good.numbers["kid"]
    assert {m.name: m.privacy for m in good.measurements} == {
        **dict.fromkeys(("ms_ssim", "duplicates"), "free"),
        **dict.fromkeys(("fid", "kid", "precision_recall", "density_coverage"), "public"),
    }
    of_real = read(quality.of_images(features, images, labels, held_out, WHOSE, are_real=True))
    assert {m.privacy for m in of_real.measurements} == {"public"}, "they were not made of noise"


def test_too_few_images_are_said_to_be_too_few(features):
    images, labels, _ = drawn(120, 1)
    found = read(quality.of_images(features, images, labels, images[:30], WHOSE))
    assert [(missing.name, missing.reason) for missing in found.not_measured] == [
        ("fid", "FID of 64 features needs at least 65 images; 30 given")
    ]


def test_masks_are_told_from_other_targets():
    images, _, lungs = (torch.from_numpy(a) for a in drawn(20, 3))
    assert int((lungs.abs() < translations.WHITE).sum()) > 0, "the edges are grey"
    assert translations.are_masks(lungs)
    assert not translations.are_masks(images)
    assert not translations.are_masks(torch.full((3, 1, 8, 8), -1.0)), "empty masks only"


@pytest.mark.parametrize("targets", ["masks", "images"])
def test_masks_get_their_overlap_and_other_targets_do_not(targets):
    class Perfect(nn.Module):
        """Knows all targets, and gives them in turn."""

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(wanted[: len(given)])

    images, labels, lungs = drawn(20, 3)
    wanted = lungs if targets == "masks" else images[::-1].copy()
    study = tiny_study(3, images={"paired": True}, gan={"recipe": "pix2pix", "private": "both", "task": "paired"})
    recipe = recipes.load(study)
    scores = quality.of_pairs(recipe, Perfect(), images, labels, wanted, WHOSE)
    assert (scores["psnr"], scores["mae"], scores["tested_on"]) == (100, 0, 20)
    assert scores["psnr_input"] < 30
    if targets == "masks":
        assert (scores["dice"], scores["iou"]) == (1, 1)
        assert scores["iou_input"] < scores["dice_input"] < 0.8
    else:
        assert "dice" not in scores


def test_a_translation_is_measured_before_and_after(features):
    class Shifts(nn.Module):
        """The second domain is the first one, darker."""

        def forward(self, images: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
            return images - (domain.view(-1, 1, 1, 1) * 2 - 1) * 0.5

    images, labels, _ = drawn(120, 4)
    images = images * 0.5 - 0.5 * labels[:, None, None, None].astype(np.float32)
    found = quality.of_translation(features, Shifts(), images, labels, ("bright", "dark"), WHOSE)
    assert [(t["source"], t["target"]) for t in found] == [("bright", "dark"), ("dark", "bright")]
    for way in found:
        before, after = read(way["before"]).numbers, read(way["after"]).numbers
        assert after["mmd"] < before["mmd"] / 5
        assert after["kid"] < before["kid"] / 5


def test_a_domain_without_images_is_said_to_have_none(features):
    images, _, _ = drawn(30, 4)
    found = quality.of_translation(features, Two(), images, np.zeros(30, np.int64), ("one", "two"), WHOSE)
    assert {m["reason"] for way in found for m in way["after"]["not_measured"]} == {
        "KID needs at least 20 images; 0 given", "MMD needs at least 20 images; 0 given",
    }  # fmt: skip


class Two(nn.Module):
    def forward(self, images: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        return images


class Collapsed(nn.Module):
    """Makes one image of each class, whatever the noise."""

    def forward(self, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(drawn(2, 5)[0])[labels]


def test_near_duplicates_are_not_written(tmp_path):
    study = tiny_study(3)
    (tmp_path / "arms").mkdir()
    arm = arms._Arm("federated", "federated, private", True, ("site-0",))
    found = arms._judged(tmp_path, study, arm, Collapsed(), arms._Test((), ""))
    assert (found["images_kept"], found["images_dropped"]) == (2, arms.SYNTHETIC_IMAGES - 2)
    with np.load(tmp_path / found["images"]) as written:
        assert list(written["labels_N"]) == [0, 1]
        np.testing.assert_allclose(written["images_N1HW"] / 127.5 - 1, drawn(2, 5)[0], atol=0.01)
