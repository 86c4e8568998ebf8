"""``fedmedgan site evaluate`` and ``site extractor``: numbers, and which of them must stay at the hospital."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from conftest import tiny_study
from test_cli import assert_one_line
from test_cli_deploy import data, run
from test_cycle import collect, hospitals, open_round

from fedmedgan.cli import evaluate
from fedmedgan.client import checkpoint
from fedmedgan.client.gans.recipe import Recipe
from fedmedgan.client.home import Home
from fedmedgan.client.release.features import load_extractor
from fedmedgan.client.release.rule import Evaluation, Rule, refuse_in_release
from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.study import Study
from fedmedgan.simulations import consortium, phantoms, quality

IN_FEATURES = ("fid", "kid", "precision_recall", "density_coverage")


def other_patients(folder: Path, patients: int = 16, *, paired: bool = False, known: int = 0) -> Path:
    """Phantoms whom no hospital knows; but `known` of them have the Patient ID of one of the first hospital's."""
    vendor, seed, of_the_first = phantoms.vendor_for(0), 77, 0
    phantoms.write_hospital(folder, patients=patients, seed=seed, vendor=vendor, size=32, paired=paired)
    for path in folder.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        if int(dataset.PatientID.rpartition("-")[2]) <= known:
            dataset.PatientID = dataset.PatientID.replace(f"-{seed}-", f"-{of_the_first}-")
            dataset.save_as(path)
    return folder


def agreed(folder: Path, **sections) -> tuple[Path, Study]:
    """Run folder and study of three hospitals that have signed, and trained nothing yet."""
    paired, own = sections.get("images", {}).get("paired", False), {}
    for i in range(3):
        own[f"site-{i}"] = folder / f"own-{i}"
        vendor = phantoms.vendor_for(i)
        phantoms.write_hospital(own[f"site-{i}"], patients=24, seed=i, vendor=vendor, size=32, paired=paired)
    return folder / "run", consortium.prepare(tiny_study(3, **sections), folder / "run", own, device="cpu")


def trained(folder: Path, **sections) -> Path:
    """Home of a hospital after the first round of a study of three."""
    keyed = agreed(folder, **sections)
    consortium.give_key(*keyed)
    total, _ = collect(keyed, open_round(keyed[1], 1, key_id=hospitals(keyed)[0].keys.key_id))
    hospitals(keyed)[0].apply_sum(*total.certify())
    return consortium.homes(*keyed)[0]


def as_if_trained(folder: Path, **sections) -> Path:
    """The same, with the initial model for that of the first round: what is measured does not ask where it is from.

    Without privacy, because probing image-to-image recipes for it takes a minute a hospital.
    """
    home = consortium.homes(*agreed(folder, privacy="none", **sections))[0]
    hospital = Home(home)
    notes = {"study": hospital.study.hash, "round": 1, "ledger_seq": 0, "ledger_head": ""}
    checkpoint.write(home / "model.safetensors", hospital.model.arrays(), **notes)
    return home


def test_a_hospital_is_told_how_good_its_images_are_and_what_must_stay(keyed, tmp_path):
    folder, study = keyed
    home = consortium.homes(folder, study)[0]
    early = run("site", "evaluate", "--home", home)
    assert early.returncode == 2
    assert "error[MODEL_MISMATCH]" in early.stderr
    total, _ = collect(keyed, open_round(study, 1, key_id=hospitals(keyed)[0].keys.key_id))
    hospitals(keyed)[0].apply_sum(*total.certify())
    ledger = (home / "ledger.jsonl").read_bytes()

    options = ("--home", home, "--holdout", other_patients(tmp_path / "others"), "--images", "200")
    said = run("site", "evaluate", *options)
    assert said.returncode == 0, said.stderr
    assert "must not leave this hospital" in " ".join(said.stdout.split())
    assert "not measured: no extractor was given" in said.stdout
    found = data(run("--format", "json", "site", "evaluate", *options))
    privacy = {m["name"]: m["privacy"] for m in [*found["measurements"], *found["not_measured"]]}
    assert found["must_stay"]
    assert (privacy["ms_ssim"], privacy["duplicates"]) == ("free", "free")
    assert {privacy[name] for name in ("tstr", "trts", "mmd", "copies")} == {"sensitive"}
    assert {m["name"] for m in found["not_measured"]} == set(IN_FEATURES)
    assert (home / "ledger.jsonl").read_bytes() == ledger, "nothing is charged, because nothing may leave"

    mixed = run("site", "evaluate", "--home", home, "--holdout", other_patients(tmp_path / "mixed", known=3))
    assert_one_line(mixed, "DATA_DUPLICATE")
    assert "patients held out who are also trained on: 3;" in mixed.stderr, "though each image is another one"


def test_an_extractor_is_made_and_looked_through(keyed, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "STEPS", 20)
    folder, study = keyed
    home, out = consortium.homes(folder, study)[0], tmp_path / "extractor.safetensors"
    made = data(run("--format", "json", "site", "extractor", "--out", out, "--size", "28"))
    kept = load_extractor(out)
    assert (made["sha256"], made["trained_on"]) == (kept.sha256, "1000 phantoms drawn for it, at 28 pixels")
    assert_one_line(run("site", "extractor", "--out", out, "--size", "28"), "RUN_PATH")
    assert_one_line(run("site", "extractor", "--out", tmp_path / "x", "--size", "30"), "RUN_USAGE")

    total, _ = collect(keyed, open_round(study, 1, key_id=hospitals(keyed)[0].keys.key_id))
    hospitals(keyed)[0].apply_sum(*total.certify())
    options = ("--home", home, "--extractor", out, "--images", "100")
    measured = data(run("--format", "json", "site", "evaluate", *options))["measurements"]
    seen_through = {m["name"]: m["settings"].get("extractor_sha256") for m in measured}
    assert {name for name, sha256 in seen_through.items() if sha256 == kept.sha256} >= {"kid", "density_coverage"}


def test_an_extractor_of_public_images_says_which_and_takes_the_folders_labels(tmp_path):
    phantoms.write_hospital(tmp_path / "open set", patients=30, seed=5, vendor=phantoms.vendor_for(0), size=32)
    out = tmp_path / "extractor.safetensors"
    said = run("site", "extractor", "--out", out, "--size", "28", "--data", tmp_path / "open set")
    assert said.returncode == 0, said.stderr
    kept = load_extractor(out)
    assert kept.trained_on.endswith(" public images of the folder open set")
    assert kept.head.out_features == 2
    assert kept.sha256 in said.stdout and kept.trained_on in said.stdout
    no_labels = tmp_path / "open set" / "clear"
    assert_one_line(
        run("site", "extractor", "--out", tmp_path / "x", "--size", "28", "--data", no_labels), "DATA_LABEL"
    )
    assert "NEVER of patients" in " ".join(run("site", "extractor", "--help").stdout.replace("│", " ").split())


@pytest.mark.slow
def test_image_to_image_is_judged_on_held_out_images(tmp_path, monkeypatch):
    sections = {"gan": {"recipe": "pix2pix", "private": "both", "task": "paired"}, "images": {"paired": True}}
    home = as_if_trained(tmp_path, **sections)
    alone = run("site", "evaluate", "--home", home)
    assert_one_line(alone, "RUN_USAGE")
    assert "--holdout FOLDER" in alone.stderr
    options = ("--home", home, "--holdout", other_patients(tmp_path / "others", paired=True))
    found = data(run("--format", "json", "site", "evaluate", *options))
    assert (found["rule"], found["must_stay"]) == ("local", True)
    made, given = found["evaluations"]
    for one in (made, given):
        assert [(m["name"], m["privacy"]) for m in one["measurements"]] == [
            ("paired", "sensitive"),
            ("masks", "sensitive"),
        ]
    assert made["measurements"] != given["measurements"]
    with pytest.raises(PrivacyError):
        refuse_in_release(found)
    said = run("site", "evaluate", *options).stdout
    assert "must not leave this hospital" in said
    assert said.count("psnr ") == said.count("dice ") == 2
    mixed = run("site", "evaluate", "--home", home, "--holdout", other_patients(tmp_path / "m", paired=True, known=2))
    assert_one_line(mixed, "DATA_DUPLICATE")

    monkeypatch.setattr("fedmedgan.client.gans.pix2pix.Pix2Pix.judged", Recipe.judged)
    assert_one_line(run("site", "evaluate", *options), "CONFIG_RANGE")


@pytest.mark.slow
def test_domain_to_domain_is_judged_as_sets(tmp_path):
    home = as_if_trained(tmp_path, gan={"recipe": "cyclegan", "private": "both"})
    others = other_patients(tmp_path / "others", 40)
    found = data(run("--format", "json", "site", "evaluate", "--home", home, "--holdout", others))
    assert [one["of"] for one in found["evaluations"]] == [
        "clear as it is, beside opacity",
        "clear brought to opacity, beside opacity",
        "opacity as it is, beside clear",
        "opacity brought to clear, beside clear",
    ]
    for one in found["evaluations"]:
        assert [(m["name"], m["privacy"]) for m in one["measurements"]] == [("mmd", "sensitive")]
        assert [(m["name"], m["reason"]) for m in one["not_measured"]] == [("kid", "no extractor was given")]


def test_one_evaluation_is_told_as_it_was_before_there_were_several():
    """Scripts read `measurements` at the top."""
    one, two = Evaluation(Rule.LOCAL, ()), Evaluation(Rule.LOCAL, ())
    assert evaluate._record({"a": one}) == {"of": "a", **one.record()}
    assert [part["of"] for part in evaluate._record({"a": one, "b": two})["evaluations"]] == ["a", "b"]
