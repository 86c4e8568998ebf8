"""Images with targets: the same cut, the same patient, and every way in which a target is none."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dicom import GOOD
from test_patients import KEY, InProcess, codes, load, write
from typer.testing import CliRunner

from fedmedgan.cli import dataset
from fedmedgan.client.data import labels, patients
from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import check_folder, load_patients, used_files
from fedmedgan.shared.errors import DataError
from fedmedgan.shared.study import Images
from fedmedgan.simulations import partitions, phantoms

PAIRED = Images(size=32, classes=("image",), paired=True)
TWO = Images(size=32, classes=("clear", "opacity"), paired=True)
HEAD = "path,label,target\n"


def table(folder: Path, *rows: str, head: str = HEAD) -> None:
    (folder / "labels.csv").write_text(head + "".join(f"{row}\n" for row in rows))


def mask(pixels: np.ndarray, **changes) -> dict:
    """Changes to `make` for an 8-bit mask."""
    size = {"rows": pixels.shape[-2], "columns": pixels.shape[-1]}
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    return {**size, **bits, "PixelData": pixels.astype(np.uint8).tobytes(), **changes}


def square(rows: int = 8, columns: int = 8) -> np.ndarray:
    pixels = np.zeros((rows, columns), np.uint8)
    pixels[2:6, 3:7] = 1
    return pixels


def reasons(report: FolderReport) -> dict[str, str]:
    return {file.path: file.reason for file in report.files if not file.used}


def same_area(found: np.ndarray, expected: np.ndarray) -> bool:
    """But for the corners, which resizing rounds."""
    return bool((found != expected).mean() < 0.02)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(patients, "WorkerPool", InProcess)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def folder(tmp_path):
    """One pair that is good, of patient A."""
    folder = tmp_path / "data"
    write(folder, "good.dcm", seed=1, PatientID="A")
    write(folder, "good-mask.dcm", seed=51, PatientID="A", **mask(square()))
    table(folder, "good.dcm,image,good-mask.dcm")
    return folder


# ---- what a pair is


def test_a_target_is_cut_like_its_image_and_is_no_image(tmp_path, in_process):
    random = np.random.default_rng(0)
    for number, (rows, columns) in enumerate(((20, 36), (36, 20), (40, 40))):
        values = random.integers(0, 4096, (rows, columns), dtype=np.uint16)
        size = {"rows": rows, "columns": columns, "PatientID": f"P{number}"}
        write(tmp_path, f"{number}.dcm", seed=number, PixelData=values.tobytes(), **size)
        write(tmp_path, f"t/{number}.dcm", seed=50 + number, PixelData=(4095 - values).tobytes(), **size)
    table(tmp_path, *(f"{n}.dcm,image,t/{n}.dcm" for n in range(3)))
    found = load(tmp_path, PAIRED)
    assert found.images_N1HW.shape == found.targets_N1HW.shape == (3, 1, 32, 32)
    assert found.targets_N1HW.dtype == np.float16
    for image, target in zip(found.images_N1HW, found.targets_N1HW, strict=True):
        inside = ~((image == image.min()) & (target == target.min()))  # but for the black around it
        assert inside.mean() > 0.5
        np.testing.assert_allclose(image[inside], -target[inside], atol=0.01)
    assert found.patient_N.tolist() == [0, 1, 2]
    report = found.report
    assert (report.images, report.patients, report.targets, report.left_out) == (3, 3, 3, {})
    assert [file.role for file in report.files] == ["image"] * 3 + ["target"] * 3
    assert FolderReport.from_json(report.to_json()) == report


def test_a_mask_keeps_its_values_and_its_place(folder, in_process):
    (image,), (target,) = (load(folder, PAIRED).images_N1HW, load(folder, PAIRED).targets_N1HW)
    assert image.shape == target.shape
    assert (target.min(), target.max()) == (-1, 1)
    assert same_area(target[0] > 0, np.kron(square(), np.ones((4, 4))) > 0)


def test_shrinking_a_mask_invents_no_value_outside_of_it(tmp_path, in_process):
    pixels = np.zeros((200, 200), np.uint8)
    pixels[31:150, 60:171] = 1
    size = {"rows": 200, "columns": 200}
    write(tmp_path, "1.dcm", seed=1, PatientID="A", **size)
    write(tmp_path, "m.dcm", seed=2, PatientID="A", **mask(pixels))
    table(tmp_path, "1.dcm,image,m.dcm")
    target = load(tmp_path, PAIRED).targets_N1HW[0, 0].astype(float)
    assert np.abs(target).max() <= 1
    assert ((target > 0).mean() - pixels.mean()) == pytest.approx(0, abs=0.02)
    assert (np.abs(target) > 0.99).mean() > 0.8


def test_an_empty_mask_is_a_target_and_an_empty_image_is_none(tmp_path, in_process):
    nothing = np.zeros((8, 8))
    for name, target in {
        "empty": mask(nothing),
        "full": mask(nothing + 1),
        "inverse": mask(nothing, PhotometricInterpretation="MONOCHROME1"),
    }.items():
        write(tmp_path, f"{name}.dcm", seed=len(name), PatientID="A")
        write(tmp_path, f"t-{name}.dcm", seed=50 + len(name), PatientID="A", **target)
    write(tmp_path, "black.dcm", seed=20, PatientID="A", **mask(nothing))
    table(tmp_path, *(f"{n}.dcm,image,t-{n}.dcm" for n in ("empty", "full", "inverse")), "black.dcm,image,t-empty.dcm")
    found = load(tmp_path, PAIRED)
    assert found.report.images == 1
    assert (found.targets_N1HW == -1).all()
    assert codes(found.report)["black.dcm"] == codes(found.report)["t-full.dcm"] == "DICOM_PIXEL_VALUES"
    assert codes(found.report)["full.dcm"] == codes(found.report)["inverse.dcm"] == "DATA_TARGET"


def test_frames_go_with_frames_of_the_same_place(tmp_path, in_process):
    frames = np.random.default_rng(0).integers(0, 4096, (5, 8, 8), dtype=np.uint16)
    frames[1] = 7  # holds nothing, so its mask is not used either
    masks = np.stack([np.zeros((8, 8)), square(), square().T, np.zeros((8, 8)) + 1, square()])
    write(tmp_path, "1.dcm", seed=1, PatientID="A", NumberOfFrames=5, PixelData=frames.tobytes())
    write(tmp_path, "m.dcm", seed=2, PatientID="A", NumberOfFrames=5, **mask(masks))
    table(tmp_path, "1.dcm,image,m.dcm")
    found = load(tmp_path, PAIRED)
    alone = load(write(tmp_path / "alone", "1.dcm", NumberOfFrames=5, PixelData=frames.tobytes()).parent)
    assert np.array_equal(found.images_N1HW, alone.images_N1HW[[0, 1, 3]])  # frames 0, 2 and 4; 3 has a full mask
    expected = np.stack([np.kron(masks[place], np.ones((4, 4))) > 0 for place in (0, 2, 4)])
    assert same_area(found.targets_N1HW[:, 0] > 0, expected)
    assert (found.targets_N1HW[0] == -1).all()
    assert len(found.labels_N) == len(found.patient_N) == 3


def test_two_images_of_a_patient_may_share_a_target(folder, in_process):
    write(folder, "other.dcm", seed=2, PatientID="A")
    table(folder, "good.dcm,image,good-mask.dcm", "other.dcm,image,./good-mask.dcm")
    found = load(folder, PAIRED)
    assert found.report.images == 2
    assert np.array_equal(*found.targets_N1HW)
    assert (found.report.targets, found.n_patients) == (1, 1)


def test_labels_are_read_from_the_same_table(folder, in_process):
    write(folder, "other.dcm", seed=2, PatientID="B")
    write(folder, "other-mask.dcm", seed=52, PatientID="B", **mask(square().T))
    table(folder, "good.dcm,opacity,good-mask.dcm", "other.dcm,clear,other-mask.dcm")
    found = load(folder, TWO)
    assert found.labels_N.tolist() == [1, 0]
    assert found.report.targets == 2


def test_a_study_without_pairs_does_not_read_the_column(folder, in_process):
    rules = Images(size=32, classes=("image", "other"))
    table(folder, "good.dcm,image,good-mask.dcm", "good-mask.dcm,other,good-mask.dcm")
    found = load(folder, rules)
    assert found.targets_N1HW is None
    assert found.report.images == 2
    assert {file.role for file in found.report.files} == {"image"}


# ---- what is left out


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("", "labels.csv names no target for it"),
        ("absent.dcm", "its target is not in the folder"),
        ("../secret.dcm", "its target is not in the folder"),
        ("OUTSIDE", "its target is not in the folder"),
        ("sub/../good-mask.dcm", "its target is not in the folder"),
        ("link.dcm", "its target cannot be used (DATA_UNSAFE_PATH)"),
        ("broken.dcm", "its target cannot be used (DICOM_TRUNCATED)"),
        ("magnet.dcm", "its target cannot be used (DICOM_MODALITY)"),
        ("nobody.dcm", "its target cannot be used (DATA_PATIENT_ID)"),
        ("notes.txt", "its target cannot be used (DICOM_NOT_DICOM)"),
        ("other-patient.dcm", "its target is of another patient"),
        ("taller.dcm", "its target has other rows, columns or frames"),
        ("frames.dcm", "its target has other rows, columns or frames"),
    ],
)
def test_an_image_without_a_target_is_left_out_and_the_others_are_used(folder, in_process, target, reason):
    secret = write(folder.parent, "secret.dcm", seed=60, PatientID="ZZPHI", **mask(square()))
    write(folder, "image.dcm", seed=2, PatientID="ZZPHI")
    write(folder, "other-patient.dcm", seed=61, PatientID="A", **mask(square()))
    write(folder, "taller.dcm", seed=62, PatientID="ZZPHI", **mask(square(10, 8)))
    frames = np.stack([square(), square().T])
    write(folder, "frames.dcm", seed=63, PatientID="ZZPHI", NumberOfFrames=2, **mask(frames))
    write(folder, "magnet.dcm", seed=64, PatientID="ZZPHI", Modality="MR", **mask(square()))
    write(folder, "nobody.dcm", seed=65, PatientID=None, **mask(square()))
    (folder / "broken.dcm").write_bytes(GOOD[:-9])
    (folder / "notes.txt").write_text("x")
    (folder / "link.dcm").symlink_to(secret)
    table(folder, "good.dcm,image,good-mask.dcm", f"image.dcm,image,{target.replace('OUTSIDE', str(secret))}")
    found = load(folder, PAIRED)
    report = found.report
    assert (report.images, report.patients, report.targets) == (1, 1, 1)
    assert codes(report)["image.dcm"] == "DATA_TARGET"
    assert reasons(report)["image.dcm"] == reason
    assert "ZZPHI" not in repr(found)
    if codes(report).get(target) == "DATA_TARGET":
        assert reasons(report)[target] == "the target of no image that is used"


def test_a_link_within_the_folder_may_be_a_target(folder, in_process):
    (folder / "store").mkdir()
    (folder / "good-mask.dcm").rename(folder / "store" / ".hidden")
    (folder / "good-mask.dcm").symlink_to("store/.hidden")
    assert load(folder, PAIRED).report.targets == 1


def test_a_file_that_nobody_names_is_left_out(folder, in_process):
    write(folder, "loose.dcm", seed=3, PatientID="A")
    assert reasons(load(folder, PAIRED).report) == {"loose.dcm": "labels.csv names no target for it"}


@pytest.mark.parametrize("kind", ["copy", "link"])
def test_a_target_under_another_name_is_no_image(folder, in_process, kind):
    """As the target of itself, or of another: in the network's eyes it would be image and target."""
    if kind == "copy":
        (folder / "again.dcm").write_bytes((folder / "good-mask.dcm").read_bytes())
    else:
        (folder / "again.dcm").symlink_to("good-mask.dcm")
    table(folder, "good.dcm,image,good-mask.dcm", "again.dcm,image,good-mask.dcm")
    report = load(folder, PAIRED).report
    assert codes(report)["again.dcm"] == "DATA_DUPLICATE"
    assert reasons(report)["again.dcm"] == "a copy of a target"
    assert report.images == 1


def test_a_mask_that_was_made_by_writing_into_a_copy_of_its_image_is_used(folder, in_process):
    """It has the SOP Instance UID of the image."""
    write(folder, "good-mask.dcm", seed=1, PatientID="A", **mask(square()))
    assert load(folder, PAIRED).report.targets == 1


def test_the_target_of_a_copy_is_not_used(folder, in_process):
    write(folder, "z-copy.dcm", seed=1, PatientID="A")
    write(folder, "z-mask.dcm", seed=52, PatientID="A", **mask(square().T))
    table(folder, "good.dcm,image,good-mask.dcm", "z-copy.dcm,image,z-mask.dcm")
    report = load(folder, PAIRED).report
    assert reasons(report) == {
        "z-copy.dcm": "a copy of a file before it",
        "z-mask.dcm": "the target of no image that is used",
    }


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("DATA_TARGET", None),
        ("DATA_TARGET", "path,label\ngood.dcm,image\n"),
        ("DATA_TARGET", "path,label,target,target\n"),
        ("DATA_TARGET", f"{HEAD}ZZNORA,image,m.dcm\nm.dcm,image,o.dcm\n"),
        ("DATA_TARGET", f"{HEAD}ZZNORA,image,./ZZNORA\n"),
        ("DATA_LABEL", f"{HEAD}ZZNORA,image\n"),
        ("DATA_LABEL", f"{HEAD}ZZNORA,image,m.dcm\nZZNORA,image,m2.dcm\n"),
        ("DATA_LABEL", "path,target\nZZNORA,m.dcm\n"),
    ],
)
def test_a_table_that_does_not_name_targets_is_one_clear_error(folder, code, content):
    (folder / "labels.csv").unlink()
    if content is not None:
        (folder / "labels.csv").write_text(content)
    with pytest.raises(DataError) as caught:
        check_folder(folder, PAIRED)
    assert caught.value.code == code
    assert "labels.csv" in caught.value.line()
    assert "NORA" not in caught.value.line()


@given(st.one_of(st.binary(max_size=80), st.text('ab,./\n"\\', max_size=80).map(str.encode)))
@settings(deadline=None, max_examples=150)
def test_any_table_is_targets_or_one_error(content):
    try:
        found = labels.parse_targets(HEAD.encode() + content)
    except DataError as error:
        assert error.code in ("DATA_TARGET", "DATA_LABEL")
        return
    assert not set(found) & set(found.values())


def test_no_pair_at_all_says_why(folder, in_process):
    table(folder, "good.dcm,image,absent.dcm")
    with pytest.raises(DataError) as caught:
        load(folder, PAIRED)
    assert caught.value.code == "DATA_EMPTY"
    assert "DATA_TARGET 2" in caught.value.line()


# ---- the cache, the command, the pool


def test_the_cache_keeps_targets_and_knows_when_they_change(folder, in_process, monkeypatch):
    decodings, collect = [], patients._collect
    monkeypatch.setattr(patients, "_collect", lambda *given: decodings.append(1) or collect(*given))
    cache = folder.parent / "home" / "images.safetensors"
    first, second = (load(folder, PAIRED, cache=cache) for _ in range(2))
    assert len(decodings) == 1
    assert np.array_equal(first.targets_N1HW, second.targets_N1HW)
    assert second.targets_N1HW.dtype == np.float16
    assert first.report == second.report
    write(folder, "good-mask.dcm", seed=51, PatientID="A", **mask(square().T))
    changed = load(folder, PAIRED, cache=cache)
    assert len(decodings) == 2
    assert not np.array_equal(first.targets_N1HW, changed.targets_N1HW)
    write(folder, "more.dcm", seed=52, PatientID="A", **mask(square()))
    table(folder, "good.dcm,image,more.dcm")
    assert np.array_equal(load(folder, PAIRED, cache=cache).targets_N1HW, first.targets_N1HW)
    assert load(folder, PAIRED.model_copy(update={"paired": False}), cache=cache).targets_N1HW is None
    assert load(folder, PAIRED, cache=cache).targets_N1HW is not None
    assert len(decodings) == 5


def test_dataset_check_counts_targets_and_lists_what_is_wrong(folder, tmp_path):
    write(folder, "image.dcm", seed=2, PatientID="B")
    table(folder, "good.dcm,image,good-mask.dcm", "image.dcm,image,good-mask.dcm")
    sites = "".join(f'[[sites]]\nname = "s{n}"\npatients = 99\n' for n in range(3))
    study = tmp_path / "study.toml"
    study.write_text(f'name = "x"\n{sites}\n[images]\nclasses = ["image"]\npaired = true\n')
    text = CliRunner().invoke(dataset.app, ["check", str(folder), "--study", str(study)]).output
    rows = {tuple(part.strip() for part in line.split("│")[1:3]) for line in text.splitlines() if "│" in line}
    assert {("images", "1"), ("targets", "1"), ("not used: DATA_TARGET", "1")} <= rows
    assert "image.dcm: its target is of another patient (DATA_TARGET)" in text


def test_phantoms_bring_masks_of_their_lungs(tmp_path):
    for number in range(3):
        vendor, alone, folder = phantoms.vendor_for(number), tmp_path / f"a{number}", tmp_path / f"p{number}"
        phantoms.write_hospital(alone, patients=10, seed=number, vendor=vendor, size=48)
        phantoms.write_hospital(folder, patients=10, seed=number, vendor=vendor, size=48, paired=True)
        images = {path.relative_to(alone): path.read_bytes() for path in alone.rglob("*.dcm")}
        assert all((folder / name).read_bytes() == content for name, content in images.items())
        assert not (alone / "labels.csv").exists()
        found = load_patients(folder, Images(paired=True), pseudonym_key=KEY)
        assert (found.report.images, found.report.targets, found.report.left_out) == (len(images), len(images), {})
        lungs = found.targets_N1HW > 0
        assert lungs.mean((1, 2, 3)).min() > 0.1
        assert lungs.mean((1, 2, 3)).max() < 0.6
        middle = np.zeros_like(lungs)
        middle[..., 8:48, 4:60] = True
        assert found.images_N1HW[lungs].mean() + 0.2 < found.images_N1HW[middle & ~lungs].mean(), "lung is dark"
        assert not np.array_equal(lungs[0], lungs[-1])


def test_a_pooled_set_of_pairs_is_split_with_its_targets(tmp_path):
    phantoms.write_hospital(tmp_path / "pool", patients=12, seed=1, vendor=phantoms.vendor_for(2), size=32, paired=True)
    rules = Images(size=28, paired=True)
    whole = load_patients(tmp_path / "pool", rules, pseudonym_key=KEY)
    files = used_files(tmp_path / "pool", rules)
    assert len(files) == len(whole.labels_N)
    partitions.write_share(files[::-1], rules.classes, tmp_path / "share")
    share = load_patients(tmp_path / "share", rules, pseudonym_key=KEY)
    assert np.array_equal(share.images_N1HW[::-1], whole.images_N1HW)
    assert np.array_equal(share.targets_N1HW[::-1], whole.targets_N1HW)
    assert os.listdir(tmp_path / "share" / "targets")
