"""What a hospital did to its patients' data, as events: the only input that an accountant needs.

Epsilon alone is never stored. The ledger keeps events, and epsilon is computed from them whenever somebody
asks, so a better accountant can be asked again years later (the idea of Google's dp-accounting,
`dp_event.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedmedgan.shared.errors import PrivacyError

UNIT = "patient"
ADJACENCY = "add-or-remove-one"
SAMPLING = "poisson"

MIN_NOISE, MAX_NOISE = 0.3, 1000.0
MAX_STEPS = 10_000_000
MIN_DELTA, MAX_DELTA = 1e-10, 0.1
"""Below 1e-10 the tails that both accountants cut off are no longer small beside delta."""


@dataclass(frozen=True)
class TrainingSteps:
    """A run of Poisson-subsampled Gaussian steps with constant parameters.

    In each step every patient takes part with probability q, independently; each patient's gradient is
    clipped to norm C; the clipped gradients are summed; Gaussian noise of standard deviation sigma * C is
    added to the sum.

    Args:
        noise_multiplier: sigma, the noise's standard deviation divided by C; dimensionless, 0.3 to 1000.
        sampling_rate: q, the chance of each patient to be in one step; above 0, at most 1.
        steps: how many such steps; 0 to 10 million.

    Raises:
        PrivacyError: PRIVACY_RANGE.

    ================================  ====================================================================
    case                              result
    ================================  ====================================================================
    NaN, infinity, text, None, True   PRIVACY_RANGE
    sigma below 0.3                   PRIVACY_RANGE: no useful protection, and accountants lose accuracy
    q = 0                             PRIVACY_RANGE: nobody ever takes part, so the plan is wrong
    steps = 0                         allowed, costs nothing (a round stopped before its first step)
    steps = -5                        PRIVACY_RANGE; Opacus' accountants would answer with epsilon -134
    sigma or q given as an integer    stored as a float
    ================================  ====================================================================
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        sigma = real(self.noise_multiplier, "noise_multiplier")
        rate = real(self.sampling_rate, "sampling_rate")
        if not MIN_NOISE <= sigma <= MAX_NOISE:
            raise _out_of_range("noise_multiplier", f"{sigma} is not between {MIN_NOISE} and {MAX_NOISE}")
        if not 0 < rate <= 1:
            raise _out_of_range("sampling_rate", f"{rate} is not above 0 and at most 1")
        if type(self.steps) is not int or not 0 <= self.steps <= MAX_STEPS:
            raise _out_of_range("steps", f"it must be a whole number between 0 and {MAX_STEPS}")
        object.__setattr__(self, "noise_multiplier", sigma)
        object.__setattr__(self, "sampling_rate", rate)

    def with_steps(self, steps: int) -> TrainingSteps:
        """The same kind of step, another number of times. Raises PRIVACY_RANGE."""
        return TrainingSteps(self.noise_multiplier, self.sampling_rate, steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values; `from_dict` reads them back exactly."""
        return {
            "noise_multiplier": self.noise_multiplier,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
        }

    @classmethod
    def from_dict(cls, values: Any) -> TrainingSteps:
        """Read what `to_dict` wrote. Unknown or missing keys and values out of range raise PRIVACY_RANGE."""
        if not isinstance(values, Mapping) or set(values) != {"noise_multiplier", "sampling_rate", "steps"}:
            raise _out_of_range("event", "an event has exactly noise_multiplier, sampling_rate and steps")
        return cls(**values)


def merge(events: Iterable[TrainingSteps]) -> list[TrainingSteps]:
    """Add up runs of the same (sigma, q), drop empty ones, and sort.

    Composition does not depend on the order, so equal histories become equal lists. Raises PRIVACY_RANGE when
    one (sigma, q) has more than 10 million steps in all.
    """
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sampling_rate)
        steps[key] = steps.get(key, 0) + event.steps
    return [TrainingSteps(*key, count) for key, count in sorted(steps.items()) if count]


def statement(epsilon: float, delta: float, replace_one: float) -> str:
    """The promise in one sentence: an epsilon is never shown without its unit, adjacency and sampling.

    Args:
        epsilon: of what was done, for adding or removing one patient.
        replace_one: of the same, for replacing one patient by another (`accounting.epsilon_replace_one`).
    """
    return (
        f"({epsilon:.3g}, {delta:.3g})-differential privacy at this hospital; unit: one patient with all "
        f"images and labels; adjacency: add or remove one patient (replace one patient: epsilon {replace_one:.3g}); "
        "sampling: Poisson, by patient. A patient known to several hospitals pays the sum."
    )


def check_delta(delta: Any) -> float:
    """Delta as a float between 1e-10 and 0.1 (exclusive). Raises PRIVACY_RANGE."""
    value = real(delta, "delta")
    if not MIN_DELTA <= value < MAX_DELTA:
        raise _out_of_range("delta", f"{value} is not between {MIN_DELTA} and {MAX_DELTA}")
    return value


def real(value: Any, name: str) -> float:
    """A finite number that is not a boolean, as a float. Raises PRIVACY_RANGE."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _out_of_range(name, "it must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _out_of_range(name, "it must be finite")
    return number


def _out_of_range(name: str, what: str) -> PrivacyError:
    return PrivacyError("PRIVACY_RANGE", what, name)
