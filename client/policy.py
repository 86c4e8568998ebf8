"""The hospital's own rules. They outrank the study: the study asks, the hospital grants.

`policy.toml` lies in the hospital's home folder and is written by the hospital, never by the coordinator.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmedgan.shared.errors import PrivacyError, StudyError
from fedmedgan.shared.study import MIN_SITES, SiteName, Study


class Policy(BaseModel):
    """What this hospital allows."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    site: SiteName
    """This hospital's name in the study's roster."""
    data: str
    """Folder with the DICOM files."""
    max_epsilon: Annotated[float, Field(gt=0, le=100)]
    """Ceiling for the same patients over ALL studies in this hospital's ledger."""
    min_cohort: Annotated[int, Field(ge=MIN_SITES)] = MIN_SITES
    """Smallest number of hospitals whose sum this hospital joins."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read ``policy.toml``.

        Raises:
            StudyError: CONFIG_NOT_FOUND or CONFIG_TYPE.
        """
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError:
            raise StudyError("CONFIG_NOT_FOUND", "the hospital has no policy", path.name) from None
        except (ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            what = f"policy not valid: {str(error).splitlines()[0]}"
            raise StudyError("CONFIG_TYPE", what, path.name, hint="mend policy.toml in the hospital's home") from None

    def grant(self, study: Study) -> None:
        """Raises PrivacyError BUDGET_EXHAUSTED where the study asks for more than the hospital ever gives."""
        if study.privacy.epsilon > self.max_epsilon:
            what = f"the study asks for epsilon {study.privacy.epsilon:g}, this hospital allows {self.max_epsilon:g}"
            raise PrivacyError("BUDGET_EXHAUSTED", what, "policy.toml: max_epsilon")
