"""Public pre-training: a study's networks trained on public images, without privacy, to start the study from.

What is trained here is the study's own recipe with its own settings, by the hospitals' own trainer without clipping and
noise. It reads no patient, so it costs no privacy, whatever the number of steps: as long as none of the images is a
patient's of any hospital of the study.

Source: DPImageBench, Gong et al. 2025.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedmedgan.client import checkpoint
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.training.local_round import LocalTrainer, Losses, PatientSampler
from fedmedgan.client.training.randomness import InsecureRandom
from fedmedgan.shared.study import Study

STEPS = 1000
TOLD_EVERY = 50


def pretrain(
    study: Study,
    public: PatientImages,
    *,
    steps: int = STEPS,
    device: torch.device,
    tell: Callable[[int, Losses], None] = lambda done, losses: None,
) -> checkpoint.Arrays:
    """Weights of both networks after `steps` discriminator steps and the generator steps between them.

    The draws come from the study's `init_seed`: the images are public, so anybody may repeat it, on the same kind of
    machine bit for bit.

    Args:
        public: images that are public in fact, or drawn.
        tell: called with the steps done and the losses since it was called last.

    Raises:
        StudyError: CONFIG_RANGE, the recipe does not fit the study. DataError: DATA_LABEL, no targets where the study
            needs some. ModelError: MODEL_NOT_FINITE.
    """
    random = InsecureRandom(study.gan.init_seed)
    rate = min(1.0, study.training.patients_per_step / public.n_patients)
    trainer = LocalTrainer(
        study,
        *recipes.load(study).networks(),
        PatientSampler(public, rate, random),
        noise_multiplier=None,
        random=random,
        device=device,
    )
    for done in range(0, steps, TOLD_EVERY):
        some = min(TOLD_EVERY, steps - done)
        tell(done + some, trainer.train(some))
    trainer.close()
    return checkpoint.network_arrays(trainer.generator, trainer.discriminator)
