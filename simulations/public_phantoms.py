"""Phantoms whom no simulated hospital holds: public images for pre-training, where a user has none at hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import PatientImages, load_patients
from fedmedgan.shared.study import Study
from fedmedgan.simulations import phantoms

PATIENTS = 300
"""Over all vendors."""
SEED = 20_000
"""Simulated hospitals draw theirs from 0, test patients from 10,000 on."""


def draw(study: Study, patients: int = PATIENTS) -> PatientImages:
    """Phantoms of every vendor, read under the study's rules like a hospital's files.

    Raises:
        DataError: DATA_EMPTY, the study takes none: neither its classes nor its modalities are those of phantoms.
    """
    sets = []
    for number, vendor in enumerate(phantoms.VENDORS):
        with tempfile.TemporaryDirectory() as folder:
            n, paired = patients // len(phantoms.VENDORS), study.images.paired
            phantoms.write_hospital(Path(folder), patients=n, seed=SEED + number, vendor=vendor, paired=paired)
            sets.append(load_patients(Path(folder), study.images, pseudonym_key=os.urandom(32)))
    return _together(sets)


def _together(sets: Sequence[PatientImages]) -> PatientImages:
    """Patients of several folders, all of them different people."""
    images, first = np.concatenate([s.images_N1HW for s in sets]), np.cumsum([0, *(s.n_patients for s in sets)])
    targets = [s.targets_N1HW for s in sets if s.targets_N1HW is not None]
    return PatientImages(
        images,
        np.concatenate([s.labels_N for s in sets]),
        np.concatenate([s.patient_N + start for s, start in zip(sets, first[:-1], strict=True)]),
        int(first[-1]),
        FolderReport((), len(images), int(first[-1])),
        tuple(name for s in sets for name in s.pseudonyms),
        np.concatenate(targets) if targets else None,
    )
