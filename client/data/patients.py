"""A folder of DICOM files as images grouped by patient: the unit that sampling and the privacy guarantee
speak of.

Patients are told apart by HMAC-SHA256(pseudonym key, Patient ID), computed where the file is decoded; no
value of a header is kept, stored or printed. Order is that of the sorted paths, so two runs over one folder
agree.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedmedgan.client.data import labels as label_table
from fedmedgan.client.data.folder import Entry, scan
from fedmedgan.client.data.limits import Limits
from fedmedgan.client.data.outcomes import FileOutcome, FolderReport, Role
from fedmedgan.client.data.pool import PSEUDONYM_BYTES, TIMED_OUT, Examined, WorkerPool
from fedmedgan.client.data.targets import pair
from fedmedgan.shared.errors import CryptoError, DataError
from fedmedgan.shared.study import Images

RADIOLOGY = ("CR", "CT", "DX", "IO", "MG", "MR", "NM", "PT", "PX", "RF", "XA")
"""Modalities that `dataset check` takes without a study: radiographs and slices. Ultrasound (US), secondary
captures (SC) and others (OT) are left to a study that asks for them: their pixels often hold text with the
patient's name."""

MIN_KEY_BYTES = 16

_ARRAYS = ("images", "labels", "patients", "pseudonyms")
_TARGETS = "targets"
"""One more array in the cache, where the study has pairs."""
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
    """float16 (N, 1, S, S) in [-1, 1]: each image's target, cut like it; None where the study has none."""


@dataclass(frozen=True)
class UsedFile:
    """One file of a folder that the rules take."""

    path: str
    """Where to open it: absolute, without links."""
    patient: int
    """0..n_patients-1 in the order of first appearance."""
    label: int
    """Place in the study's classes."""
    target: str = ""
    """Where to open its target, "" where the study has none."""
    images: int = 1
    """Images that it gives: one for each of its frames that holds information."""


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
            damaged; DATA_TARGET it names no targets in a study of pairs. A folder without a usable image is
            reported, not raised.
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
    return load_files(folder, rules)[1]


def load_files(folder: Path, rules: Images) -> tuple[PatientImages, tuple[UsedFile, ...]]:
    """The images of a folder, and the files that they come from, both in the order of the paths.

    Patients have other pseudonyms each time: for images that are not compared with those of anybody else.

    Raises:
        DataError: like `load_patients`.
    """
    entries, labels = _scan(folder), label_table.read(folder)
    found, files = _collect(entries, labels, rules, secrets.token_bytes(32), Limits(), None, None)
    if not files:
        raise DataError("DATA_EMPTY", f"no usable image among {found.report.sentence()}", str(folder))
    return found, tuple(files)


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
            fit.
        progress: called with (files done, files in all) while decoding.

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
        wanted = (*_ARRAYS, _TARGETS) if rules.paired else _ARRAYS
        known = _as_images(image_cache.read(cache, wanted, state, pseudonym_key))
        found = known or _collect(entries, labels, rules, pseudonym_key, limits, workers, progress)[0]
        # A file that was only slow today must not stay left out.
        if known is None and not any(file.reason == TIMED_OUT for file in found.report.files):
            names = np.array(list(bytes.fromhex("".join(found.pseudonyms))), np.uint8).reshape(-1, PSEUDONYM_BYTES)
            kept = (found.images_N1HW, found.labels_N, found.patient_N, names)
            arrays = dict(zip(_ARRAYS, kept, strict=True))
            if found.targets_N1HW is not None:
                arrays[_TARGETS] = found.targets_N1HW
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
    target_of = label_table.parse_targets(labels_csv) if rules.paired else {}
    named = frozenset(target_of.values())
    examined = _examine(entries, named, rules, key, limits, workers or default_workers(), progress)
    targets = {entry.name: result for entry, result in zip(entries, examined, strict=True) if entry.name in named}
    pixels_of_targets = {(target.patient, target.pixel_sha256) for target in targets.values() if target.pixel_sha256}
    paths = {entry.name: entry.path for entry in entries}
    decided: list[Examined] = []
    used: dict[str, UsedFile] = {}
    images: list[np.ndarray] = []
    partners: list[np.ndarray] = []
    labels_N: list[int] = []
    patient_N: list[int] = []
    patients: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()  # of each patient by itself: nobody decides whether another's images are used
    for entry, result in zip(entries, examined, strict=True):
        if not result.code and entry.name not in named:
            label, reason = label_table.label_of(entry.name, labels, rules.classes)
            found, partner, no_pair = result.images, None, ""
            if rules.paired:
                found, partner, no_pair = pair(result, target_of.get(entry.name), targets)
            if label is None:
                result = replace(result, code="DATA_LABEL", reason=reason)
            elif seen & {(result.patient, mark) for mark in (result.instance, result.pixel_sha256) if mark}:
                result = replace(result, code="DATA_DUPLICATE", reason="a copy of a file before it")
            elif (result.patient, result.pixel_sha256) in pixels_of_targets:
                result = replace(result, code="DATA_DUPLICATE", reason="a copy of a target")
            elif found is None:
                result = replace(result, code="DATA_TARGET", reason=no_pair)
            else:
                seen |= {(result.patient, mark) for mark in (result.instance, result.pixel_sha256) if mark}
                number = patients.setdefault(result.patient, len(patients))
                target = paths[target_of[entry.name]] if rules.paired else ""
                used[entry.name] = UsedFile(entry.path, number, label, target, len(found))
                images.append(found)
                partners += [partner] if partner is not None else []
                labels_N += [label] * len(found)
                patient_N += [number] * len(found)
        decided.append(result)
    of_used = {target_of[name] for name in used if rules.paired}
    files = [_outcome(e, r, e.name in named, e.name in of_used) for e, r in zip(entries, decided, strict=True)]
    return PatientImages(
        _stacked(images, rules.size),
        np.array(labels_N, np.int64),
        np.array(patient_N, np.int64),
        len(patients),
        FolderReport(tuple(files), len(labels_N), len(patients)),
        tuple(patients),
        _stacked(partners, rules.size) if rules.paired else None,
    ), list(used.values())


def _stacked(images: list[np.ndarray], size: int) -> np.ndarray:
    """float16 (N, 1, S, S)."""
    return (np.concatenate(images) if images else np.zeros((0, size, size), np.float16))[:, None]


def _examine(
    entries: list[Entry],
    targets: Collection[str],
    rules: Images,
    key: bytes,
    limits: Limits,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[Examined]:
    """What each entry is, in the order of `entries`; those named in `targets` are read as targets."""
    results: list[Examined] = [Examined("refused", e.problem, _PROBLEMS.get(e.problem, "")) for e in entries]
    regular = [place for place, entry in enumerate(entries) if not entry.problem]
    images = [place for place in regular if entries[place].name not in targets]
    of_images = [place for place in regular if entries[place].name in targets]
    done = 0
    for places, options in ((images, {}), (of_images, {"targets": True})):
        if not places:
            continue
        with WorkerPool(rules.size, rules.modalities, key, limits, workers, **options) as pool:
            for index, result in pool.examine([entries[place].path for place in places]):
                results[places[index]] = result
                done += 1
                if progress:
                    progress(done, len(regular))
    return results


def _outcome(entry: Entry, result: Examined, is_target: bool, is_used_target: bool) -> FileOutcome:
    if is_target and not is_used_target and not result.code:
        result = replace(result, code="DATA_TARGET", reason="the target of no image that is used")
    path = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
    role: Role = "target" if is_target else "image"
    used = not result.code
    return FileOutcome(path, result.outcome, result.code, result.shape, result.pixel_sha256, used, result.reason, role)


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
    return PatientImages(images, labels, patients, report.patients, report, pseudonyms, arrays.get(_TARGETS))
