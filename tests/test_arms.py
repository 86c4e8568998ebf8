"""Comparison arms of recipes that no classifier can judge, and of a study that aggregates in its own way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_study
from PIL import Image

from fedmedgan.simulations import arms, consortium, phantoms, record

pytestmark = pytest.mark.slow


def compare(folder: Path, **sections) -> record.RunRecord:
    """The arms of a study that was prepared and not trained: its federated model is the initial one."""
    data = {}
    for i in range(3):
        data[f"site-{i}"] = folder / f"own-{i}"
        phantoms.write_hospital(data[f"site-{i}"], patients=24, seed=i, vendor=phantoms.vendor_for(i), size=32)
    phantoms.write_hospital(folder / "others", patients=12, seed=90, vendor=phantoms.vendor_for(0), size=32)
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


def test_one_class_has_images_and_no_score(tmp_path):
    ran = compare(tmp_path, gan={"recipe": "vanilla"}, images={"classes": ("any",)}, privacy="none")
    assert [arm.name for arm in ran.arms] == ["federated", *(f"alone-site-{i}" for i in range(3))]
    assert [(arm.private, arm.epsilon, arm.tstr, arm.similarity) for arm in ran.arms] == [(False, None, None, None)] * 4
    assert ran.real is None
    with np.load(ran.folder / "arms" / "federated.npz") as images:
        assert set(images["labels_N"]) == {0}
    assert "WITHOUT privacy" in json.loads((ran.folder / "arms.json").read_text())["arms"][0]["label"]
