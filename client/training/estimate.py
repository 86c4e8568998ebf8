"""How large and how slow a study's networks are, measured on random images, before any patient is read."""

from __future__ import annotations

import time

import numpy as np
import torch

from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import cdcgan
from fedmedgan.client.training.local_round import LocalTrainer, PatientSampler
from fedmedgan.client.training.randomness import SystemRandom
from fedmedgan.shared.study import Study

PROBE_STEPS = 4


def parameters(study: Study) -> int:
    """Values in one update: the weights of both networks."""
    return sum(p.numel() for network in cdcgan.build(study.images, study.gan) for p in network.parameters())


def step_seconds(study: Study) -> float:
    """Seconds of one private step with its share of generator steps, on the CPU, one thread."""
    random, n = SystemRandom(), 4 * study.training.patients_per_step
    noise = np.random.default_rng(0).random((n, 1, study.images.size, study.images.size)).astype(np.float16)
    patients = PatientImages(noise, np.zeros(n, np.int64), np.arange(n), n, FolderReport((), n, n), ())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = LocalTrainer(
            study,
            *cdcgan.build(study.images, study.gan),
            PatientSampler(patients, 0.25, random),
            noise_multiplier=1.0,
            random=random,
            device=torch.device("cpu"),
        )
        trainer.train(1)
        began = time.perf_counter()
        trainer.train(PROBE_STEPS)
        return (time.perf_counter() - began) / PROBE_STEPS
    finally:
        torch.set_num_threads(threads)
