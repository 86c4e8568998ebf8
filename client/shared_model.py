"""What every hospital holds alike after each round: the shared weights, and what goes on from them.

Three things are one unit, written in one file and changed together: the weights that are shared (both networks, or the
generator alone), the state of the outer optimiser, and the moving average of the generator, which is what is released.
All are made of sums of private updates, so none costs privacy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from fedmedgan.client import checkpoint
from fedmedgan.client.checkpoint import Arrays
from fedmedgan.client.outer_optimizer import OuterOptimizer
from fedmedgan.shared.errors import ModelError
from fedmedgan.shared.study import Study

GENERATOR, DISCRIMINATOR = "generator.", "discriminator."
AVERAGE, OUTER = "average.", "outer."


def part(arrays: Mapping[str, np.ndarray], *prefixes: str) -> Arrays:
    """Those arrays whose names begin so."""
    return {name: array for name, array in arrays.items() if name.startswith(prefixes)}


def shared_part(study: Study, weights: Mapping[str, np.ndarray]) -> Arrays:
    """Those weights of both networks that the study shares."""
    return part(weights, GENERATOR, *([DISCRIMINATOR] if study.aggregation.share == "both" else []))


@dataclass(frozen=True)
class SharedModel:
    """The state after one round."""

    study: Study
    weights: Arrays
    """``generator.*`` and, where both are shared, ``discriminator.*``."""
    outer: Arrays
    average: Arrays
    """``average.generator.*``; empty where the study takes no average, and before round 1."""

    @classmethod
    def initial(cls, study: Study, networks: tuple[nn.Module, nn.Module]) -> SharedModel:
        weights = shared_part(study, checkpoint.network_arrays(*networks))
        return cls(study, weights, _outer(study, weights).state(), {})

    @classmethod
    def of_file(cls, study: Study, arrays: Mapping[str, np.ndarray]) -> SharedModel:
        """What `arrays` was written from. Raises ModelError MODEL_MISMATCH, MODEL_NOT_FINITE."""
        weights, outer, average = part(arrays, GENERATOR, DISCRIMINATOR), part(arrays, OUTER), part(arrays, AVERAGE)
        names = {AVERAGE + name for name in part(weights, GENERATOR)} if study.gan.ema else set()
        if len(arrays) != len(weights) + len(outer) + len(average) or set(average) != names:
            raise ModelError("MODEL_MISMATCH", "the file holds other arrays than the study's", "model.safetensors")
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise ModelError("MODEL_NOT_FINITE", "the checkpoint holds NaN or infinity", "checkpoint")
        _outer(study, weights).load(outer)
        return cls(study, weights, outer, average)

    @property
    def hash(self) -> str:
        """SHA-256 of weights, outer optimiser and average: compared among hospitals after each round."""
        return checkpoint.content_hash(self.arrays())

    @property
    def size(self) -> int:
        """Number of values that are shared."""
        return sum(a.size for a in self.weights.values())

    def arrays(self) -> Arrays:
        """Everything, to be written in one file."""
        return {**self.weights, **self.outer, **self.average}

    def advanced(self, mean_P: np.ndarray, round: int) -> SharedModel:
        """The state after `round`, whose mean update is `mean_P`. Raises ModelError as the outer optimiser."""
        outer = _outer(self.study, self.weights)
        outer.load(self.outer)
        vector_P = checkpoint.flatten(self.weights) + outer.step(mean_P.astype(np.float32, copy=False))
        weights = checkpoint.unflatten(vector_P, like=self.weights)
        return SharedModel(self.study, weights, outer.state(), self._averaged(weights, round))

    def _averaged(self, weights: Arrays, round: int) -> Arrays:
        """Early rounds weigh more, so that the average forgets the initial weights in time."""
        if not self.study.gan.ema:
            return {}
        keep = np.float32(min(self.study.gan.ema, (round - 1) / (round + 9)))
        rest = np.float32(1) - keep
        return {
            AVERAGE + name: rest * new + keep * self.average.get(AVERAGE + name, new)
            for name, new in part(weights, GENERATOR).items()
        }

    def released_generator(self) -> Arrays:
        """``generator.*`` to make images with: the moving average, where there is one."""
        average = {name.removeprefix(AVERAGE): array for name, array in self.average.items()}
        return average or part(self.weights, GENERATOR)

    def load_into(self, networks: tuple[nn.Module, nn.Module]) -> None:
        """Put the shared weights into both networks; a discriminator that is not shared is left as it is.

        Raises:
            ModelError: MODEL_MISMATCH, MODEL_NOT_FINITE.
        """
        kept = (
            {} if self.study.aggregation.share == "both" else part(checkpoint.network_arrays(*networks), DISCRIMINATOR)
        )
        checkpoint.load_networks({**self.weights, **kept}, *networks)


def _outer(study: Study, weights: Arrays) -> OuterOptimizer:
    return OuterOptimizer(study.aggregation, sum(a.size for a in weights.values()))
