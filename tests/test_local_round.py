"""Local training: sampling by patient, and turns of the generator."""

from __future__ import annotations

import numpy as np
import torch
from conftest import tiny_study

from fedmedgan.client import checkpoint
from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe
from fedmedgan.client.training.local_round import LocalTrainer, PatientSampler
from fedmedgan.client.training.randomness import InsecureRandom, SystemRandom


def patients(counts) -> PatientImages:
    """Patient p has counts[p] images, each of which shows p / 100 everywhere."""
    owner = np.repeat(np.arange(len(counts)), counts)
    images = np.broadcast_to(owner[:, None, None, None] / 100, (len(owner), 1, 28, 28)).astype(np.float16)
    shuffled = np.random.default_rng(0).permutation(len(owner))
    report = FolderReport((), len(owner), len(counts))
    return PatientImages(images[shuffled], owner[shuffled] % 2, owner[shuffled], len(counts), report, ())


def test_a_patient_is_in_a_batch_at_most_once_and_as_often_as_the_rate_says():
    data = patients([1, 9, 3, 1, 5, 2, 1, 1])
    sampler = PatientSampler(data, 0.3, InsecureRandom(3))
    seen, sizes = np.zeros(8), []
    for _ in range(3000):
        (images, labels, _), _ = sampler.draw()
        who = np.rint(images[:, 0, 0, 0].numpy() * 100).astype(int)
        assert len(set(who)) == len(who), "a patient with nine images is one row like any other"
        assert np.array_equal(labels.numpy(), who % 2)
        seen[who] += 1
        sizes.append(len(who))
    assert np.abs(seen / 3000 - 0.3).max() < 0.05
    assert abs(np.var(sizes) - 8 * 0.3 * 0.7) < 0.25, "Poisson sampling: the batch size varies"


def test_an_empty_batch_is_trained_on():
    sampler = PatientSampler(patients([1] * 10), 1e-9, SystemRandom())
    (images, labels, _), _ = sampler.draw()
    assert (images.shape, labels.shape) == ((0, 1, 28, 28), (0,))
    losses = trainer(sampler, noise_multiplier=1.0).train(2)
    assert np.isfinite([losses.generator, losses.discriminator_on_fakes]).all()


def trainer(sampler: PatientSampler, **options) -> LocalTrainer:
    study = tiny_study(3, training={"discriminator_steps": options.pop("discriminator_steps", 1)})
    networks = recipe.load(study).networks()
    return LocalTrainer(study, *networks, sampler, random=SystemRandom(), device=torch.device("cpu"), **options)


def test_a_generator_that_reads_no_patient_keeps_its_channels_last_and_is_saved_as_ever():
    """The layout is a matter of speed alone: what is flattened, sent and saved is in the order of the weight's axes."""
    one = trainer(PatientSampler(patients([1] * 10), 0.5, SystemRandom()), noise_multiplier=1.0)
    weights = {name: p for name, p in one.generator.named_parameters() if p.dim() == 4 and min(p.shape[:2]) > 1}
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights.values())
    arrays = checkpoint.network_arrays(one.generator, one.discriminator)
    for name, p in weights.items():
        np.testing.assert_array_equal(arrays[f"generator.{name}"].ravel(), p.detach().contiguous().flatten().numpy())
    study = tiny_study(3, gan={"recipe": "pix2pix", "private": "both", "task": "denoise"})
    sampler, random = PatientSampler(patients([1] * 10), 0.5, SystemRandom()), SystemRandom()
    options = {"noise_multiplier": 1.0, "random": random, "device": torch.device("cpu")}
    other = LocalTrainer(study, *recipe.load(study).networks(), sampler, **options)
    assert all(p.is_contiguous() for p in other.generator.parameters())


def test_turns_of_the_generator_are_counted_over_rounds():
    sampler = PatientSampler(patients([1] * 10), 0.5, SystemRandom())
    for done, moves in ((0, False), (3, True)):
        one = trainer(sampler, noise_multiplier=1.0, discriminator_steps=5, steps_done=done)
        before = [p.detach().clone() for p in one.generator.parameters()]
        one.train(2)
        moved = any(not torch.equal(a, b) for a, b in zip(before, one.generator.parameters(), strict=True))
        assert moved is moves


def test_the_number_of_fakes_never_follows_the_poisson_batch(monkeypatch):
    """Seen by the generator's input: always `patients_per_step` rows, whoever was sampled."""
    one = trainer(PatientSampler(patients([1] * 10), 0.5, SystemRandom()), noise_multiplier=1.0)
    rows = []
    forward = one.generator.forward
    monkeypatch.setattr(one.generator, "forward", lambda z, y: rows.append(len(z)) or forward(z, y))
    one.train(6)
    assert set(rows) == {2, one.study.training.patients_per_step}, "two rows in the probe before the first patient"
