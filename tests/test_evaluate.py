"""One call, one rule: right numbers, refusals, and nothing of patients in what may leave."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest

from fedmedgan.client.release import classifiers, coverage, distances, duplicates, similarity
from fedmedgan.client.release.evaluate import METRICS, SYNTHETIC_ONLY, Metric, Rule, evaluate
from fedmedgan.client.release.features import FeatureExtractor, train_extractor
from fedmedgan.client.release.rule import MUST_STAY, refuse_in_release
from fedmedgan.shared.errors import DataError, PrivacyError
from fedmedgan.simulations.phantoms import draw_anatomy, radiographs

SIDE = 16
FREE = ("ms_ssim", "duplicates")
QUICK = ("ms_ssim", "duplicates", "copies", "fid", "kid", "mmd", "precision_recall", "density_coverage", "paired")


def phantoms(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = radiographs(draw_anatomy(rng, count), labels, SIDE, rng)
    return (images[:, None] * 2 - 1).astype(np.float16), labels


SYNTHETIC, REAL, HOLDOUT = phantoms(120, 1), phantoms(100, 2), phantoms(60, 3)
MASK = SYNTHETIC[0] > 0
PAIRED, MASKS = (SYNTHETIC[0][:50], REAL[0][:50]), (MASK[:50], REAL[0][:50] > 0)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return train_extractor(*phantoms(200, 4), trained_on="200 drawn phantoms", steps=30)


@pytest.fixture(scope="module")
def everything(extractor) -> dict:
    return {
        "real": REAL[0],
        "real_labels": REAL[1],
        "holdout": HOLDOUT[0],
        "holdout_labels": HOLDOUT[1],
        "paired": PAIRED,
        "masks": MASKS,
        "extractor": extractor,
        "seeds": (0,),
    }


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """A third of the classifiers' steps: whether they learn is the matter of test_classifiers.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "STEPS", 100)
        yield


@pytest.fixture(scope="module")
def local(everything):
    return evaluate(*SYNTHETIC, rule=Rule.LOCAL, **everything)


def test_every_measure_is_taken_where_everything_is_given(local):
    assert [m.name for m in local.measurements] == list(METRICS)
    assert not local.not_measured
    assert {m.name for m in local.measurements if m.privacy == "free"} == set(FREE)
    assert all(m.privacy == "sensitive" for m in local.measurements if m.name not in FREE)
    assert MUST_STAY in local.text()
    for name in local.numbers():
        assert f"\n{name} " in local.text()


def test_the_numbers_are_those_of_the_measures(local, extractor):
    (synthetic, labels), real, found = SYNTHETIC, REAL[0], local.numbers()
    features = extractor.extract(synthetic), extractor.extract(real)
    assert found["ms_ssim"] == similarity.diversity(synthetic, labels)
    assert found["duplicate_rate"] == duplicates.duplicate_rate(synthetic)
    assert found["copied_rate"] == duplicates.copied_rate(synthetic, real)
    assert found["fid"] == distances.frechet_distance(*features)
    assert (found["kid"], found["kid_deviation"]) == distances.kernel_distance(*features)
    assert found["mmd"] == distances.mmd_of_images(synthetic, real)
    quality = coverage.precision_recall(*features)
    assert (found["precision"], found["recall"]) == (quality.precision, quality.recall)
    variety = coverage.density_coverage(*features)
    assert (found["density"], found["coverage"]) == (variety.density, variety.coverage)
    assert found["psnr"] == similarity.psnr(*PAIRED).mean()
    assert found["ssim"] == similarity.ssim(*PAIRED).mean()
    assert found["mae"] == similarity.mae(*PAIRED).mean()
    assert {name: found[name] for name in ("dice", "iou")} == similarity.dice_and_iou(*MASKS)
    for arm in ("tstr", "trts", "trtr"):
        assert found[f"{arm}_accuracy"] > 0.6
        assert found[f"{arm}_auc"] > 0.6
        assert found[f"{arm}_chance"] == 0.5


def test_each_number_says_how_it_was_made(local, extractor):
    assert local["fid"].settings == {
        "synthetic_images": 120,
        "real_images": 100,
        "extractor_sha256": extractor.sha256,
        "extractor_trained_on": "200 drawn phantoms",
        "extractor_accuracy": extractor.accuracy,
    }
    assert extractor.sha256 in local.text()
    assert "200 drawn phantoms" in local.text()
    with_features = ("fid", "kid", "precision_recall", "density_coverage")
    assert {m.name for m in local.measurements if "extractor_sha256" in m.settings} == set(with_features)
    assert local["tstr"].settings["holdout_images"] == 60
    assert local["paired"].settings["pairs"] == 50


# --- nothing of patients in what may leave


def test_what_may_leave_is_free(local):
    free = local.may_leave()
    assert tuple(m.name for m in free.measurements) == FREE
    assert free == evaluate(*SYNTHETIC, rule=Rule.RELEASE)
    refuse_in_release(free.record())
    with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
        refuse_in_release({"quality": local.record()})


@pytest.mark.parametrize("name", [name for name in METRICS if name not in FREE])
def test_no_sensitive_number_can_be_had_from_what_may_leave(local, name):
    free = local.may_leave()
    assert name in local and name not in free
    numbers = set(local[name].values)
    assert not numbers & set(free.numbers())
    shown = free.text() + repr(free) + json.dumps(free.record())
    assert not [number for number in numbers if f'"{number}"' in shown or f"\n{number} " in shown]


@pytest.mark.parametrize("count", [100, 50, 3])
def test_what_may_leave_does_not_depend_on_the_patients(local, everything, count):
    """Other patients, too few for FID, or too few for anything: what leaves is the same to the last bit."""
    other = (-REAL[0][:count], 1 - REAL[1][:count])
    given = {**everything, "real": other[0], "real_labels": other[1], "paired": (other[0], -other[0])}
    changed = evaluate(*SYNTHETIC, rule=Rule.LOCAL, metrics=QUICK, **given)
    assert changed.numbers()["psnr"] != local.numbers()["psnr"]
    assert changed.may_leave() == local.may_leave()
    assert changed.may_leave().record() == local.may_leave().record()
    assert changed.may_leave().text() == local.may_leave().text()


def test_a_measure_is_handed_what_it_names_and_free_ones_name_no_real_image():
    for metric in METRICS.values():
        assert tuple(inspect.signature(metric.measure).parameters) == metric.reads
    assert tuple(name for name, metric in METRICS.items() if SYNTHETIC_ONLY.issuperset(metric.reads)) == FREE
    assert not [name for name in SYNTHETIC_ONLY if "real" in name or "holdout" in name or "true" in name]


def test_images_made_from_patients_are_as_sensitive_as_these(local):
    made = evaluate(*SYNTHETIC, rule=Rule.LOCAL, made_from_patients=True)
    assert made.numbers() == {name: local.numbers()[name] for name in ("ms_ssim", "duplicate_rate")}
    assert not made.may_leave().measurements
    with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
        evaluate(*SYNTHETIC, rule=Rule.RELEASE, made_from_patients=True)
    with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
        evaluate(*SYNTHETIC, rule=Rule.PUBLIC, made_from_patients=True)


REAL_INPUTS = (
    {"real": REAL[0]},
    {"real": REAL[0], "real_labels": REAL[1]},
    {"holdout": HOLDOUT[0]},
    {"paired": PAIRED},
    {"masks": MASKS},
)


@pytest.mark.parametrize("given", REAL_INPUTS)
def test_an_evaluation_for_a_release_takes_no_real_image(given):
    with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
        evaluate(*SYNTHETIC, rule=Rule.RELEASE, metrics=FREE, **given)


@pytest.mark.parametrize("given", REAL_INPUTS)
def test_public_images_have_a_name(given):
    for name in ("", "  "):
        with pytest.raises(PrivacyError, match="not said"):
            evaluate(*SYNTHETIC, rule=Rule.PUBLIC, metrics=FREE, real_data=name, **given)
    named = evaluate(*SYNTHETIC, rule=Rule.PUBLIC, metrics=FREE, real_data="drawn phantoms", **given)
    assert "drawn phantoms" in named.text()


def test_public_numbers_may_leave(everything):
    public = evaluate(*SYNTHETIC, rule=Rule.PUBLIC, real_data="drawn phantoms", metrics=QUICK, **everything)
    assert {m.privacy for m in public.measurements} == {"free", "public"}
    assert public.may_leave() is public
    refuse_in_release(public.record())


def test_without_a_rule_nothing_is_measured():
    with pytest.raises(TypeError):
        evaluate(*SYNTHETIC)  # type: ignore[call-arg]
    for rule in (None, "hospital"):
        with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
            evaluate(*SYNTHETIC, rule=rule)


# --- too little, and wrong


def test_too_few_real_images_leave_out_what_needs_more(everything):
    few = {**everything, "real": REAL[0][:40], "real_labels": REAL[1][:40]}
    found = evaluate(*SYNTHETIC, rule=Rule.LOCAL, metrics=("fid", "kid", "mmd"), **few)
    assert [m.name for m in found.measurements] == ["kid", "mmd"]
    assert [(n.name, n.privacy) for n in found.not_measured] == [("fid", "sensitive")]
    assert "at least 65 images; 40 given" in found.text()
    assert not found.may_leave().not_measured


def test_one_class_trains_no_classifier(everything):
    single = {**everything, "holdout_labels": HOLDOUT[1] * 0}
    found = evaluate(*SYNTHETIC, rule=Rule.LOCAL, metrics=("tstr", "trts"), **single)
    assert [m.name for m in found.measurements] == ["trts"]
    assert "one class" in found.not_measured[0].reason


def test_without_labels_or_extractor_there_are_fewer_measures_and_it_is_said_why():
    found = evaluate(SYNTHETIC[0], rule=Rule.LOCAL, real=REAL[0], holdout=HOLDOUT[0])
    assert [m.name for m in found.measurements] == ["ms_ssim", "duplicates", "copies", "mmd"]
    assert found.numbers()["ms_ssim"] == similarity.diversity(SYNTHETIC[0], np.zeros(120, int))
    no_labels = "no labels of the synthetic images were given", "no labels of the real images were given"
    held_out = "no labels of the held-out images were given"
    assert {n.name: n.reason for n in found.not_measured} == {
        **dict.fromkeys(("fid", "kid", "precision_recall", "density_coverage"), "no extractor was given"),
        "tstr": f"{no_labels[0]}, {held_out}",
        "trts": f"{no_labels[1]}, {no_labels[0]}",
        "trtr": f"{no_labels[1]}, {held_out}",
    }
    assert {n.privacy for n in found.not_measured} == {"sensitive"}
    assert "fid                      not measured: no extractor was given" in found.text()
    assert found.may_leave() == evaluate(SYNTHETIC[0], rule=Rule.RELEASE), "no word of what was not given"
    only_pairs = evaluate(rule=Rule.LOCAL, paired=PAIRED)
    assert [m.name for m in only_pairs.measurements] == ["paired"]
    assert not only_pairs.not_measured


@pytest.mark.parametrize("rule", [Rule.LOCAL, Rule.PUBLIC])
def test_what_no_real_image_was_given_for_is_said_and_is_nobodys_secret(rule):
    found = evaluate(*SYNTHETIC, rule=rule)
    reasons = {n.name: n.reason for n in found.not_measured}
    assert set(reasons) == set(METRICS) - {*FREE, "paired", "masks"}, "pairs and masks are other inputs altogether"
    assert reasons["fid"] == "no extractor was given, no real images were given"
    assert reasons["mmd"] == "no real images were given"
    assert reasons["tstr"] == "no held-out images were given"
    assert reasons["trtr"] == "no real images were given, no held-out images were given"
    assert {n.privacy for n in found.not_measured} == {"free"}
    assert not found.record()["must_stay"]


def test_what_is_asked_for_by_name_is_all_that_is_spoken_of():
    assert not evaluate(*SYNTHETIC, rule=Rule.LOCAL, real=REAL[0], metrics=("mmd",)).not_measured


def test_a_number_that_is_none_is_not_reported(monkeypatch):
    monkeypatch.setitem(METRICS, "duplicates", Metric(("synthetic",), lambda synthetic: {"duplicate_rate": np.nan}))
    found = evaluate(*SYNTHETIC, rule=Rule.RELEASE)
    assert [m.name for m in found.measurements] == ["ms_ssim"]
    assert "no finite number" in found.text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ("ms_ssim", "inception_score")}, "no measure is called inception_score"),
        ({"metrics": ("fid",), "real": REAL[0]}, "extractor"),
        ({"metrics": ("tstr",), "real": REAL[0]}, "holdout"),
        ({"real": REAL[0][:, :, :12]}, "size"),
        ({"holdout": HOLDOUT[0][:, :, :12]}, "size"),
        ({"real": REAL[0] * 3}, "outside"),
        ({"real": np.where(REAL[0] > 0.5, np.nan, REAL[0])}, "not finite"),
        ({"real": REAL[0], "real_labels": REAL[1][1:]}, "differ in number"),
        ({"real_labels": REAL[1]}, "no images"),
        ({"paired": (PAIRED[0], PAIRED[1][1:])}, "number or size"),
        ({"masks": (MASKS[0] * 0.5, MASKS[1])}, "whole numbers"),
    ],
)
def test_what_cannot_be_evaluated(arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        evaluate(*SYNTHETIC, rule=Rule.LOCAL, **arguments)
    assert caught.value.code == "DATA_EVALUATION"


def test_a_held_out_image_is_not_among_the_real_ones():
    mixed = np.concatenate([REAL[0], HOLDOUT[0][7:8]])
    with pytest.raises(DataError, match="DATA_DUPLICATE"):
        evaluate(*SYNTHETIC, rule=Rule.LOCAL, real=mixed, holdout=HOLDOUT[0])
