"""The images of a folder whatever their labels, and their labels as they stand there: for what is no training set.

`load_patients` takes a class of the study for a label and leaves out all other images. Here nothing is left out for
its label, and nobody is told apart by it:

| labels.csv | label of an image |
|---|---|
| there | the row of its path; none where no row names it |
| not there | its first-level sub-folder; none at the top of the folder |

A name of a sub-folder may be a patient's. So labels are compared with names that a study or a person has given, and are
never printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from fedmedgan.client.data import labels as label_table
from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import load_files
from fedmedgan.shared.study import Images

ONE_CLASS = "image"


@dataclass(frozen=True)
class AnyImages:
    """Images in memory, at least one, in the order of the paths."""

    images_N1HW: np.ndarray
    """float16 (N, 1, S, S) in [-1, 1]."""
    labels_N: tuple[str, ...] = field(repr=False)
    """Label of each image as it stands in the folder, "" where none does."""
    paths_N: tuple[str, ...] = field(repr=False)
    """File of each image, relative to the folder; several images of a file with several frames."""
    report: FolderReport


def load_any(folder: Path, size: int, modalities: Sequence[str]) -> AnyImages:
    """Decode every image of a folder that can be used, labelled or not.

    Args:
        folder: of DICOM files, with sub-folders.
        size: S, side of the images in pixels, one that a study can have.
        modalities: Modality values that are taken.

    Raises:
        DataError: DATA_PATH; DATA_EMPTY, no usable image; DATA_LABEL, labels.csv is damaged.
        RunError: RUN_EXTRA, the DICOM libraries are missing.
    """
    rules = Images.model_validate({"size": size, "classes": (ONE_CLASS,), "modalities": tuple(modalities)})
    found, files = load_files(folder, rules)
    table = label_table.parse(label_table.read(folder))
    names = [file.path for file in found.report.files if file.used]
    of_image = [name for name, file in zip(names, files, strict=True) for _ in range(file.images)]
    labels = tuple(_label(name, table) for name in of_image)
    return AnyImages(found.images_N1HW, labels, tuple(of_image), found.report)


def _label(name: str, table: dict[str, str] | None) -> str:
    if table is not None:
        return table.get(name, "")
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else ""
