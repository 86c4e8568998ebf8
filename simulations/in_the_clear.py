"""Federated training in one process, in the clear: what comparison arms and benchmarks train, by the hospitals' code.

Nothing is encrypted, sent or written. With the same updates the model is the one that the cycle would reach, but for
the cycle's rounding of updates to the study's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from fedmedgan.client import checkpoint
from fedmedgan.client.shared_model import GENERATOR, SharedModel, shared_part
from fedmedgan.client.training.local_round import LocalTrainer
from fedmedgan.shared.study import Study


def train(
    study: Study,
    trainers: Sequence[LocalTrainer],
    weights: Sequence[int],
    start: tuple[nn.Module, nn.Module],
    after_round: Callable[[int, SharedModel], None] = lambda number, model: None,
) -> SharedModel:
    """All rounds of a study. Returns the model after the last one.

    Args:
        trainers: one for each hospital; with one of them, plain local training.
        weights: of the hospitals in the mean.
        start: both networks with the weights to start from; left as they are.
    """
    model = SharedModel.initial(study, start)
    for number in range(1, study.training.rounds + 1):
        updates = []
        for trainer in trainers:
            networks = (trainer.generator, trainer.discriminator)
            model.load_into(networks)
            trainer.train(study.training.local_steps)
            trained = shared_part(study, checkpoint.network_arrays(*networks))
            updates.append(checkpoint.flatten(trained) - checkpoint.flatten(model.weights))
        model = model.advanced(np.average(updates, axis=0, weights=weights).astype(np.float32), number)
        after_round(number, model)
    return model


def generator_of(model: SharedModel, like: nn.Module) -> nn.Module:
    """`like` with the weights that are released: the moving average, where the study takes one."""
    weights = model.released_generator()
    like.load_state_dict({n.removeprefix(GENERATOR): torch.from_numpy(a.copy()) for n, a in weights.items()})
    return like
