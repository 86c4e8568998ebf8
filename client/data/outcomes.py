"""What became of the files of a folder: the report that a person reads before a study starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Outcome = Literal["decoded", "skipped", "refused"]
Role = Literal["image", "target"]


@dataclass(frozen=True)
class FileOutcome:
    """One file. Holds no value of its header."""

    path: str
    """Relative to the folder; bytes that are not UTF-8 are written as escapes."""
    outcome: Outcome
    """What the file IS: decoded (its pixels can be read), skipped (DICOM without an image), refused."""
    code: str
    """Why it is not used, "" where it is."""
    shape: tuple[int, ...]
    """Of the native pixels: (rows, columns), with frames before and samples behind; () where not decoded."""
    pixel_sha256: str
    """Of the native pixels, C order, little endian; "" where not decoded."""
    used: bool
    """Do the rules in force take it?"""
    reason: str
    """One clause for a person, "" where it is used."""
    role: Role = "image"
    """What labels.csv says it is. A target is used where an image that names it is."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FileOutcome:
        """Raises KeyError or TypeError where `values` is not what `to_json` gave."""
        known = {f.name: values[f.name] for f in fields(cls)}
        return cls(**{**known, "shape": tuple(known["shape"])})


@dataclass(frozen=True)
class FolderReport:
    """All files of a folder, in the order of their paths."""

    files: tuple[FileOutcome, ...]
    images: int
    """Images that the rules take; a multi-frame file gives several."""
    patients: int
    """Patients with at least one such image."""

    @property
    def targets(self) -> int:
        """Number of files that are used as targets."""
        return sum(file.used and file.role == "target" for file in self.files)

    @property
    def left_out(self) -> dict[str, int]:
        """Number of files that are not used, by code, the most frequent first."""
        counts = Counter(file.code for file in self.files if not file.used)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def summary(self) -> dict[str, Any]:
        """Counts for the hospital's own event log."""
        return {"images": self.images, "patients": self.patients, "refused": self.left_out}

    def sentence(self) -> str:
        """``12 files: DICOM_MODALITY 9, DICOM_NOT_DICOM 3``."""
        reasons = ", ".join(f"{code} {count}" for code, count in self.left_out.items())
        return f"{len(self.files)} files" + (f": {reasons}" if reasons else "")

    def to_json(self) -> dict[str, Any]:
        files = [file.to_json() for file in self.files]
        return {"images": self.images, "patients": self.patients, "files": files}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FolderReport:
        """Raises KeyError or TypeError where `values` is not what `to_json` gave."""
        files = tuple(FileOutcome.from_json(v) for v in values["files"])
        return cls(files, int(values["images"]), int(values["patients"]))
