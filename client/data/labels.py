"""The class of each image: from labels.csv, or from the name of the sub-folder it lies in. And its target.

| classes of the study | labels.csv | label of an image |
|---|---|---|
| one | any | that class |
| several | there | the row of its path; none where no row names it or the label is not a class of the study |
| several | not there | its first-level sub-folder, where that is a class; otherwise none |

In a study of pairs, labels.csv also names each image's target, in the column `target`, relative to the folder.
A file that is a target is no image: naming it in both columns is an error.

A damaged labels.csv is an error for the whole folder: a guess would train on wrong labels. Messages name
lines, never cells, since paths in hospitals hold names.
"""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from fedmedgan.client.data.folder import LABELS
from fedmedgan.shared.errors import DataError

MAX_BYTES = 256 << 20


def read(folder: Path) -> bytes | None:
    """labels.csv of a folder, as it is; None where there is none.

    Raises:
        DataError: DATA_LABEL, it is not a regular file, or cannot be read.
    """
    path = folder / LABELS
    try:
        if not os.path.lexists(path):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _bad("is not a regular file")
            if status.st_size > MAX_BYTES:
                raise _bad(f"is larger than {MAX_BYTES >> 20} MiB")
            return file.read(status.st_size)
    except OSError as error:
        raise _bad(f"cannot be read ({error.strerror})") from None


def parse(content: bytes | None) -> dict[str, str] | None:
    """labels.csv as relative path -> label; None where there is no such file.

    Raises:
        DataError: DATA_LABEL, it is not a UTF-8 table with the columns path and label, or names a path twice.
    """
    if content is None:
        return None
    found: dict[str, str] = {}
    for line, name, label in _rows(content, "label"):
        if not name or not label:
            raise _bad(f"has an empty cell in line {line}")
        if name in found:
            raise _bad(f"names a path for the second time in line {line}")
        found[name] = label
    return found


def parse_targets(content: bytes | None) -> dict[str, str]:
    """labels.csv as relative path of an image -> relative path of its target; images without one are left out.

    Raises:
        DataError: DATA_TARGET, there is no labels.csv, it has no column `target`, or a file is both image and target;
            DATA_LABEL, it is not a table.
    """
    if content is None:
        raise DataError("DATA_TARGET", f"there is no {LABELS}, which names the targets", LABELS)
    rows = [(line, name, _name(cell)) for line, name, cell in _rows(content, "target")]
    images = {name for _, name, _ in rows}
    for line, _, target in rows:
        if target in images:
            raise DataError("DATA_TARGET", f"{LABELS} names a file as image and as target in line {line}", LABELS)
    return {name: target for _, name, target in rows if target}


def _rows(content: bytes, column: str) -> Iterator[tuple[int, str, str]]:
    """Line, path and one further cell of every row that is not empty. Raises DataError like `parse`."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _bad("is not UTF-8") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
        if header.count("path") != 1 or header.count("label") != 1:
            raise _bad("does not start with the line path,label")
        if header.count(column) != 1:
            raise DataError("DATA_TARGET", f"{LABELS} does not have one column {column}", LABELS)
        path_at, cell_at = header.index("path"), header.index(column)
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise _bad(f"has another number of cells in line {rows.line_num}")
            yield rows.line_num, _name(row[path_at]), row[cell_at].strip()
    except csv.Error:
        raise _bad(f"is not valid CSV in line {rows.line_num}") from None


def _name(cell: str) -> str:
    """A path as `folder.scan` names it; "" for an empty cell."""
    path = cell.strip().replace("\\", "/")
    return str(PurePosixPath(path)) if path else ""


def label_of(name: str, labels: dict[str, str] | None, classes: Sequence[str]) -> tuple[int | None, str]:
    """Place of an image's class in `classes`, or None and a reason.

    Args:
        name: path relative to the folder.
        labels: what `parse` gave.
    """
    if len(classes) == 1:
        return 0, ""
    if labels is not None:
        label, reason = labels.get(name), f"{LABELS} does not name it"
        if label is not None:
            reason = f"its label in {LABELS} is not a class of the study"
    else:
        parts = PurePosixPath(name).parts
        label = parts[0] if len(parts) > 1 else None
        reason = f"there is no {LABELS}, and its sub-folder is not a class of the study"
    return (classes.index(label), "") if label in classes else (None, reason)


def _bad(what: str) -> DataError:
    return DataError("DATA_LABEL", f"{LABELS} {what}", LABELS, hint="mend it: UTF-8, the columns path,label")
