"""A consortium on this machine: folders, keys, data and policies of hospitals that share nothing but a disk.

Each simulated hospital is the real one (fedmedgan.client.cycle.Hospital) with a home folder of its own. What a real
consortium does in a key ceremony is done here by one function, because there is nobody here to hide anything from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedmedgan.client.cycle import SAMPLE_COLUMNS, Hospital
from fedmedgan.client.joining import join
from fedmedgan.client.release import pictures
from fedmedgan.shared.errors import DataError, RunError, StudyError
from fedmedgan.shared.secure_sum import keys
from fedmedgan.shared.study import Study
from fedmedgan.simulations import phantoms

INSECURE_MARK = "INSECURE-SEED"
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
    device: str = "auto",
    insecure_seed: int | None = None,
) -> Study:
    """Build every party's folder. Returns the study with the hospitals' public keys in it.

    Args:
        data: site name -> folder with its DICOM files; sites without one get phantoms.

    Raises:
        RunError: RUN_PATH, the run folder is in use.
        StudyError: STUDY_ROSTER, `data` names a site that the study does not have.
        DataError: DATA_PATH and what else reading the folders raises; every folder is read before anything runs.
    """
    for name, folder in data.items():
        study.index(name)
        if not folder.is_dir():
            raise DataError("DATA_PATH", f"the folder of {name} is not there", str(folder))
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        if any(run_folder.iterdir()):
            raise RunError("RUN_PATH", "the run folder is not empty", str(run_folder))
        identities = {site.name: keys.generate_identity() for site in study.sites}
        study = _with_keys(study, identities)
        epoch = keys.new_epoch()
        for number, site in enumerate(study.sites):
            home = home_of(run_folder, site.name)
            identities[site.name].with_epoch(*epoch).save(home / "keys")
            folder = data.get(site.name, home / PHANTOMS)
            if site.name not in data:
                vendor = phantoms.vendor_for(number)
                phantoms.write_hospital(folder, patients=site.patients, seed=number, vendor=vendor)
            _write_policy(home, site.name, folder.resolve(), study, device)
            join(home, study)
        if insecure_seed is not None:
            (run_folder / INSECURE_MARK).write_text(f"{insecure_seed}\n")
        agreed = {"hash": study.hash, "study": study.model_dump(mode="json")}
        (run_folder / "study.json").write_text(json.dumps(agreed, indent=1), encoding="utf-8")
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(run_folder)) from None
    return study


def read_data(run_folder: Path, study: Study) -> None:
    """Read every hospital's folder once, through the real reader, and draw what the model makes before training.

    Phantoms are drawn for the report as well. Images of patients are not: a report is made to be shown.
    """
    for home in homes(run_folder, study):
        hospital = Hospital(home)
        patients = hospital.load_patients()
        hospital.draw_samples()
        if not (home / PHANTOMS).is_dir():
            continue
        sheet = pictures.by_class(patients.images_N1HW, patients.labels_N, len(study.images.classes), SAMPLE_COLUMNS)
        (home / "real.png").write_bytes(pictures.png(sheet))


def _with_keys(study: Study, identities: Mapping[str, keys.HospitalKeys]) -> Study:
    if any(site.signing_key or site.exchange_key for site in study.sites):
        hint = "leave the keys out of the study"
        raise StudyError("STUDY_KEYS", "a simulation makes its own keys", "sites", hint=hint)
    sites = tuple(
        site.model_copy(
            update={
                "signing_key": identities[site.name].signing_public,
                "exchange_key": identities[site.name].exchange_public,
            }
        )
        for site in study.sites
    )
    return study.model_copy(update={"sites": sites})


def _write_policy(home: Path, site: str, data: Path, study: Study, device: str) -> None:
    text = (
        f"# The rules of {site}. They outrank any study.\n"
        f"site = {json.dumps(site)}\n"
        f"data = {json.dumps(str(data))}\n"
        f"max_epsilon = {study.privacy.epsilon}\n"
        f"device = {json.dumps(device)}\n"
    )
    (home / "policy.toml").write_text(text, encoding="utf-8")
