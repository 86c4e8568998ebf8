"""What one hospital trains in one round: a fixed number of private steps, and generator steps between them.

The privacy argument, in the order of the code:

1. Patients are sampled by Poisson sampling with the study's rate q, from the operating system's randomness. Of each
   sampled patient one image is drawn. So one patient is at most one row of a step: the unit is the patient.
2. The number of fakes is a public constant, never the size of the Poisson batch. Reals and fakes are separate rows.
3. `PrivateStep` clips, sums and noises; the divisor is a public constant.
4. Generator steps read only the noised discriminator and generated images: post-processing, free.
5. The loss on real images is computed by the way and thrown away. What is returned is made of generated images.

A `Witness` watches 1 to 3 from the tensors, apart from the code that does them: `LocalTrainer.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import cdcgan
from fedmedgan.client.training.private_step import PrivateStep
from fedmedgan.client.training.randomness import RandomSource, SystemRandom
from fedmedgan.client.training.witness import PROBE_ROWS, NoWitness, Witness
from fedmedgan.shared.errors import ModelError
from fedmedgan.shared.study import Study


@dataclass(frozen=True)
class Losses:
    """Means over one round, on generated images only, so free of privacy cost."""

    generator: float
    discriminator_on_fakes: float


class Batch(NamedTuple):
    """One Poisson batch; its size is private too."""

    images_B1SS: Tensor
    labels_B: Tensor
    patients_B: Tensor


class PatientSampler:
    """Draws Poisson batches of patients, one image of each.

    case                    result
    nobody is drawn         arrays of length 0
    a patient has 9 images  each is drawn with chance 1/9, given that the patient is
    q = 1                   every patient, every step
    """

    def __init__(self, patients: PatientImages, sampling_rate: float, random: RandomSource) -> None:
        order = np.argsort(patients.patient_N, kind="stable")
        self.images = torch.from_numpy(patients.images_N1HW[order])
        self.labels = torch.from_numpy(patients.labels_N[order])
        self.count = torch.from_numpy(np.bincount(patients.patient_N, minlength=patients.n_patients))
        self.first = torch.cumsum(self.count, 0) - self.count
        self.sampling_rate, self.random = sampling_rate, random

    def draw(self) -> Batch:
        """Images (B, 1, S, S) float32 in [-1, 1], labels (B,) and patients (B,) of a new batch; B is private."""
        drawn = self.random.bernoulli(len(self.count), self.sampling_rate).nonzero().squeeze(1)
        which = (self.random.uniform(len(drawn)) * self.count[drawn]).long()
        rows = self.first[drawn] + which
        return Batch(self.images[rows].float(), self.labels[rows], drawn)


class LocalTrainer:
    """Trains one hospital's copy of both networks; keeps their Adam states from round to round.

    Args:
        noise_multiplier: sigma; None trains WITHOUT privacy, for a simulation's comparison arms alone.
        steps_done: discriminator steps of earlier rounds: turns of the generator are counted over rounds.
        witness: that of the round before, which remembers its noise; None begins a new one.
    """

    def __init__(
        self,
        study: Study,
        generator: nn.Module,
        discriminator: nn.Module,
        sampler: PatientSampler,
        *,
        noise_multiplier: float | None,
        random: RandomSource,
        device: torch.device,
        steps_done: int = 0,
        witness: NoWitness | None = None,
    ) -> None:
        t, self.steps_done = study.training, steps_done
        self.study, self.sampler, self.device = study, sampler, device
        self.generator, self.discriminator = generator.to(device), discriminator.to(device)
        self.adam_g = torch.optim.Adam(generator.parameters(), t.generator_lr, (t.beta1, t.beta2))
        self.adam_d = torch.optim.Adam(discriminator.parameters(), t.discriminator_lr, (t.beta1, t.beta2))
        self.fakes = torch.Generator()  # latents and labels of fakes are public: any stream will do
        self.fakes.manual_seed(int(random.uniform(1) * 2**31))
        self.witness, self.step = NoWitness(), None
        if noise_multiplier is not None:
            self.witness = witness or Witness(
                noise_multiplier=noise_multiplier,
                clip_norm=study.privacy.clip_norm,
                sampling_rate=sampler.sampling_rate,
                fakes=t.patients_per_step,
                patients=len(sampler.count),
            )
            self.step = PrivateStep(
                discriminator,
                self.adam_d,
                noise_multiplier=noise_multiplier,
                clip_norm=study.privacy.clip_norm,
                divisor=2 * t.patients_per_step,
                random=random,
                witness=self.witness,
            )

    @property
    def checks(self) -> dict[str, str]:
        """What the witness says of noise, clipping, rows and sampling, after `train`. The caller judges."""
        return self.witness.verdicts()

    def train(self, steps: int) -> Losses:
        """`steps` discriminator steps, and a generator step after every `discriminator_steps` of them.

        Raises:
            ModelError: MODEL_NOT_FINITE, a weight became NaN or infinite.
        """
        generator_losses, fake_losses = [], []
        self._probe()
        for _ in range(steps):
            fake_losses.append(self._discriminator_step())
            self.steps_done += 1
            if self.steps_done % self.study.training.discriminator_steps == 0:
                generator_losses.append(self._generator_step())
        weights = [*self.generator.parameters(), *self.discriminator.parameters()]
        if not all(w.isfinite().all() for w in weights):
            raise ModelError("MODEL_NOT_FINITE", "a weight is NaN or infinite after local training")
        if not generator_losses:
            generator_losses = [self._generator_loss_now()]
        return Losses(float(np.mean(generator_losses)), float(np.mean(fake_losses)))

    def close(self) -> None:
        """Leave the networks as plain modules."""
        if self.step is not None:
            self.step.close()

    def _fake_inputs(self) -> tuple[Tensor, Tensor]:
        n, s = self.study.training.patients_per_step, self.study
        latent = torch.randn(n, s.gan.latent, generator=self.fakes)
        labels = torch.randint(len(s.images.classes), (n,), generator=self.fakes)
        return latent.to(self.device), labels.to(self.device)

    def _probe(self) -> None:
        """Before the first patient of a round. Random rows, the last of them white, from randomness of their own."""
        if self.step is None or not self.witness.watches:
            return
        n, size = PROBE_ROWS + 1, self.study.images.size
        images = SystemRandom().uniform(n * size * size).float().reshape(n, 1, size, size) * 2 - 1
        images[-1] = 1
        labels, is_real = torch.arange(n) % len(self.study.images.classes), (torch.arange(n) % 2).float()
        self.step.probe(_row_losses, [x.to(self.device) for x in (images, labels, is_real)])

    def _discriminator_step(self) -> float:
        real_images, real_labels, patients = self.sampler.draw()
        self.witness.saw_draw(patients)
        latent, fake_labels = self._fake_inputs()
        with torch.no_grad():
            fake_images = self.generator(latent, fake_labels)
        images = torch.cat([real_images.to(self.device), fake_images])
        labels = torch.cat([real_labels.to(self.device), fake_labels])
        n_real = len(real_images)
        is_real = (torch.arange(len(images), device=self.device) < n_real).float()

        if self.step is not None:
            losses = self.step.step(_row_losses, [images, labels, is_real])
        else:
            losses = _row_losses(self.discriminator, images, labels, is_real)
            self.adam_d.zero_grad(set_to_none=True)
            (losses.sum() / (2 * self.study.training.patients_per_step)).backward()
            self.adam_d.step()
        return float(losses[n_real:].detach().mean())

    def _generator_step(self) -> float:
        if self.step is not None:
            with self.step.frozen() as discriminator:
                return self._update_generator(discriminator)
        self.discriminator.requires_grad_(False)
        loss = self._update_generator(self.discriminator)
        self.discriminator.requires_grad_(True)
        return loss

    def _update_generator(self, discriminator: nn.Module) -> float:
        latent, labels = self._fake_inputs()
        self.adam_g.zero_grad(set_to_none=True)
        loss = cdcgan.generator_loss(discriminator(self.generator(latent, labels), labels))
        loss.backward()
        self.adam_g.step()
        return float(loss.detach())

    @torch.no_grad()
    def _generator_loss_now(self) -> float:
        latent, labels = self._fake_inputs()
        images = self.generator(latent, labels)
        if self.step is not None:
            with self.step.frozen() as discriminator:
                return float(cdcgan.generator_loss(discriminator(images, labels)))
        return float(cdcgan.generator_loss(self.discriminator(images, labels)))


def _row_losses(network: nn.Module, images: Tensor, labels: Tensor, is_real: Tensor) -> Tensor:
    return cdcgan.discriminator_losses(network(images, labels), is_real)
