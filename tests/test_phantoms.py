"""Phantoms: real DICOM, the same bytes every time, patients that stay themselves, classes that differ."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_modality_lut, apply_windowing
from sklearn.metrics import roc_auc_score

from fedmedgan.client.data.patients import load_patients
from fedmedgan.shared.errors import DataError, RunError
from fedmedgan.shared.study import Images
from fedmedgan.simulations.phantoms import (
    CLASSES,
    VENDORS,
    Vendor,
    draw_anatomy,
    radiographs,
    to_dicom,
    vendor_for,
    write_hospital,
)


def _files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.dcm"))
    }


def _presented(dataset: pydicom.Dataset) -> np.ndarray:
    """What a viewer shows, 0 black to 1 white, by pydicom alone."""
    values = apply_windowing(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float64)
    if "WindowWidth" in dataset:  # pydicom windows into the range of the stored bits, after the modality LUT
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        low, high = intercept, (2**dataset.BitsStored - 1) * slope + intercept
    else:
        low, high = 0, 2**dataset.BitsStored - 1
    shown = (values - low) / (high - low)
    return 1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


@pytest.mark.parametrize("vendor", VENDORS, ids=lambda v: v.name)
def test_a_seed_is_a_hospital_to_the_byte(vendor: Vendor, tmp_path: Path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_hospital(tmp_path / name, patients=6, seed=seed, vendor=vendor, size=32)
    first, again, other = (_files(tmp_path / name) for name in "abc")
    assert first == again
    assert not set(first.values()) & set(other.values())


@pytest.mark.parametrize("index", range(4))
def test_files_are_valid_dicom_that_says_it_is_synthetic(index: int, tmp_path: Path):
    vendor = vendor_for(index)
    write_hospital(tmp_path, patients=12, seed=index, vendor=vendor, size=32)
    paths = sorted(tmp_path.rglob("*.dcm"))
    assert {p.parent.name for p in paths} == set(CLASSES)
    uids = []
    for path in paths:
        dataset = pydicom.dcmread(path)
        assert dataset.file_meta.TransferSyntaxUID == vendor.transfer_syntax
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert dataset[0x0008, 0x001C].value == "YES"
        assert dataset.Modality == vendor.modality
        assert dataset.Manufacturer == vendor.manufacturer
        assert dataset.BurnedInAnnotation == "NO"
        assert dataset.PatientID.startswith("PHANTOM-")
        assert dataset.PatientName == ""
        assert dataset.PatientBirthDate == ""
        assert dataset.BitsStored == vendor.bits_stored
        assert any(element.tag.is_private for element in dataset)
        assert ("RescaleSlope" in dataset) == (vendor.slope is not None)
        assert ("WindowWidth" in dataset) == vendor.window
        new = [dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID]
        assert all(uid.is_valid and uid.startswith("2.25.") for uid in new)
        uids += new
    assert len(set(uids)) == len(uids)


@pytest.mark.parametrize("vendor", VENDORS, ids=lambda v: v.name)
@pytest.mark.parametrize("synthetic", [True, False])
def test_a_viewer_shows_the_image_that_was_drawn(vendor: Vendor, synthetic: bool):
    image = np.random.default_rng(0).random((24, 24)).astype(np.float32)
    image[0, 0], image[0, 1] = 0, 1
    dataset = to_dicom(image, vendor, patient_id="P", study=1, origin=["t"], synthetic=synthetic)
    assert np.abs(_presented(dataset) - image).max() < 1.5 / 2**vendor.bits_stored
    assert dataset.SyntheticData == ("YES" if synthetic else "NO")


def test_vendors_differ_and_further_hospitals_look_different():
    assert len({(v.transfer_syntax, v.photometric, v.bits_stored) for v in VENDORS}) == len(VENDORS) >= 3
    hospitals = [vendor_for(i) for i in range(9)]
    assert len({(v.contrast, v.build, v.prevalence) for v in hospitals}) == 9
    assert [v.manufacturer for v in hospitals[:3]] == [v.manufacturer for v in hospitals[3:6]]
    assert all(0.3 <= v.prevalence <= 0.7 for v in hospitals)


def test_images_of_a_patient_are_more_alike_than_images_of_two_patients():
    rng = np.random.default_rng(3)
    anatomy = draw_anatomy(rng, 20)
    images = radiographs(anatomy.take(np.repeat(np.arange(20), 2)), np.zeros(40, dtype=np.int64), 48, rng)
    similar = np.corrcoef(images.reshape(40, -1))
    own = similar[np.arange(0, 40, 2), np.arange(1, 40, 2)]
    others = similar[0::2, 1::2][~np.eye(20, dtype=bool)]
    assert own.mean() > others.mean() + 0.02
    assert not np.allclose(images[0], images[1])


def test_every_opacity_can_be_seen_and_touches_nothing_but_lung():
    anatomy, labels = draw_anatomy(np.random.default_rng(1), 60), np.zeros(60, dtype=np.int64)
    clear = radiographs(anatomy, labels, 64, np.random.default_rng(2))
    opacity = radiographs(anatomy, labels + 1, 64, np.random.default_rng(2))
    brighter = opacity - clear
    assert brighter.min() > -1e-6
    assert brighter.max((1, 2)).min() > 0.1
    area = (brighter > 0.05).mean((1, 2))
    assert area.min() > 0.004
    assert area.max() < 0.35
    assert clear[brighter > 0.1].max() < 0.75  # lung is the dark part


def test_mean_brightness_does_not_give_the_class_away():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 400)
    images = radiographs(draw_anatomy(rng, 400), labels, 32, rng)
    assert images.min() >= 0
    assert images.max() <= 1
    assert abs(roc_auc_score(labels, images.mean((1, 2))) - 0.5) < 0.12


def test_a_prevalence_and_number_of_images(tmp_path: Path):
    vendor = dataclasses.replace(VENDORS[2], prevalence=0.3)
    write_hospital(tmp_path, patients=40, seed=9, vendor=vendor, size=16)
    images = {name: [p.stem.rsplit("-", 1) for p in (tmp_path / name).iterdir()] for name in CLASSES}
    ill = {patient for patient, _ in images["opacity"]}
    everybody = ill | {patient for patient, _ in images["clear"]}
    assert len(everybody) == 40
    assert len(ill) == 12
    assert {nth for name in CLASSES for _, nth in images[name]} == {"1", "2", "3", "4"}


def test_hospitals_with_other_seeds_share_no_patient(tmp_path):
    """Else one hospital's folder would be refused as another's held-out patients."""
    seen = []
    for seed in (1, 2):
        write_hospital(tmp_path / str(seed), patients=5, seed=seed, vendor=VENDORS[0], size=32)
        files = (tmp_path / str(seed)).rglob("*.dcm")
        seen.append({pydicom.dcmread(path, specific_tags=["PatientID"]).PatientID for path in files})
    assert len(seen[0]) == len(seen[1]) == 5
    assert not seen[0] & seen[1]


def test_a_folder_in_use_and_a_hospital_without_patients_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="DATA_EMPTY"):
        write_hospital(tmp_path, patients=0, seed=0, vendor=VENDORS[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="RUN_PATH"):
        write_hospital(tmp_path, patients=1, seed=0, vendor=VENDORS[0])
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("vendor", VENDORS, ids=lambda v: v.name)
def test_the_reader_of_hospitals_takes_every_file(vendor: Vendor, tmp_path: Path):
    write_hospital(tmp_path, patients=10, seed=2, vendor=vendor, size=64)
    read = load_patients(tmp_path, Images(), pseudonym_key=bytes(range(32)))
    counts = [len(list((tmp_path / name).iterdir())) for name in CLASSES]
    assert np.bincount(read.labels_N).tolist() == counts
    assert read.n_patients == 10
    # Dense is bright whatever the vendor stores: the middle of the belly above the corner beside the neck.
    belly, air = read.images_N1HW[:, 0, -4:, 28:36].mean(), read.images_N1HW[:, 0, :4, :4].mean()
    assert belly > 0.4
    assert air < -0.7
