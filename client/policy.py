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
    """Ceiling for the same patients over ALL studies; the lowest of all homes that have patients in common rules."""
    budget_book: str
    """Folder of the hospital's budget book, the same for all its homes; a relative path starts at the home."""
    data_owner_key: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """Ed25519 public key of the data owner, who alone can allow a second ledger on the same patients."""
    min_cohort: Annotated[int, Field(ge=MIN_SITES)] = MIN_SITES
    """Smallest number of hospitals whose sum this hospital joins."""
    recipes: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Recipes that this hospital trains; ``["*"]``: all that are installed."""
    public_images: bool = False
    """Whether the images here are public, so that a study without privacy may be trained on them."""
    max_parameters: Annotated[int, Field(ge=1)] = 50_000_000
    """Largest model that this hospital trains: more weights can hold more of a patient."""
    require_encryption: Literal[True] = True
    """There is no plaintext mode; a policy may say so, and cannot say otherwise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read ``policy.toml``.

        Raises:
            StudyError: CONFIG_NOT_FOUND or CONFIG_TYPE.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(values | {k: tuple(v) for k, v in values.items() if isinstance(v, list)})
        except OSError:
            raise StudyError("CONFIG_NOT_FOUND", "the hospital has no policy", path.name) from None
        except (ValidationError, ValueError, RecursionError) as error:
            what = f"policy not valid: {str(error).splitlines()[0]}"
            raise StudyError("CONFIG_TYPE", what, path.name, hint="mend policy.toml in the hospital's home") from None

    def grant(self, study: Study) -> None:
        """The study asks, the hospital grants.

        Raises:
            PrivacyError: BUDGET_EXHAUSTED, more epsilon than the hospital ever gives.
            StudyError: STUDY_POLICY, a recipe or a number of hospitals that it does not allow; STUDY_ROSTER.
        """
        study.site(self.site)
        if study.privacy.epsilon > self.max_epsilon:
            what = f"the study asks for epsilon {study.privacy.epsilon:g}, this hospital allows {self.max_epsilon:g}"
            raise PrivacyError("BUDGET_EXHAUSTED", what, "policy.toml: max_epsilon")
        if not study.is_private and not self.public_images:
            what = "the study promises patients no privacy, and the images here are not said to be public"
            raise PrivacyError("PRIVACY_NONE", what, "policy.toml: public_images")
        if study.gan.recipe not in self.recipes and "*" not in self.recipes:
            raise StudyError("STUDY_POLICY", f"the recipe {study.gan.recipe} is not allowed", "policy.toml: recipes")
        if len(study.sites) < self.min_cohort:
            what = f"{len(study.sites)} hospitals, this one wants {self.min_cohort}"
            raise StudyError("STUDY_POLICY", what, "policy.toml: min_cohort")

    def grant_model(self, parameters: int) -> None:
        """Raises StudyError STUDY_POLICY where the networks are larger than the hospital allows."""
        if parameters > self.max_parameters:
            what = f"the networks have {parameters:,} parameters, this hospital allows {self.max_parameters:,}"
            raise StudyError("STUDY_POLICY", what, "policy.toml: max_parameters")
