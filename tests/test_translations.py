"""Image to image under each rule: what was made of patients' images is sensitive, whatever it is compared with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_study
from torch import nn

from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.release import translations
from fedmedgan.client.release.rule import Rule
from fedmedgan.shared.errors import PrivacyError, StudyError

IMAGES = np.random.default_rng(0).uniform(-1, 1, (60, 1, 28, 28)).astype(np.float16)
LABELS = np.arange(60) % 2
PAIRED = {"images": {"paired": True}, "gan": {"recipe": "pix2pix", "private": "both", "task": "paired"}}


class Darker(nn.Module):
    """The second domain is the first one, darker."""

    def forward(self, images: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        return images - 0.5 * domain.view(-1, 1, 1, 1)


def test_everything_at_a_hospital_is_sensitive_and_nothing_may_leave():
    recipe = recipes.load(tiny_study(3, **PAIRED))
    pairs = translations.of_pairs(recipe, nn.Identity(), IMAGES, LABELS, -IMAGES, rule=Rule.LOCAL)
    ways = translations.of_translation(None, Darker(), IMAGES, LABELS, rule=Rule.LOCAL)
    found = [pairs.made, pairs.given, *(e for way in ways for e in (way.before, way.after))]
    for one in found:
        assert {part.privacy for part in (*one.measurements, *one.not_measured)} == {"sensitive"}
        free = one.may_leave()
        assert not free.measurements and not free.not_measured
    assert pairs.made.numbers() == pairs.given.numbers(), "the input itself was made of it"
    assert [(way.source, way.target) for way in ways] == [(0, 1), (1, 0)]
    assert ways[0].after.numbers()["mmd"] > ways[0].before.numbers()["mmd"]
    assert [(n.name, n.reason) for n in ways[0].after.not_measured] == [("kid", "no extractor was given")]


def test_a_release_has_no_image_made_of_an_image_and_public_ones_have_a_name():
    recipe = recipes.load(tiny_study(3, **PAIRED))
    for rule in (Rule.RELEASE, Rule.PUBLIC):
        with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
            translations.of_pairs(recipe, nn.Identity(), IMAGES, LABELS, -IMAGES, rule=rule)
        with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
            translations.of_translation(None, Darker(), IMAGES, LABELS, rule=rule)
    named = translations.of_translation(None, Darker(), IMAGES, LABELS, rule=Rule.PUBLIC, whose="noise")
    assert {part.privacy for way in named for part in (*way.after.measurements, *way.after.not_measured)} == {"public"}


def test_a_recipe_that_cannot_say_what_its_outputs_should_be_has_no_pairs():
    recipe = recipes.load(tiny_study(3))
    with pytest.raises(StudyError, match="CONFIG_RANGE"):
        translations.of_pairs(recipe, nn.Identity(), IMAGES, LABELS, IMAGES, rule=Rule.LOCAL)
