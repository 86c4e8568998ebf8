"""A folder of DICOM files as images grouped by patient: the unit that sampling and the privacy guarantee
speak of.

Patients are told apart by HMAC-SHA256(pseudonym key, Patient ID), computed where the file is decoded; no
value of a header is kept, stored or printed. Order is that of the sorted paths, so two runs over one folder
agree.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedmedgan.client.data import labels as label_table
from fedmedgan.client.data.folder import Entry, scan
from fedmedgan.client.data.limits import Limits
from fedmedgan.client.data.outcomes import FileOutcome, FolderReport
from fedmedgan.client.data.pool import PSEUDONYM_BYTES, TIMED_OUT, Examined, WorkerPool
from fedmedgan.shared.errors import CryptoError, DataError
from fedmedgan.shared.study import Images

RADIOLOGY = ("CR", "CT", "DX", "IO", "MG", "MR", "NM", "PT", "PX", "RF", "XA")
"""Modalities that `dataset check` takes without a study: radiographs and slices. Ultrasound (US), secondary
captures (SC) and others (OT) are left to a study that asks for them: their pixels often hold text with the
patient's name."""

MIN_KEY_BYTES = 16

_ARRAYS = ("images", "labels", "patients", "pseudonyms")
_PROBLEMS = {
    "DATA_UNSAFE_PATH": "not a regular file inside the folder",
    "DATA_PATH": "the sub-folder cannot be read",
}


@dataclass(frozen=True)
class PatientImages:
    """The training images of one hospital, in memory."""

    images_N1HW: np.ndarray
    """float16 (N, 1, S, S) in [-1, 1]."""
    labels_N: np.ndarray
    """int64 (N,), place in the study's classes."""
    patient_N: np.ndarray
    """int64 (N,), 0..n_patients-1 in the order of first appearance."""
    n_patients: int
    report: FolderReport
    pseudonyms: tuple[str, ...] = field(repr=False)
    """Keyed hash of each patient's Patient ID, 32 hex digits, in the order of the numbers in `patient_N`."""
    targets_N1HW: np.ndarray | None = None
    """float16 (N, 1, S, S) in [-1, 1]: each image's target; None where the study has none."""


@dataclass(frozen=True)
class UsedFile:
    """One file of a folder that the rules take."""

    path: str
    """Where to open it: absolute, without links."""
    patient: int
    """0..n_patients-1 in the order of first appearance."""
    label: int
    """Place in the study's classes."""


def default_workers() -> int:
    return min(2, os.cpu_count() or 1)


def check_folder(
    folder: Path,
    rules: Images,
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FolderReport:
    """Say what every file of a folder is, and whether `rules` take it. Changes and keeps nothing.

    Args:
        progress: called with (files done, files in all).

    Raises:
        DataError: DATA_PATH not a readable folder; DATA_EMPTY no file at all; DATA_LABEL labels.csv is
        damaged.
            A folder without a usable image is reported, not raised.
        RunError: RUN_EXTRA, the DICOM libraries are missing.
    """
    entries, labels = _scan(folder), label_table.read(folder)
    key = secrets.token_bytes(32)
    return _collect(entries, labels, rules, key, limits or Limits(), workers, progress)[0].report


def used_files(folder: Path, rules: Images) -> tuple[UsedFile, ...]:
    """Which files of a folder the rules take, and whose they are, in the order of their paths.

    For a pooled set that a simulation splits among hospitals; a hospital itself has no use for it.

    Raises:
        DataError: like `load_patients`.
    """
    entries, labels = _scan(folder), label_table.read(folder)
    found, files = _collect(entries, labels, rules, secrets.token_bytes(32), Limits(), None, None)
    if not files:
        raise DataError("DATA_EMPTY", f"no usable image among {found.report.sentence()}", str(folder))
    return tuple(files)


def load_patients(
    folder: Path,
    rules: Images,
    *,
    pseudonym_key: bytes,
    cache: Path | None = None,
    limits: Limits | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PatientImages:
    """Decode a folder into training images.

    Args:
        pseudonym_key: at least 16 secret bytes of this hospital.
        cache: file for the decoded images, in the hospital's own home; made if absent, ignored if it does not
        fit. progress: called with (files done, files in all) while decoding.

    Returns:
        At least one image of at least one patient.

    Raises:
        DataError: like `check_folder`; DATA_EMPTY also where no image is usable, with the counts by reason.
        CryptoError: KEY_FORMAT, the key is too short.
    """
    if len(pseudonym_key) < MIN_KEY_BYTES:
        raise CryptoError("KEY_FORMAT", f"the pseudonym key has less than {MIN_KEY_BYTES} bytes")
    limits = limits or Limits()
    entries, labels = _scan(folder), label_table.read(folder)
    if cache is None:
        found, _ = _collect(entries, labels, rules, pseudonym_key, limits, workers, progress)
    else:
        from fedmedgan.client.data import cache as image_cache  # the coordinator has no safetensors

        state = image_cache.fingerprint(entries, labels, rules, limits)
        known = _as_images(image_cache.read(cache, _ARRAYS, state, pseudonym_key))
        found = known or _collect(entries, labels, rules, pseudonym_key, limits, workers, progress)[0]
        # A file that was only slow today must not stay left out.
        if known is None and not any(file.reason == TIMED_OUT for file in found.report.files):
            names = np.array(list(bytes.fromhex("".join(found.pseudonyms))), np.uint8).reshape(-1, PSEUDONYM_BYTES)
            kept = (found.images_N1HW, found.labels_N, found.patient_N, names)
            arrays = dict(zip(_ARRAYS, kept, strict=True))
            image_cache.write(cache, arrays, found.report.to_json(), state, pseudonym_key)
    if not found.report.images:
        raise DataError("DATA_EMPTY", f"no usable image among {found.report.sentence()}", str(folder))
    return found


def _scan(folder: Path) -> list[Entry]:
    entries = scan(folder)
    if not entries:
        hint = "give a folder of DICOM files"
        raise DataError("DATA_EMPTY", "the folder holds no file", str(folder), hint)
    return entries


def _collect(
    entries: list[Entry],
    labels_csv: bytes | None,
    rules: Images,
    key: bytes,
    limits: Limits,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[PatientImages, list[UsedFile]]:
    """Decode every entry, then take or leave each in the order of the paths."""
    labels = label_table.parse(labels_csv)
    examined = _examine(entries, rules, key, limits, workers or default_workers(), progress)
    files: list[FileOutcome] = []
    used: list[UsedFile] = []
    images: list[np.ndarray] = []
    labels_N: list[int] = []
    patient_N: list[int] = []
    patients: dict[str, int] = {}
    seen: set[str] = set()
    for entry, result in zip(entries, examined, strict=True):
        if not result.code:
            label, reason = label_table.label_of(entry.name, labels, rules.classes)
            if label is None:
                result = replace(result, code="DATA_LABEL", reason=reason)
            elif seen & {result.instance or result.pixel_sha256, result.pixel_sha256}:
                result = replace(result, code="DATA_DUPLICATE", reason="a copy of a file before it")
            elif result.images is not None:
                seen |= {result.instance, result.pixel_sha256} - {""}
                number = patients.setdefault(result.patient, len(patients))
                used.append(UsedFile(entry.path, number, label))
                images.append(result.images)
                labels_N += [label] * len(result.images)
                patient_N += [number] * len(result.images)
        files.append(_outcome(entry, result))
    size = rules.size
    stacked = np.concatenate(images) if images else np.zeros((0, size, size), np.float16)
    found = PatientImages(
        stacked[:, None],
        np.array(labels_N, np.int64),
        np.array(patient_N, np.int64),
        len(patients),
        FolderReport(tuple(files), len(labels_N), len(patients)),
        tuple(patients),
    )
    return found, used


def _examine(
    entries: list[Entry],
    rules: Images,
    key: bytes,
    limits: Limits,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[Examined]:
    """What each entry is, in the order of `entries`."""
    results: list[Examined] = [Examined("refused", e.problem, _PROBLEMS.get(e.problem, "")) for e in entries]
    regular = [place for place, entry in enumerate(entries) if not entry.problem]
    with WorkerPool(rules.size, rules.modalities, key, limits, workers) as pool:
        for done, (index, result) in enumerate(pool.examine([entries[place].path for place in regular]), 1):
            results[regular[index]] = result
            if progress:
                progress(done, len(regular))
    return results


def _outcome(entry: Entry, result: Examined) -> FileOutcome:
    path = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
    outcome, used = result.outcome, not result.code
    return FileOutcome(path, outcome, result.code, result.shape, result.pixel_sha256, used, result.reason)


def _as_images(known: tuple[dict[str, np.ndarray], dict[str, Any]] | None) -> PatientImages | None:
    """What a cache held, None where it held nothing."""
    if known is None:
        return None
    arrays, values = known
    try:
        report = FolderReport.from_json(values)
    except (KeyError, TypeError):
        return None
    images, labels, patients, names = (arrays[name] for name in _ARRAYS)
    pseudonyms = tuple(name.tobytes().hex() for name in names)
    return PatientImages(images, labels, patients, report.patients, report, pseudonyms)
