"""The images of a hospital's policy, read under a study's rules and checked against what the study declares."""

from __future__ import annotations

from pathlib import Path

from fedmedgan.client.data.patients import PatientImages, load_patients
from fedmedgan.shared.errors import DataError, StudyError
from fedmedgan.shared.study import Site, Study


def load_declared(data: Path, study: Study, site: Site, *, pseudonym_key: bytes, home: Path) -> PatientImages:
    """Read this hospital's images; what was decoded once is kept in the home's cache.

    Raises:
        DataError: DATA_*, among them DATA_TOO_FEW.
        StudyError: CONFIG_DELTA, delta is not below one over the real number of patients.
    """
    cache = home / "cache" / "images.safetensors"
    patients = load_patients(data, study.images, pseudonym_key=pseudonym_key, cache=cache)
    if patients.n_patients < site.patients:
        raise DataError("DATA_TOO_FEW", f"fewer patients than the {site.patients} declared", site.name)
    if study.privacy.delta * patients.n_patients >= 1:
        raise StudyError("CONFIG_DELTA", "delta is not below one over the number of patients", site.name)
    return patients
