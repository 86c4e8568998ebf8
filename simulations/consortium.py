"""A consortium on this machine: folders, keys, data and policies of hospitals that share nothing but a disk.

Each simulated hospital is the real one (fedmedgan.client.cycle.Hospital) with a home folder of its own. What people do
by hand in a real consortium (identities, signatures under the study) is done here by one function; the key of the sums
is then made by the hospitals themselves, as in a real one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from fedmedgan.client import joining, pretrained
from fedmedgan.client.cycle import Hospital
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.home import SAMPLE_COLUMNS
from fedmedgan.client.release import pictures
from fedmedgan.server.app import KEY_FILE
from fedmedgan.shared.agreement import Agreement, Identity, assemble
from fedmedgan.shared.errors import DataError, RunError, StudyError
from fedmedgan.shared.secure_sum import keys
from fedmedgan.shared.study import Study
from fedmedgan.simulations import partitions, phantoms

INSECURE_MARK = "INSECURE-SEED"
PARTITION = "partition.json"
"""How a pooled set was split among the hospitals; there only if one was."""
CLASSES = "classes.json"
"""In a hospital's home: how many images and patients of each class, for phantoms and shares of a pooled set."""
PHANTOMS = "dicom"
"""Folder of a hospital's home that holds its files, where they are drawn."""


def home_of(run_folder: Path, site: str) -> Path:
    """Home folder of a simulated hospital."""
    return run_folder / "hospitals" / site


def homes(run_folder: Path, study: Study) -> list[Path]:
    """Home folders in the order of the roster."""
    return [home_of(run_folder, site.name) for site in study.sites]


def prepare(
    study: Study,
    run_folder: Path,
    data: Mapping[str, Path],
    *,
    pool: partitions.Pool | None = None,
    weights: Path | None = None,
    device: str = "auto",
    insecure_seed: int | None = None,
) -> Study:
    """Build every party's folder. Returns the study with the hospitals' public keys in it.

    Args:
        data: site name -> folder with its DICOM files; sites without one get phantoms.
        pool: a set to split among all sites, instead of `data`; their shares are written into their homes.
        weights: file of the initial weights, where the study names some.

    Raises:
        RunError: RUN_PATH, the run folder is in use.
        ModelError: MODEL_HASH, MODEL_MISMATCH: other initial weights than the study's, or none.
        StudyError: STUDY_ROSTER, `data` names a site that the study does not have.
        DataError: DATA_PATH and what else reading the folders raises; every folder is read before anything runs.
            DATA_TOO_FEW, a site's share of the pool is smaller than it declares.
    """
    _refuse_keys(study)
    pretrained.check(study, weights)
    for name, folder in data.items():
        study.index(name)
        if not folder.is_dir():
            raise DataError("DATA_PATH", f"the folder of {name} is not there", str(folder))
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        if any(run_folder.iterdir()):
            raise RunError("RUN_PATH", "the run folder is not empty", str(run_folder))
        shares = partitions.share_out(pool, study) if pool else {}
        if pool:
            how = {"partition": str(pool.partition), "seed": pool.seed}
            (run_folder / PARTITION).write_text(json.dumps(how) + "\n")
        identities = []
        for number, site in enumerate(study.sites):
            home = home_of(run_folder, site.name)
            folder = data.get(site.name, home / (partitions.POOLED if pool else PHANTOMS))
            ceiling = study.privacy.epsilon
            known = joining.init_home(
                home,
                site=site.name,
                data=str(folder.resolve()),
                max_epsilon=ceiling,
                budget_book=Path("..", "..", "budget-books", site.name),
                device=device,
                public_images=not study.is_private,
            )
            identities.append(known)
            if site.name in shares:
                partitions.write_share(shares[site.name], study.images.classes, folder)
            elif site.name not in data:
                vendor = phantoms.vendor_for(number)
                paired = study.images.paired
                phantoms.write_hospital(folder, patients=site.patients, seed=number, vendor=vendor, paired=paired)
        agreement = agree(assemble(study, [*identities, _coordinator(run_folder)]), run_folder, weights)
        if insecure_seed is not None:
            (run_folder / INSECURE_MARK).write_text(f"{insecure_seed}\n")
        (run_folder / "study.json").write_bytes(agreement.to_json())
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(run_folder)) from None
    return agreement.study


def give_key(run_folder: Path, study: Study) -> keys.Epoch:
    """The first key epoch without a ceremony: for tests and benchmarks that play the coordinator themselves."""
    epoch = keys.new_epoch(1, tuple(site.name for site in study.sites))
    for home in homes(run_folder, study):
        keys.store_next(home / "keys", epoch)
        keys.activate_next(home / "keys", 1)
    return epoch


def read_data(run_folder: Path, study: Study) -> None:
    """Read every hospital's folder once, through the real reader, and draw what the model makes before training.

    Phantoms are drawn for the report as well. Images of patients are not: a report is made to be shown. Classes are
    counted for phantoms and shares of a pooled set; those of a hospital's own folder are nobody else's business.
    """
    for home in homes(run_folder, study):
        hospital = Hospital(home)
        patients = hospital.load_patients()
        hospital.draw_samples()
        if (home / PHANTOMS).is_dir() or (home / partitions.POOLED).is_dir():
            counts = json.dumps(_count_classes(patients, len(study.images.classes)))
            (home / CLASSES).write_text(counts + "\n")
        if not (home / PHANTOMS).is_dir():
            continue
        (home / "real.png").write_bytes(pictures.png(_own_images(patients, len(study.images.classes))))


def _own_images(patients: PatientImages, n_classes: int) -> Image.Image:
    """One row a class; of pairs one image of some patients, and below each its target."""
    if patients.targets_N1HW is None:
        return pictures.by_class(patients.images_N1HW, patients.labels_N, n_classes, SAMPLE_COLUMNS)
    some = np.unique(patients.patient_N, return_index=True)[1][:SAMPLE_COLUMNS]
    return pictures.grid(np.concatenate([patients.images_N1HW[some], patients.targets_N1HW[some]]), len(some))


def _count_classes(patients: PatientImages, n_classes: int) -> dict[str, list[int]]:
    """Images of each class, and patients by the class that most of their images have."""
    labels_P = partitions.label_of_patients(patients.labels_N, patients.patient_N)
    counted = {"images": patients.labels_N, "patients": labels_P}
    return {name: np.bincount(labels, minlength=n_classes).tolist() for name, labels in counted.items()}


def _coordinator(run_folder: Path) -> Identity:
    private = Ed25519PrivateKey.generate()
    keys.save_signing_key(run_folder / KEY_FILE, private)
    public = private.public_key().public_bytes_raw().hex()
    return Identity(role="coordinator", name="coordinator", signing_key=public).signed(private)


def agree(study: Study, run_folder: Path, weights: Path | None = None) -> Agreement:
    """Every hospital enters the study and signs it; then all of them hold all signatures."""
    agreement = Agreement(study)
    for site in study.sites:
        own = joining.join(home_of(run_folder, site.name), study, weights=weights)
        agreement = agreement.with_signature(site.name, own.signatures[site.name])
    for home in homes(run_folder, study):
        joining.keep(home, agreement)
    return agreement


def _refuse_keys(study: Study) -> None:
    if study.coordinator_key or any(site.signing_key or site.exchange_key for site in study.sites):
        hint = "leave the keys out of the study"
        raise StudyError("STUDY_KEYS", "a simulation makes its own keys", "sites", hint=hint)
