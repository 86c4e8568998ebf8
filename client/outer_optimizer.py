"""What a hospital does with the decrypted mean of the updates: the outer optimiser of federated learning.

The mean is public among the hospitals and carries the noise of all of them, so this is post-processing: it costs no
privacy. Every hospital does it by itself and must get the same model bit for bit, since model hashes are compared
after each round. So there is no randomness, and every value is a float32 that is added, multiplied, divided or rooted
element by element: IEEE 754 fixes the result of each of these, on every machine.

    fedavg    change = learning_rate * mean
    fedavgm   m = momentum * m + mean
              change = learning_rate * m
    fedadam   m = momentum * m + (1 - momentum) * mean
              v = beta2 * v + (1 - beta2) * mean^2
              change = learning_rate * m / (sqrt(v) + adaptivity)

m starts at 0 and v at adaptivity^2; no bias is corrected, as in the paper.

Source: McMahan et al. 2017 (fedavg); Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data
Distribution", section 4.3 (fedavgm); Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2 (fedadam).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedmedgan.shared.errors import ModelError
from fedmedgan.shared.study import Aggregation

MOMENTUM = "outer.momentum"
SECOND_MOMENT = "outer.second_moment"
_STATE = {"fedavg": (), "fedavgm": (MOMENTUM,), "fedadam": (MOMENTUM, SECOND_MOMENT)}

Arrays = dict[str, np.ndarray]


class OuterOptimizer:
    """Turns the mean update of each round into what is added to the model.

    Args:
        aggregation: the study's settings.
        size: P, number of values of the model that are shared.
    """

    def __init__(self, aggregation: Aggregation, size: int) -> None:
        self._settings = aggregation
        self._size = size
        self._state: Arrays = {name: np.zeros(size, np.float32) for name in _STATE[aggregation.optimizer]}
        if SECOND_MOMENT in self._state:
            self._state[SECOND_MOMENT] += np.float32(aggregation.adaptivity**2)

    def state(self) -> Arrays:
        """Copies of what is kept from round to round, float32 (P,) each; nothing for fedavg."""
        return {name: array.copy() for name, array in self._state.items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave.

        Raises:
            ModelError: MODEL_MISMATCH, other names, shapes or types, or a negative second moment; MODEL_NOT_FINITE.
            The state is then what it was.
        """
        expected = {name: ((self._size,), np.dtype(np.float32)) for name in self._state}
        if {name: (a.shape, a.dtype) for name, a in arrays.items()} != expected:
            raise ModelError("MODEL_MISMATCH", "names, shapes or types of the states differ", "outer optimizer")
        _refuse_not_finite(arrays)
        if SECOND_MOMENT in arrays and (arrays[SECOND_MOMENT] < 0).any():
            raise ModelError("MODEL_MISMATCH", "a second moment is negative", "outer optimizer")
        self._state = {name: array.copy() for name, array in arrays.items()}

    def step(self, mean_P: np.ndarray) -> np.ndarray:
        """What to add to the model for this round's mean.

        Args:
            mean_P: weighted mean of the updates, float32 (P,).

        Returns:
            float32 (P,); for fedavg with learning rate 1 exactly `mean_P`.

        Raises:
            ModelError: MODEL_MISMATCH, another shape or type; MODEL_NOT_FINITE. The state is then what it was.
        """
        if mean_P.shape != (self._size,) or mean_P.dtype != np.float32:
            raise ModelError("MODEL_MISMATCH", "the mean update has another shape or type", "outer optimizer")
        with np.errstate(all="ignore"):  # what overflows is refused below
            state = self._next_state(mean_P)
            change_P = self._change(state, mean_P)
        _refuse_not_finite({**state, "change": change_P})
        self._state = state
        return change_P

    def _next_state(self, mean_P: np.ndarray) -> Arrays:
        kind, old = self._settings.optimizer, self._state
        if kind == "fedavg":
            return {}
        # Complements are taken in float64 and then rounded, so that they keep all digits of a float32.
        decay = np.float32(self._settings.momentum)
        if kind == "fedavgm":
            return {MOMENTUM: decay * old[MOMENTUM] + mean_P}
        rest, beta2 = np.float32(1 - self._settings.momentum), np.float32(self._settings.beta2)
        return {
            MOMENTUM: decay * old[MOMENTUM] + rest * mean_P,
            SECOND_MOMENT: beta2 * old[SECOND_MOMENT] + np.float32(1 - self._settings.beta2) * np.square(mean_P),
        }

    def _change(self, state: Arrays, mean_P: np.ndarray) -> np.ndarray:
        rate = np.float32(self._settings.learning_rate)
        direction_P = state.get(MOMENTUM, mean_P)
        if SECOND_MOMENT in state:
            direction_P = direction_P / (np.sqrt(state[SECOND_MOMENT]) + np.float32(self._settings.adaptivity))
        return np.asarray(rate * direction_P)


def _refuse_not_finite(arrays: Mapping[str, np.ndarray]) -> None:
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ModelError("MODEL_NOT_FINITE", "the state or the step holds NaN or infinity", "outer optimizer")
