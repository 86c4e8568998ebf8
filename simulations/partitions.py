"""One pooled set of images split among the hospitals of a simulation, by patient.

How much a federation gains, and how much its hospitals' models drift apart, hangs on how unlike their patients are.
These splits make it repeatable; folders that really come from different hospitals (`--data`) are better evidence.

| text | hospitals get |
|---|---|
| ``iid`` | equal numbers of patients, drawn at random |
| ``dirichlet:ALPHA`` | equal numbers of patients; class shares by Dirichlet(ALPHA * p), where p is the pool's |
| ``quantity:EXPONENT`` | numbers of patients by a power law, rank^-EXPONENT in the order of the roster |

Every patient is at exactly one hospital, with all images. The same seed gives the same split.

Source: Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution", section 3 (Dirichlet).
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmedgan.client.data.folder import LABELS
from fedmedgan.client.data.patients import UsedFile, used_files
from fedmedgan.shared.errors import DataError, StudyError
from fedmedgan.shared.study import Study

LEAST = 10
"""Patients at every hospital: the fewest that a study can declare."""
POOLED = "pooled"
"""Folder of a hospital's home that holds its share of a pooled set."""
_RANGES = {"dirichlet": (1e-3, 1e6), "quantity": (0.0, 10.0)}
_FORM = "give iid, dirichlet:0.3 or quantity:1.2"


@dataclass(frozen=True)
class Partition:
    """How a pooled set is split."""

    kind: str = "iid"
    """iid, dirichlet or quantity."""
    parameter: float = 0.0
    """ALPHA or EXPONENT; unused for iid."""

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read ``iid``, ``dirichlet:0.3`` or ``quantity:1.2``.

        Raises:
            StudyError: CONFIG_TYPE, another form; CONFIG_RANGE, the number is out of range.
        """
        kind, _, number = text.partition(":")
        if text == "iid":
            return cls()
        try:
            parameter = float(number)
            low, high = _RANGES[kind]
        except (KeyError, ValueError):
            raise StudyError("CONFIG_TYPE", f"{text!r} is not a partition", "--partition", hint=_FORM) from None
        if not low <= parameter <= high:  # nor is nan
            raise StudyError("CONFIG_RANGE", f"the number of {kind} is from {low:g} to {high:g}", "--partition")
        return cls(kind, parameter)

    def __str__(self) -> str:
        return self.kind if self.kind == "iid" else f"{self.kind}:{self.parameter:g}"


@dataclass(frozen=True)
class Pool:
    """A folder of labelled DICOM that one person may split: public images, never a hospital's own."""

    folder: Path
    partition: Partition = Partition()
    seed: int = 0


# ---- numbers


def split(
    label_of_patient_N: np.ndarray, n_sites: int, kind: Partition, seed: int, least: int = LEAST
) -> list[np.ndarray]:
    """Which patients each site gets.

    Args:
        label_of_patient_N: int (N,), the class of each patient.
        least: patients that every site gets at least; quantity skew takes them from the largest sites.

    Returns:
        For each site the patients' places in `label_of_patient_N`, int64, ascending; each place in exactly one.

    Raises:
        DataError: DATA_TOO_FEW, there are fewer than `least` patients for each site.
    """
    n = len(label_of_patient_N)
    if n_sites < 1 or n < n_sites * least:
        what = f"{n} patients, and {n_sites} hospitals need {least} each"
        raise DataError("DATA_TOO_FEW", what, hint="give a larger pool, or fewer hospitals")
    rng = np.random.default_rng(seed)
    if kind.kind == "dirichlet":
        shares = _skewed_labels(label_of_patient_N, n_sites, kind.parameter, rng)
    else:
        sizes = np.full(n_sites, n // n_sites) + (np.arange(n_sites) < n % n_sites)
        if kind.kind == "quantity":
            sizes = _skewed_sizes(n, n_sites, kind.parameter, least)
        shares = np.split(rng.permutation(n), np.cumsum(sizes)[:-1])
    return [np.sort(share).astype(np.int64) for share in shares]


def _skewed_sizes(n: int, n_sites: int, exponent: float, least: int) -> np.ndarray:
    """Whole numbers that sum to n, by rank^-exponent, none below `least`."""
    share = np.arange(1, n_sites + 1, dtype=float) ** -exponent
    share *= n / share.sum()
    sizes = np.floor(share).astype(np.int64)
    largest_rests = np.argsort(sizes - share, kind="stable")[: n - sizes.sum()]
    sizes[largest_rests] += 1
    while sizes.min() < least:
        sizes[sizes.argmax()] -= 1
        sizes[sizes.argmin()] += 1
    return sizes


def _skewed_labels(label_N: np.ndarray, n_sites: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Each site's classes by its own draw of Dirichlet(alpha * p), as many patients everywhere.

    Sites are filled one after the other, in a random order. A class that has run out is no longer drawn; once all
    classes that a site wants have run out, it takes of the rest at random. So the last sites are a little less free.
    """
    n = len(label_N)
    _, class_N = np.unique(label_N, return_inverse=True)
    left_C = np.bincount(class_N)
    waiting = [list(rng.permutation(np.flatnonzero(class_N == c))) for c in range(len(left_C))]
    wish_KC = rng.dirichlet(alpha * left_C / n, n_sites)
    shares: list[list[int]] = [[] for _ in range(n_sites)]
    for place, site in enumerate(rng.permutation(n_sites)):
        for _ in range(n // n_sites + (place < n % n_sites)):
            chance_C = wish_KC[site] * (left_C > 0)
            if not chance_C.sum() > 0:
                chance_C = left_C.astype(float)
            label = rng.choice(len(left_C), p=chance_C / chance_C.sum())
            shares[site].append(waiting[label].pop())
            left_C[label] -= 1
    return [np.array(share) for share in shares]


def label_of_patients(labels_N: Sequence[int] | np.ndarray, patient_N: Sequence[int] | np.ndarray) -> np.ndarray:
    """The commonest class among each patient's images, the first one of equals: int64 (patients,)."""
    counts_PC = np.zeros((max(patient_N) + 1, max(labels_N) + 1), np.int64)
    np.add.at(counts_PC, (np.asarray(patient_N), np.asarray(labels_N)), 1)
    return np.asarray(counts_PC.argmax(1))


# ---- files


def share_out(pool: Pool, study: Study) -> dict[str, list[UsedFile]]:
    """Read a pooled folder and decide which hospital gets which files. Writes nothing.

    Raises:
        DataError: what reading the folder raises; DATA_TOO_FEW, a hospital would get fewer patients than it declares:
            the hint says which numbers fit.
    """
    files = used_files(pool.folder, study.images)
    label_of_patient_N = label_of_patients([f.label for f in files], [f.patient for f in files])
    shares = split(label_of_patient_N, len(study.sites), pool.partition, pool.seed)
    sizes = {site.name: len(share) for site, share in zip(study.sites, shares, strict=True)}
    if short := [site.name for site in study.sites if sizes[site.name] < site.patients]:
        what = f"the pool's share of {', '.join(short)} is smaller than the number of patients declared"
        fitting = ", ".join(f"{name} {size}" for name, size in sizes.items())
        hint = f"declare at most these numbers of patients in the study: {fitting}"
        raise DataError("DATA_TOO_FEW", what, "--data-pool", hint=hint)
    owner = {patient: site.name for site, share in zip(study.sites, shares, strict=True) for patient in share.tolist()}
    return {site.name: [f for f in files if owner[f.patient] == site.name] for site in study.sites}


def write_share(files: Sequence[UsedFile], classes: Sequence[str], folder: Path) -> None:
    """Write one hospital's share as a folder that the reader takes: numbered files and labels.csv.

    In a study of pairs each image's target is written, too, under targets/. Files are hard links where the disk
    allows it, since a pool may be large, and copies elsewhere. The pool's own names are not kept: public sets put
    patients' numbers into them, and no name can then upset a table.

    Raises:
        OSError: the folder exists, or cannot be written.
    """
    folder.mkdir(parents=True)
    with (folder / LABELS).open("w", encoding="utf-8", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(("path", "label", "target"))
        for number, file in enumerate(files):
            name = f"{number:06d}.dcm"
            _put(file.path, folder / name)
            if file.target:
                (folder / "targets").mkdir(exist_ok=True)
                _put(file.target, folder / "targets" / name)
            rows.writerow((name, classes[file.label], f"targets/{name}" if file.target else ""))


def _put(source: str, place: Path) -> None:
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, place, follow_symlinks=False)
