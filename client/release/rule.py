"""Which measured numbers may leave a hospital: the rule, and a result that keeps to it.

A number computed from real patients without noise tells of them, and no epsilon covers it: not a distance to real
images, not the accuracy of a classifier on them, not how many of them there were, and not that there were too few.

=================  =========================  ===========================================  ===================
measurement        what it read               under which rule                             may leave
=================  =========================  ===========================================  ===================
free               synthetic images only      any: post-processing of a private generator  yes
public             real images of nobody      public                                       yes
sensitive          real patients              local                                        no
=================  =========================  ===========================================  ===================

What a measurement is follows from the inputs that it was handed (`evaluate`); nobody declares it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedmedgan.client.release.images import NotMeasurable
from fedmedgan.shared.errors import PrivacyError

Privacy = Literal["free", "public", "sensitive"]
Value = str | float

MUST_STAY = (
    "Computed from real patients without noise: no epsilon covers these numbers. They must not leave this hospital, "
    "and nothing that leaves it may be chosen by them: no checkpoint, no setting, no image."
)
FREE = "Computed from synthetic images alone: free of privacy cost."
OF_PUBLIC = "The real images are public or drawn: "


class Rule(enum.StrEnum):
    """What evaluation may read, and where its numbers may go."""

    PUBLIC = "public"
    """A simulation: the real images are public or drawn, and it is said which. All numbers may leave."""
    LOCAL = "local"
    """A hospital: real patients are read, and what was computed from them stays."""
    RELEASE = "release"
    """What goes into a release: real images are refused."""

    @classmethod
    def of(cls, value: object) -> Rule:
        """The rule of that name.

        Raises:
            PrivacyError: PRIVACY_RELEASE, there is none: nothing is measured without a rule.
        """
        if value in list(cls):
            return cls(str(value))
        raise PrivacyError("PRIVACY_RELEASE", "nothing is evaluated without a rule: public, local or release")


@dataclass(frozen=True)
class Measurement:
    """One measure with its numbers and how they were made. Its `repr`, which ends up in logs, shows no number."""

    name: str
    privacy: Privacy
    values: Mapping[str, float] = field(repr=False)
    settings: Mapping[str, Value] = field(repr=False)
    """Numbers of images, the extractor's hash and what it was trained on, k, seeds: what makes numbers comparable."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in self.values.values()):
            raise NotMeasurable(f"{self.name} came out as no finite number")


@dataclass(frozen=True)
class NotMeasured:
    """A measure that could not be taken. The reason may tell numbers of patients, so it is as private as a number."""

    name: str
    privacy: Privacy
    reason: str = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """All measurements of one call of `evaluate`, under one rule.

    ==========================================  ====================================================
    case                                        result
    ==========================================  ====================================================
    a sensitive part under a rule but "local"   cannot be made: PRIVACY_RELEASE
    `may_leave()` of "local"                    an Evaluation of its own, which holds the free parts
    `may_leave()` of "public"                   the same one
    `record()` of "local" put into a release    `refuse_in_release` raises
    ==========================================  ====================================================
    """

    rule: Rule
    measurements: tuple[Measurement, ...]
    not_measured: tuple[NotMeasured, ...] = ()
    real_data: str = ""
    """Under the public rule: which real images, in words."""

    def __post_init__(self) -> None:
        if self.rule is not Rule.LOCAL and self._is_sensitive():
            raise PrivacyError("PRIVACY_RELEASE", f"numbers computed from patients under the rule {self.rule.value!r}")

    def _is_sensitive(self) -> bool:
        parts: tuple[Measurement | NotMeasured, ...] = (*self.measurements, *self.not_measured)
        return any(part.privacy == "sensitive" for part in parts)

    def __contains__(self, name: object) -> bool:
        return any(m.name == name for m in self.measurements)

    def __getitem__(self, name: str) -> Measurement:
        """The measurement of that name; KeyError if it was not taken."""
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        raise KeyError(name)

    def numbers(self) -> dict[str, float]:
        """Every number by its own name, such as ``fid`` or ``tstr_accuracy``."""
        return {name: value for m in self.measurements for name, value in m.values.items()}

    def may_leave(self) -> Evaluation:
        """What may be sent or released: an evaluation without any sensitive part, nor a word that there was one."""
        if self.rule is not Rule.LOCAL:
            return self
        return Evaluation(
            Rule.RELEASE,
            tuple(m for m in self.measurements if m.privacy != "sensitive"),
            tuple(n for n in self.not_measured if n.privacy != "sensitive"),
        )

    @property
    def statement(self) -> str:
        """The sentence that is shown with the numbers."""
        if self._is_sensitive():
            return MUST_STAY
        return OF_PUBLIC + self.real_data if self.real_data else FREE

    def record(self) -> dict[str, Any]:
        """Everything as JSON values, with the statement; what must stay is marked ``must_stay``."""
        return {
            "rule": self.rule.value,
            "must_stay": self._is_sensitive(),
            "statement": self.statement,
            "measurements": [
                {"name": m.name, "privacy": m.privacy, "values": dict(m.values), "settings": dict(m.settings)}
                for m in self.measurements
            ],
            "not_measured": [{"name": n.name, "privacy": n.privacy, "reason": n.reason} for n in self.not_measured],
        }

    def text(self) -> str:
        """For people: the rule and its statement, then `lines`."""
        return "\n".join([f"rule: {self.rule.value}", self.statement, "", *self.lines()])

    def lines(self) -> list[str]:
        """For people: a line for each number, for each measure that was not taken, and for each extractor."""
        lines: list[str] = []
        for m in self.measurements:
            lines += [f"{name:<24} {value:>12.5g}  {m.privacy}" for name, value in m.values.items()]
        lines += [f"{n.name:<24} not measured: {n.reason}" for n in self.not_measured]
        described = {m.settings["extractor_sha256"]: m.settings for m in self.measurements if _has_extractor(m)}
        lines += [
            f"features: extractor {sha256}, trained on {settings['extractor_trained_on']}, which it tells apart with "
            f"accuracy {settings['extractor_accuracy']:.3g}"
            for sha256, settings in described.items()
        ]
        return lines


def refuse_in_release(record: object) -> None:
    """Raises PrivacyError PRIVACY_RELEASE if JSON values hold, at any depth, an evaluation that must stay.

    For whoever writes a release: each JSON file of it passes through here.
    """
    if isinstance(record, Mapping):
        if record.get("must_stay") or record.get("privacy") == "sensitive":
            raise PrivacyError("PRIVACY_RELEASE", "numbers computed from patients are to be put into a release")
        parts: list[object] = list(record.values())
    else:
        parts = list(record) if isinstance(record, list | tuple) else []
    for part in parts:
        refuse_in_release(part)


def _has_extractor(measurement: Measurement) -> bool:
    return "extractor_sha256" in measurement.settings
