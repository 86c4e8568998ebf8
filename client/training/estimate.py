"""What a study's recipe is like, found on random images before any patient is read: size, speed, does it mix rows?"""

from __future__ import annotations

import time

import numpy as np
import torch

from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.training import mixing
from fedmedgan.client.training.local_round import LocalTrainer, PatientSampler
from fedmedgan.client.training.randomness import SystemRandom
from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.study import Study

PROBE_STEPS = 4
TRIED_STEPS = 3
_passed: set[tuple[str, type]] = set()
"""Studies and recipes that passed the trial in this process: hospitals that are simulated all sign the same study."""


def parameters(study: Study) -> int:
    """Values in one update: the weights that are shared."""
    generator, discriminator = recipes.load(study).networks()
    shared = (generator, discriminator) if study.aggregation.share == "both" else (generator,)
    return sum(p.numel() for network in shared for p in network.parameters())


def record(study: Study) -> str:
    """What one private record of the study's recipe is, in words."""
    return recipes.load(study).record


def refuse_mixing(study: Study) -> None:
    """Refuse a recipe in which one record's part of a step depends on other records.

    The types of its layers are looked at, and it is tried: random records, one of which is changed, may change nothing
    of the others. A study without privacy is only asked whether the recipe fits it.

    Raises:
        StudyError: CONFIG_RANGE, there is no such recipe, or it does not fit the study.
        PrivacyError: PRIVACY_MODEL.
    """
    tried = (study.hash, type(recipes.load(study)))
    if not study.is_private or tried in _passed:
        return
    trainer = _trainer(study)
    try:
        found = mixing.Trial(trainer).found()
        if not found:
            trainer.train(TRIED_STEPS)  # what a recipe remembers from step to step shows afterwards
            found = mixing.Trial(trainer, seed=2).found() or _failed(trainer)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        found = f"it cannot be tried: {type(error).__name__}"
    trainer.close()
    if found:
        hint = 'take another recipe or other layers, or set privacy = "none" for public images'
        what = f"patients would be mixed: {found}"
        raise PrivacyError("PRIVACY_MODEL", what, f"gan.recipe: {study.gan.recipe}", hint=hint)
    _passed.add(tried)


def _failed(trainer: LocalTrainer) -> str:
    """What the witness of these steps has found, too: it looks with numbers of its own."""
    failed = [name for name in ("rows", "clipping") if trainer.checks[name] == "failed"]
    return f"the test of {failed[0]} of a step failed" if failed else ""


def step_seconds(study: Study) -> float:
    """Seconds of one discriminator step with its share of generator steps, on the CPU, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = _trainer(study)
        trainer.train(1)
        began = time.perf_counter()
        trainer.train(PROBE_STEPS)
        return (time.perf_counter() - began) / PROBE_STEPS
    finally:
        torch.set_num_threads(threads)


def _trainer(study: Study) -> LocalTrainer:
    """A trainer on random patients, a quarter of whom is in each step."""
    random, n = SystemRandom(), 4 * study.training.patients_per_step
    size = study.images.size
    noise = np.random.default_rng(0).random((n, 1, size, size)).astype(np.float16)
    targets = noise if study.images.paired else None
    labels = np.arange(n) % len(study.images.classes)
    patients = PatientImages(noise, labels, np.arange(n), n, FolderReport((), n, n), (), targets_N1HW=targets)
    return LocalTrainer(
        study,
        *recipes.load(study).networks(),
        PatientSampler(patients, 0.25, random),
        noise_multiplier=1.0 if study.is_private else None,
        random=random,
        device=torch.device("cpu"),
    )
