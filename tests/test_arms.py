"""Comparison arms of recipes that no classifier can judge, and of a study that aggregates in its own way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_study
from PIL import Image

from fedmedgan.client import gans
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.release.features import load_extractor
from fedmedgan.simulations import arms, consortium, phantoms, recipe_words, record

pytestmark = pytest.mark.slow


def compare(folder: Path, others: int = 12, **sections) -> record.RunRecord:
    """The arms of a study that was prepared and not trained: its federated model is the initial one."""
    data, paired = {}, sections.get("images", {}).get("paired", False)
    for i in range(3):
        data[f"site-{i}"] = folder / f"own-{i}"
        vendor = phantoms.vendor_for(i)
        phantoms.write_hospital(data[f"site-{i}"], patients=24, seed=i, vendor=vendor, size=32, paired=paired)
    vendor = phantoms.vendor_for(0)
    phantoms.write_hospital(folder / "others", patients=others, seed=90, vendor=vendor, size=32, paired=paired)
    study = consortium.prepare(tiny_study(3, **sections), folder / "run", data, device="cpu")
    arms.run(folder / "run", study, test_folders=[folder / "others"])
    return record.load(folder / "run")


def test_image_to_image_is_judged_by_its_distance_to_the_target(tmp_path):
    gan = {"recipe": "pix2pix", "private": "both", "task": "super-resolution-4"}
    ran = compare(tmp_path, gan=gan, aggregation={"optimizer": "fedavgm", "share": "generator"})
    names = [arm.name for arm in ran.arms]
    assert names == ["federated", *(f"alone-site-{i}" for i in range(3)), "fedavg", "no-privacy"]
    assert [arm.private for arm in ran.arms] == [True] * 5 + [False]
    assert ran.real is None
    scores = [arm.similarity for arm in ran.arms]
    for arm, score in zip(ran.arms, scores, strict=True):
        assert arm.tstr is None
        assert score is not None
        assert 0 < score.psnr < 100
        assert score.tested_on == scores[0].tested_on > 12
        with Image.open(ran.folder / arm.picture) as picture:
            assert picture.size == (8 * 30 - 2, 2 * 30 - 2), "inputs, and below each what is made of it"
    assert len({(s.psnr_input, s.ssim_input, s.mae_input) for s in scores}) == 1, "nobody changes the input"
    assert len({s.psnr for s in scores}) == len(scores), "every arm is another generator"


def test_segmentation_is_judged_by_the_overlap_of_masks(tmp_path):
    gan = {"recipe": "pix2pix", "private": "both", "task": "paired"}
    ran = compare(tmp_path, gan=gan, images={"paired": True})
    for arm in ran.arms:
        assert arm.similarity is not None
        assert arm.similarity.dice is not None
        assert 0 <= arm.similarity.iou <= arm.similarity.dice <= 1
        assert arm.similarity.dice_input is not None
    assert len({arm.similarity.iou for arm in ran.arms}) > 1, "arms are other generators"


def test_domain_to_domain_is_judged_by_its_distance_to_the_other_domain(tmp_path):
    ran = compare(tmp_path, others=60, gan={"recipe": "cyclegan", "private": "both"})
    for arm in ran.arms:
        assert arm.translation is not None
        assert [(way.source, way.target) for way in arm.translation] == [("clear", "opacity"), ("opacity", "clear")]
        for way in arm.translation:
            assert set(way.before.numbers) == set(way.after.numbers) == {"kid", "kid_deviation", "mmd"}
            assert way.before.numbers != way.after.numbers
    assert len({json.dumps(arm.translation[0].before.numbers) for arm in ran.arms}) == 1, "nobody changes the input"
    assert len({json.dumps(arm.translation[0].after.numbers) for arm in ran.arms}) == len(ran.arms)


OWN = """
from fedmedgan.client.gans.parts.translation import PatchDiscriminator, Translation, UNet
class RECIPE(Translation):
    tasks = ("inpaint",)
    def build(self):
        return UNet(self.images, self.gan), PatchDiscriminator(1, self.gan)
    def samples(self, generator, rows, columns, seed):
        return generator(self.public_images(rows * columns, seed))
"""


def test_a_recipe_of_ones_own_from_image_to_image_is_shown_without_a_score(tmp_path, monkeypatch):
    """It needs no line outside its file: a task, rows and a way to be judged of its own, or none."""
    monkeypatch.setattr(gans, "__path__", [*gans.__path__, str(tmp_path)])
    (tmp_path / "own.py").write_text(OWN)
    study = tiny_study(3, gan={"recipe": "own", "private": "both", "task": "inpaint"})
    (tmp_path / "arms").mkdir()
    phantoms.write_hospital(tmp_path / "others", patients=4, seed=9, vendor=phantoms.vendor_for(0), size=32)
    arm, test = arms._Arm("federated", "federated", True, ("site-0",)), arms._Test((tmp_path / "others",), arms.DRAWN)
    recipe = recipes.load(study)
    assert arms._judged(tmp_path, study, arm, recipe.networks()[0], test) == {}
    assert (tmp_path / "arms" / "federated.png").exists()
    assert recipe.row_names() == ["as the recipe draws them"]
    assert recipe_words.facts(study)["task_in_words"] == "inpaint", "no other words for it are known"
    assert "no score" in recipe_words.how_judged(study, recipe.judged, scored=False, tested_on=None)


def test_one_class_has_images_that_are_judged_as_sets_and_no_classifier(tmp_path):
    ran = compare(tmp_path, gan={"recipe": "vanilla"}, images={"classes": ("any",)}, privacy="none")
    assert [arm.name for arm in ran.arms] == ["federated", *(f"alone-site-{i}" for i in range(3))]
    assert [(arm.private, arm.epsilon, arm.tstr, arm.similarity) for arm in ran.arms] == [(False, None, None, None)] * 4
    assert ran.real is not None
    assert ran.real.tstr is None
    for one in (*ran.arms, ran.real):
        assert one.quality is not None
        assert {"kid", "coverage", "ms_ssim", "duplicate_rate"} <= set(one.quality.numbers)
        assert [missing.name for missing in one.quality.not_measured] == ["fid"], "of twenty images"
    described = {m.settings["extractor_sha256"] for a in ran.arms for m in a.quality.measurements if m.name == "kid"}
    assert described == {load_extractor(ran.folder / arms.EXTRACTOR).sha256}
    with np.load(ran.folder / "arms" / "federated.npz") as images:
        assert set(images["labels_N"]) == {0}
        assert len(images["labels_N"]) == ran.arms[0].images_kept == arms.SYNTHETIC_IMAGES - ran.arms[0].images_dropped
    assert "WITHOUT privacy" in json.loads((ran.folder / "arms.json").read_text())["arms"][0]["label"]
