"""Results of attacks, kept in a hospital's home for its next report: ``attacks/one-run-0001.json``.

Attacks on a generator are computed on patients' images without noise. Their results stay in the home until the hospital
itself puts them into a bundle; epsilon does not cover them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmedgan.shared.errors import RunError

FOLDER = "attacks"
ATTACKS = ("one-run", "many-run", "generator")
MAX_BYTES = 1 << 20


class Shown(BaseModel):
    """One finding of an attack (audit/bounds.py), as it is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    quantity: str
    estimate: float | None
    lower_bound: float
    confidence: float
    ceiling: float
    allowed: float
    numbers: Mapping[str, int | float]
    seconds: float
    verdict: Literal["passed", "failed", "too-few"]
    explanation: str


class Result(BaseModel):
    """What one attack found, and when."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    attack: Literal["one-run", "many-run", "generator"]
    study: str
    """Hash of the study whose settings or generator was attacked; empty for none."""
    time: str
    findings: tuple[Shown, ...]

    @property
    def verdict(self) -> str:
        """The worst of its findings; too few if there are none."""
        verdicts = {finding.verdict for finding in self.findings}
        return "failed" if "failed" in verdicts else "passed" if verdicts == {"passed"} else "too-few"

    def as_dict(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "verdict": self.verdict}


def keep(home: Path, result: Result) -> Path:
    """Write a result into a home, beside the earlier ones.

    Raises:
        RunError: RUN_PATH, it cannot be written.
    """
    folder = home / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        number = 1 + len(list(folder.glob(f"{result.attack}-*.json")))
        path = folder / f"{result.attack}-{number:04d}.json"
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(result.model_dump(mode="json"), indent=1) + "\n")
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", FOLDER) from None
    return path


def kept(home: Path) -> list[Result]:
    """Every result in a home, oldest first.

    Raises:
        RunError: RUN_STATE, a file is not one that `keep` wrote.
    """
    found = []
    for path in sorted((home / FOLDER).glob("*.json")):
        try:
            raw = path.read_bytes()[: MAX_BYTES + 1]
            found.append(Result.model_validate_json(raw))
        except (OSError, ValidationError, ValueError):
            raise RunError("RUN_STATE", "not the result of an attack", f"{FOLDER}/{path.name}") from None
    return sorted(found, key=lambda result: result.time)
