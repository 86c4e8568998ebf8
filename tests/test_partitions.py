"""Splits of a pooled set: every patient at one hospital, as skewed as asked for, and the folders that come of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_study
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dicom import encode, make
from typer.testing import CliRunner

from fedmedgan.cli.main import app
from fedmedgan.client.data.patients import load_patients
from fedmedgan.shared.errors import DataError, RunError, StudyError
from fedmedgan.shared.study import from_dict
from fedmedgan.simulations import consortium, partitions, phantoms, record, report
from fedmedgan.simulations.partitions import Partition, Pool, label_of_patients, split

KEY = bytes(range(32))
KINDS = st.one_of(
    st.just(Partition()),
    st.builds(Partition, st.just("dirichlet"), st.sampled_from([1e-3, 0.1, 1.0, 1e6])),
    st.builds(Partition, st.just("quantity"), st.floats(0, 10)),
)


# ---- numbers


@given(KINDS, st.integers(1, 7), st.integers(0, 60), st.integers(1, 5), st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_every_patient_is_at_exactly_one_site_and_no_site_has_too_few(kind, n_sites, more, n_classes, seed):
    least = 4
    labels = np.random.default_rng(seed).integers(0, n_classes, n_sites * least + more)
    shares = split(labels, n_sites, kind, seed, least)
    assert len(shares) == n_sites
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(labels)))
    assert min(map(len, shares)) >= least
    assert all(share.dtype == np.int64 and (np.diff(share) > 0).all() for share in shares)
    if kind.kind != "quantity":
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("kind", [Partition(), Partition("dirichlet", 0.3), Partition("quantity", 1.2)], ids=str)
def test_a_seed_gives_one_split_and_another_seed_another(kind):
    labels = np.arange(200) % 3
    first, again, other = (split(labels, 4, kind, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_too_few_patients_are_refused():
    with pytest.raises(DataError, match="DATA_TOO_FEW"):
        split(np.zeros(29, np.int64), 3, Partition(), 0)
    assert [len(share) for share in split(np.zeros(30, np.int64), 3, Partition("quantity", 5), 0)] == [10, 10, 10]


def class_shares(kind: Partition, seed: int = 0) -> np.ndarray:
    """Share of class 1 at each of five sites, of a pool where it is 0.3."""
    labels = (np.arange(2000) % 10 < 3).astype(np.int64)
    return np.array([labels[share].mean() for share in split(labels, 5, kind, seed)])


def test_a_large_alpha_is_the_pool_and_a_small_one_is_one_class_a_site():
    assert np.abs(class_shares(Partition("dirichlet", 1e6)) - 0.3).max() < 0.06
    assert np.abs(class_shares(Partition()) - 0.3).max() < 0.06
    extreme = class_shares(Partition("dirichlet", 1e-3))
    assert (np.minimum(extreme, 1 - extreme) < 0.02).sum() >= 4, "one site may take of two classes"


def test_the_skew_is_near_that_of_the_dirichlet_distribution():
    """Variance of a class share under Dirichlet(alpha * p) is p (1 - p) / (alpha + 1)."""
    labels = (np.arange(600) % 2).astype(np.int64)
    for alpha in (1.0, 4.0, 16.0):
        kind = Partition("dirichlet", alpha)
        shares = [labels[share].mean() for seed in range(30) for share in split(labels, 6, kind, seed)]
        # The last sites take what the others left, which is a skew of its own.
        assert 0.8 < np.var(shares) * (alpha + 1) / 0.25 < 2.2


def test_quantity_follows_the_power_law():
    labels = np.zeros(1000, np.int64)
    for exponent in (0.0, 1.2, 2.0):
        weights = [rank**-exponent for rank in range(1, 5)]
        expected = [1000 * weight / sum(weights) for weight in weights]
        sizes = [len(share) for share in split(labels, 4, Partition("quantity", exponent), 0)]
        assert max(abs(a - b) for a, b in zip(sizes, expected, strict=True)) < 1
    assert [len(s) for s in split(labels, 4, Partition("quantity", 9), 0)] == [970, 10, 10, 10]


@pytest.mark.parametrize("text", ["iid", "dirichlet:0.3", "quantity:1.2", "dirichlet:1e+06", "quantity:0"])
def test_text_forms(text):
    assert str(Partition.parse(text)) == text


@pytest.mark.parametrize(
    ("code", "text"),
    [
        *(("CONFIG_TYPE", text) for text in ("", "IID", "iid:1", "dirichlet", "dirichlet:", "dirichlet:a", "zipf:1")),
        *(("CONFIG_RANGE", f"dirichlet:{n}") for n in ("0", "-1", "nan", "inf", "1e7")),
        *(("CONFIG_RANGE", f"quantity:{n}") for n in ("-0.1", "nan", "11")),
    ],
)
def test_other_texts_are_one_clear_error(code, text):
    with pytest.raises(StudyError) as caught:
        Partition.parse(text)
    assert (caught.value.code, caught.value.where) == (code, "--partition")


def test_a_patient_has_the_class_of_most_images_and_the_first_of_equals():
    assert label_of_patients([1, 1, 0, 2, 0, 2, 2], [0, 0, 0, 1, 1, 2, 3]).tolist() == [1, 0, 2, 2]


# ---- folders


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool") / "images"
    phantoms.write_hospital(folder, patients=80, seed=7, vendor=phantoms.vendor_for(0), size=32)
    return folder


def study_of(*declared: int, **sections):
    values = tiny_study(len(declared), **sections).model_dump(mode="json")
    for site, patients in zip(values["sites"], declared, strict=True):
        site["patients"] = patients
    return from_dict(values)


def contents(files) -> list[bytes]:
    return [Path(file.path).read_bytes() for file in files]


def test_a_share_is_a_folder_that_the_reader_takes_with_the_same_labels(pool, tmp_path):
    study = study_of(20, 20, 20)
    shares = partitions.share_out(Pool(pool, Partition("dirichlet", 0.3)), study)
    whole = load_patients(pool, study.images, pseudonym_key=KEY)
    names, images = [], 0
    for site, files in shares.items():
        folder = tmp_path / site
        partitions.write_share(files, study.images.classes, folder)
        read = load_patients(folder, study.images, pseudonym_key=KEY)
        assert read.labels_N.tolist() == [file.label for file in files]
        assert [path.read_bytes() for path in sorted(folder.glob("*.dcm"))] == contents(files)
        names += read.pseudonyms
        images += len(read.labels_N)
    assert sorted(names) == sorted(whole.pseudonyms)
    assert images == len(whole.labels_N)


def test_the_pool_is_not_changed_and_links_are_not_followed_out(pool, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in sorted(pool.rglob("*.dcm"))}
    shares = partitions.share_out(Pool(pool), study_of(20, 20, 20))
    partitions.write_share(shares["site-0"], ("clear", "opacity"), tmp_path / "links")
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("another disk")))
    partitions.write_share(shares["site-0"], ("clear", "opacity"), tmp_path / "copies")
    links, copies = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("links", "copies")
    )
    assert links == copies
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert {path: path.read_bytes() for path in sorted(pool.rglob("*.dcm"))} == before


def test_a_share_smaller_than_declared_is_refused_with_the_numbers_that_fit(pool):
    with pytest.raises(DataError) as caught:
        partitions.share_out(Pool(pool), study_of(20, 30, 20))
    assert caught.value.code == "DATA_TOO_FEW"
    assert "site-1" in caught.value.what
    assert caught.value.hint.endswith("site-0 27, site-1 27, site-2 26")
    partitions.share_out(Pool(pool), study_of(27, 27, 26))


def test_files_that_no_rule_takes_and_odd_names_do_no_harm(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    odd = (b'comma,"quote".dcm', b"two\nlines.dcm", b"\xff.dcm", b"back\\slash.dcm", b" .dcm")
    for number in range(36):
        name = odd[number] if number < len(odd) else b"%d.dcm" % number
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(encode(make(seed=number, PatientID=f"P{number}")))
    (folder / "notes.txt").write_text("x")
    (folder / "ultrasound.dcm").write_bytes(encode(make(seed=90, Modality="US")))
    study = study_of(12, 12, 12, images={"classes": ["image"]})
    shares = partitions.share_out(Pool(folder), study)
    files = [file for share in shares.values() for file in share]
    assert len(files) == 36
    partitions.write_share(files, study.images.classes, tmp_path / "all")
    assert load_patients(tmp_path / "all", study.images, pseudonym_key=KEY).n_patients == 36


def test_a_consortium_on_a_pooled_set_and_its_table_in_the_report(pool, tmp_path):
    run = tmp_path / "run"
    chosen = Pool(pool, Partition("quantity", 1.0), seed=3)
    study = consortium.prepare(study_of(30, 20, 10), run, {}, pool=chosen)
    consortium.read_data(run, study)
    found = record.load(run)
    assert found.split == record.Split("quantity:1", 3)
    assert not any(hospital.drawn or hospital.real for hospital in found.hospitals)
    whole = load_patients(pool, study.images, pseudonym_key=KEY)
    images = np.sum([hospital.classes.images for hospital in found.hospitals], axis=0)
    patients = np.sum([hospital.classes.patients for hospital in found.hospitals], axis=0)
    assert images.tolist() == np.bincount(whole.labels_N).tolist()
    assert patients.tolist() == np.bincount(label_of_patients(whole.labels_N, whole.patient_N)).tolist()
    page = report.write(run).read_text()
    assert "<code>quantity:1</code>, seed 3" in page
    assert "Patients and images by class" in page
    facts = json.loads((run / "report.json").read_text())
    assert facts["split"] == {"partition": "quantity:1", "seed": 3}
    assert np.sum([h["classes"]["images"] for h in facts["hospitals"]], axis=0).tolist() == images.tolist()
    for content in ('{"images": [1], "patients": [1]}', '{"images": [1, -1], "patients": [1, 1]}', "{}"):
        (consortium.home_of(run, "site-0") / consortium.CLASSES).write_text(content)
        with pytest.raises(RunError, match="RUN_RECORD"):
            record.load(run)


def test_classes_of_a_folder_that_was_given_are_in_no_report(pool, tmp_path):
    run, own = tmp_path / "run", tmp_path / "own"
    phantoms.write_hospital(own, patients=24, seed=5, vendor=phantoms.vendor_for(1), size=32)
    study = consortium.prepare(study_of(24, 24, 24), run, {"site-1": own})
    consortium.read_data(run, study)
    found = record.load(run)
    assert [hospital.classes is None for hospital in found.hospitals] == [False, True, False]
    assert found.split is None


# ---- the command


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("RUN_USAGE", ["--partition", "iid"]),
        ("RUN_USAGE", ["--partition-seed", "3"]),
        ("RUN_USAGE", ["--data-pool", "POOL", "--data", "north=POOL"]),
        ("CONFIG_TYPE", ["--data-pool", "POOL", "--partition", "skewed"]),
        ("DATA_PATH", ["--data-pool", "POOL/absent"]),
    ],
)
def test_options_that_do_not_go_together(pool, tmp_path, code, options):
    given_options = [option.replace("POOL", str(pool)) for option in options]
    result = CliRunner().invoke(app, ["simulate", "--out", str(tmp_path / "run"), *given_options])
    assert result.exception is not None
    assert getattr(result.exception, "code", None) == code
    assert not (tmp_path / "run").exists()
