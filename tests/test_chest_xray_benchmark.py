"""The benchmark on real radiographs: patients stay apart, pixels survive DICOM, only synthetic images are shown."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pydicom
import pytest
from conftest import load_benchmark

from fedmedgan.client.data.patients import PatientImages, load_patients
from fedmedgan.client.release.evaluate import Utility
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.study import from_dict, parse

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("chest_xray")


@pytest.fixture(scope="module")
def source(benchmark: ModuleType) -> Path:
    folder = benchmark.shared_data() / "chest-xray-sites"
    if not (folder / "index.csv").is_file():
        pytest.skip("the public radiographs are not here (FEDMEDGAN_SHARED_DATA names their folder)")
    return folder


@pytest.fixture(scope="module")
def work(benchmark: ModuleType, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chest-xray")
    benchmark.convert(source, folder)
    return folder


@pytest.fixture(scope="module")
def index(source: Path) -> dict[str, dict[str, str]]:
    with (source / "index.csv").open(encoding="utf-8", newline="") as file:
        return {row["image_id"]: row for row in csv.DictReader(file)}


def _folders(benchmark: ModuleType, work: Path) -> dict[str, Path]:
    held = {f"holdout/{h.name}": work / "holdout" / h.name for h in benchmark.HOSPITALS}
    return {**{site: work / "sites" / site for site in benchmark.SITES}, **held}


def test_every_image_is_in_one_folder_and_every_patient_too(benchmark: ModuleType, work: Path, index: dict):
    seen: dict[str, set[str]] = {}
    images: list[str] = []
    for name, folder in _folders(benchmark, work).items():
        for path in folder.rglob("*.dcm"):
            row = index[path.stem]
            images.append(path.stem)
            seen.setdefault(row["patient_id"], set()).add(name)
            assert name.startswith((row["site"].split("-")[0], f"holdout/{row['site'].split('-')[0]}"))
            assert path.parent.name == ("clear" if row["label"] == "normal" else "opacity")
    assert sorted(images) == sorted(index)
    assert {len(folders) for folders in seen.values()} == {1}
    assert not (work / "converting").exists()
    for hospital in benchmark.HOSPITALS:
        own = [
            folders for folders in seen.values() if min(folders).startswith((hospital.name, f"holdout/{hospital.name}"))
        ]
        held = sum(folders == {f"holdout/{hospital.name}"} for folders in own)
        assert held / len(own) == pytest.approx(0.25, abs=0.01)


def test_pixels_and_patients_survive(benchmark: ModuleType, work: Path, source: Path, index: dict):
    for hospital in benchmark.HOSPITALS:
        archive = np.load(source / hospital.archive)["images"]
        for path in sorted((work / "holdout" / hospital.name).rglob("*.dcm"))[::40]:
            dataset, row = pydicom.dcmread(path), index[path.stem]
            stored = dataset.pixel_array
            shown = 255 - stored if dataset.PhotometricInterpretation == "MONOCHROME1" else stored
            np.testing.assert_array_equal(shown, archive[int(row["row"])])
            assert dataset.PatientID == row["patient_id"]
            assert dataset[0x0008, 0x001C].value == "NO"
            assert dataset.Modality in ("CR", "DX")


def test_the_study_fits_its_folders_and_is_the_file_that_is_written(benchmark: ModuleType, work: Path):
    values = benchmark.study_values(work, rounds=3, local_steps=4, patients_per_step=8, epsilon=5.0)
    study = parse(benchmark.to_toml(values))
    assert study.hash == from_dict(values).hash
    assert (study.training.rounds, study.training.local_steps, study.privacy.epsilon) == (3, 4, 5.0)
    assert [site.name for site in study.sites] == ["gwcmc-a", "gwcmc-b", "nih-a", "nih-b"]
    site = study.site("nih-b")
    read = load_patients(work / "sites" / site.name, study.images, pseudonym_key=bytes(32))
    assert len(read.labels_N) == len(list((work / "sites" / site.name).rglob("*.dcm")))
    assert read.n_patients - 10 < site.patients <= read.n_patients
    assert read.images_N1HW.shape[1:] == (1, 64, 64)
    assert np.bincount(read.labels_N).min() > 50


def test_real_radiographs_never_enter_the_repository(benchmark: ModuleType, source: Path):
    with pytest.raises(RunError, match="RUN_PATH"):
        benchmark.convert(source, ROOT / "work")
    assert not (ROOT / "work").exists()


def test_the_page_quotes_the_run_and_shows_synthetic_images_only(benchmark: ModuleType, tmp_path: Path):
    study = parse(
        'name = "chest-xray"\n'
        + "".join(f'[[sites]]\nname = "{site}"\npatients = 200\n' for site in benchmark.SITES)
        + "[training]\nrounds = 7\nlocal_steps = 9\n"
    )
    rng = np.random.default_rng(0)
    arms = []
    (tmp_path / "run" / "arms").mkdir(parents=True)
    for name, epsilon in (("federated", 7.5), ("alone-nih-a", 7.25), ("no-privacy", None)):
        images, labels = rng.integers(0, 256, (20, 1, 64, 64)).astype(np.uint8), np.arange(20) % 2
        np.savez(tmp_path / "run" / "arms" / f"{name}.npz", images_N1HW=images, labels_N=labels)
        arms.append({"name": name, "label": name, "private": epsilon is not None, "epsilon": epsilon})
        arms[-1]["images"] = f"arms/{name}.npz"
    (tmp_path / "run" / "arms.json").write_text(json.dumps({"arms": arms}))
    images, labels = benchmark.read_arm(tmp_path / "run", arms[0])
    assert (images.min(), images.max()) == (-1, 1)
    assert images.shape == (20, 1, 64, 64)
    assert labels.shape == (20,)

    score = Utility(0.8125, 0.02, (0.8, 0.83), 0.875, 0.01, (0.87, 0.88), 0.6, 20, 100)
    scores = dict.fromkeys(("gwcmc", "nih", "both"), score)
    rows = [benchmark.Row(a["name"], a["label"], a["private"], a["epsilon"], 20, scores) for a in arms]
    rows.append(benchmark.Row("real", "the sites' real images", False, None, 90, scores))
    drawn = benchmark.draw(tmp_path, rows, tmp_path / "chest-xray")
    none = np.zeros((0, 1, 64, 64))
    held = {h.name: PatientImages(none, np.zeros(0), np.zeros(0), 50, None, ()) for h in benchmark.HOSPITALS}
    page = benchmark.page(rows, study, held, drawn, "the command")

    linked = re.findall(r"\]\(chest-xray/([^)]+)\)", page)
    assert sorted(linked) == sorted(drawn) == sorted(p.name for p in (tmp_path / "chest-xray").iterdir())
    assert set(drawn) == {"compared.png", "federated.png", "alone-nih-a.png", "no-privacy.png"}
    assert "| federated (20 images) | 7.50 | 0.812 ± 0.020 | 0.875 ± 0.010 | 0.875 | 0.875 |" in page
    assert "| no-privacy (20 images) | no privacy |" in page
    assert "7 rounds of 9 private steps" in page
    assert "100 images of 100 patients (50 gwcmc, 50 nih)" in page
    assert "CC BY 4.0" in page
    assert "NIH Clinical Center" in page
    assert str(tmp_path) not in page
