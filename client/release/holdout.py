"""Patients to test with, chosen before anything is trained: never images of one patient on both sides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmedgan.shared.errors import DataError


def split_patients(patient_N: Any, holdout_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows for training and rows held out, no patient in both.

    Args:
        patient_N: patient of each image, integers or strings.
        holdout_fraction: fraction of the PATIENTS to hold out, in (0, 1); at least one stays on either side.
        seed: chooses the patients; independent of the order of the images.

    Returns:
        Sorted row numbers (training, held out).

    Raises:
        DataError: DATA_EVALUATION, fewer than two patients or a fraction outside (0, 1).
    """
    patient_N = np.asarray(patient_N)
    patients = np.unique(patient_N)
    if not 0 < holdout_fraction < 1:
        raise DataError("DATA_EVALUATION", f"the hold-out fraction {holdout_fraction} is not between 0 and 1")
    if patient_N.ndim != 1 or len(patients) < 2:
        raise DataError("DATA_EVALUATION", "at least two patients are needed to hold one out")
    count = min(max(round(holdout_fraction * len(patients)), 1), len(patients) - 1)
    held = np.random.default_rng(seed).choice(patients, size=count, replace=False)
    is_held_N = np.isin(patient_N, held)
    return np.flatnonzero(~is_held_N), np.flatnonzero(is_held_N)


def refuse_same_patients(training: Iterable[str], held_out: Iterable[str]) -> None:
    """No patient may be on both sides, not even with another image: that would flatter whatever is tested.

    Args:
        training: pseudonyms of the patients trained on (`PatientImages.pseudonyms`).
        held_out: pseudonyms of the patients to test with, made with the same key.

    Raises:
        DataError: DATA_DUPLICATE, with the number of patients that are on both sides, and not who they are.
    """
    if both := len(set(training) & set(held_out)):
        what = f"patients held out who are also trained on: {both}"
        hint = "hold out other patients; equal Patient IDs in both folders count as one patient"
        raise DataError("DATA_DUPLICATE", what, "--holdout", hint=hint)
