"""What one hospital trains in one round, for every recipe: private steps on the networks that see patients.

The privacy argument, in the order of the code:

1. Patients are sampled by Poisson sampling with the study's rate q, from the operating system's randomness, anew for
   each step of each private network: one batch shared by two networks would have to be charged as one step with less
   noise. Of each sampled patient one image is drawn. So a patient is at most one record of a step, and is the unit.
2. Rows that are no record of a patient (fakes) are made in a public number, never as many as patients were drawn.
3. `PrivateStep` clips all that depends on one record together, sums and noises; the divisor is a public constant.
4. Where only the discriminator sees patients, generator steps read the noised discriminator and generated images:
   post-processing, free. Where the generator sees them too, its steps are private steps like the others, and charged.
5. Losses on patients are computed by the way and thrown away. What is returned is made of no patient.

A `Witness` watches 1 to 3 from the tensors, apart from the code that does them: `LocalTrainer.checks`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.gans.recipe import Fakes, Records
from fedmedgan.client.training import stabilisers
from fedmedgan.client.training.private_step import Method, PrivateStep, refuse_hidden_state, refuse_unsafe
from fedmedgan.client.training.randomness import InsecureRandom, RandomSource, SystemRandom
from fedmedgan.client.training.row_gradients import RowLosses
from fedmedgan.client.training.witness import PROBE_ROWS, NoWitness, Witness
from fedmedgan.shared.errors import DataError, ModelError
from fedmedgan.shared.privacy.records import worst_checks
from fedmedgan.shared.study import Study


@dataclass(frozen=True)
class Losses:
    """Means over one round, made of no patient, so free of privacy cost."""

    generator: float
    discriminator_on_fakes: float
    """0 where fakes are made of patients: then nothing may be told."""


class Batch(NamedTuple):
    """One Poisson batch; its size is private too."""

    records: Records
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
        targets = patients.targets_N1HW
        self.targets = self.images if targets is None else torch.from_numpy(targets[order])
        self.labels = torch.from_numpy(patients.labels_N[order])
        self.count = torch.from_numpy(np.bincount(patients.patient_N, minlength=patients.n_patients))
        self.first = torch.cumsum(self.count, 0) - self.count
        self.sampling_rate, self.random = sampling_rate, random

    def draw(self) -> Batch:
        """Records of a new batch, images in [-1, 1], and their patients (B,); B is private."""
        drawn = self.random.bernoulli(len(self.count), self.sampling_rate).nonzero().squeeze(1)
        which = (self.random.uniform(len(drawn)) * self.count[drawn]).long()
        rows = self.first[drawn] + which
        images = self.images[rows].float()
        targets = images if self.targets is self.images else self.targets[rows].float()
        return Batch(Records(images, self.labels[rows], targets), drawn)


class Side:
    """One network with its optimiser and, where it sees patients, its private step and the witness of that."""

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        study: Study,
        sampler: PatientSampler,
        *,
        noise_multiplier: float | None,
        fakes: int,
        method: Method,
        random: RandomSource,
        witness: NoWitness | None,
    ) -> None:
        self.network, t = network, study.training
        self.adam = torch.optim.Adam(network.parameters(), lr, (t.beta1, t.beta2))
        self.witness, self.divisor, self.step = NoWitness(), t.patients_per_step + fakes, None
        if noise_multiplier is not None:
            self.witness = witness or Witness(
                noise_multiplier=noise_multiplier,
                clip_norm=study.privacy.clip_norm,
                sampling_rate=sampler.sampling_rate,
                fakes=fakes,
                patients=len(sampler.count),
                declared=round(t.patients_per_step / sampler.sampling_rate),
            )
            self.step = PrivateStep(
                network,
                self.adam,
                noise_multiplier=noise_multiplier,
                clip_norm=study.privacy.clip_norm,
                divisor=self.divisor,
                random=random,
                witness=self.witness,
                method=method,
            )

    def frozen(self) -> AbstractContextManager[nn.Module]:
        """Context in which the network is used but not trained."""
        return self.step.frozen() if self.step is not None else _Unweighted(self.network)

    def update(self, row_losses: RowLosses, inputs: tuple[Tensor, ...]) -> Tensor:
        """One step on these rows, private where it has to be; returns their losses, which are NOT private."""
        if self.step is not None:
            return self.step.step(row_losses, inputs)
        self.adam.zero_grad(set_to_none=True)
        if not len(inputs[0]):
            return torch.zeros(0)
        losses = row_losses(self.network, *inputs)
        (losses.sum() / self.divisor).backward()
        self.adam.step()
        return losses.detach()

    def descend(self, loss: Tensor) -> float:
        """One step on a loss of no patient."""
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()
        return float(loss.detach())


class LocalTrainer:
    """Trains one hospital's copy of both networks; keeps their Adam states from round to round.

    Args:
        noise_multiplier: sigma; None trains WITHOUT privacy: a study that promises none, a simulation's arm.
        steps_done: discriminator steps of earlier rounds: turns of the generator are counted over rounds.
        witness: that of the round before for the discriminator, which remembers its noise; None begins a new one.

    Raises:
        StudyError: CONFIG_RANGE, the recipe does not fit. PrivacyError: PRIVACY_MODEL. DataError: DATA_LABEL.
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
        self.recipe = recipes.load(study)
        if study.images.paired and sampler.targets is sampler.images:
            raise DataError("DATA_LABEL", "the study needs target images, and the data has none", "images.paired")
        self.generator, self.discriminator = generator.to(device), discriminator.to(device)
        if noise_multiplier is not None:
            for network in (generator, discriminator):
                refuse_hidden_state(network)
            if not self.recipe.fake_rows:
                refuse_unsafe(generator)  # what it makes is part of a patient's record
        seed = int(random.uniform(1) * 2**31)  # what fakes are made of is public: any stream will do
        self.fakes = torch.Generator().manual_seed(seed)
        self.random = random
        """Secret: sampling, and what is drawn for each record, whose number is private."""
        both = self.recipe.private == "both"
        if not both:
            # its convolutions, most of a step, are faster so; torch's types know no layout without a device
            generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.d = Side(
            discriminator,
            t.discriminator_lr,
            study,
            sampler,
            noise_multiplier=noise_multiplier,
            fakes=t.patients_per_step if self.recipe.fake_rows else 0,
            method=self.recipe.method,
            random=random,
            witness=witness,
        )
        self.g = Side(
            generator,
            t.generator_lr,
            study,
            sampler,
            noise_multiplier=noise_multiplier if both else None,
            fakes=0,
            method=self.recipe.method,
            random=random,
            witness=None,
        )
        self.replay = stabilisers.Replay(t.replay, self.fakes)
        self.turns = stabilisers.Turns(t.discriminator_steps, adaptive=t.adaptive)

    @property
    def adams(self) -> dict[str, torch.optim.Adam]:
        """The optimisers, whose states go on from round to round."""
        return {"generator": self.g.adam, "discriminator": self.d.adam}

    @property
    def method(self) -> str:
        """How gradients of single records are found: "book-keeping", "hooks", "functional", or "plain".

        Where two networks are private and differ in it: of the discriminator, then of the generator.
        """
        found = [side.step.method for side in (self.d, self.g) if side.step is not None]
        return ", ".join(dict.fromkeys(found)) or "plain"

    @property
    def checks(self) -> dict[str, str]:
        """What the witnesses say of noise, clipping, rows and sampling, after `train`. The caller judges."""
        return worst_checks(side.witness.verdicts() for side in (self.d, self.g) if side.step is not None)

    def train(self, steps: int) -> Losses:
        """`steps` discriminator steps, and a generator step after every `discriminator_steps` of them.

        Raises:
            ModelError: MODEL_NOT_FINITE, a weight became NaN or infinite.
        """
        generator_losses, fake_losses = [], []
        private_generator = self.recipe.private == "both"
        self.probe()
        for _ in range(steps):
            fake_losses.append(self._discriminator_step())
            self.steps_done += 1
            if self.turns.due(self.steps_done):
                generator_losses.append(self._private_generator_step() if private_generator else self._generator_step())
        self.probe()  # again: what a recipe remembers of its steps would show now
        weights = [*self.generator.parameters(), *self.discriminator.parameters()]
        if not all(w.isfinite().all() for w in weights):
            raise ModelError("MODEL_NOT_FINITE", "a weight is NaN or infinite after local training")
        if private_generator or not generator_losses:
            generator_losses = [self._public_loss()]
        return Losses(float(np.mean(generator_losses)), float(np.mean(fake_losses)))

    def close(self) -> None:
        """Leave the networks as plain modules."""
        for side in (self.d, self.g):
            if side.step is not None:
                side.step.close()

    def _new_fakes(self, n: int = 0, random: torch.Generator | None = None) -> Fakes:
        """`patients_per_step` of them, unless it is said otherwise."""
        n, random = n or self.study.training.patients_per_step, random or self.fakes
        latent = torch.randn(n, self.study.gan.latent, generator=random)
        labels = torch.randint(len(self.study.images.classes), (n,), generator=random)
        return Fakes(latent.to(self.device), labels.to(self.device))

    # ---- steps

    def _draw(self, side: Side) -> Records:
        batch = self.sampler.draw()
        side.witness.saw_draw(batch.patients_B)
        return batch.records.to(self.device)

    def _discriminator_step(self) -> float:
        records, fakes = self._draw(self.d), self._new_fakes()
        with self.g.frozen() as generator:
            inputs = self.recipe.discriminator_inputs(generator, records, fakes, self.random)
        if self.recipe.fake_rows:
            inputs = self.replay.mixed(inputs, n_real=len(records.labels_R))
        losses = self.d.update(self.recipe.discriminator_losses, inputs)
        self._limit_discriminator(fakes)
        if not self.recipe.fake_rows:
            return 0.0
        fake_losses = losses.view(-1, len(inputs[0]))[:, len(records.labels_R) :].sum(0)
        return float(fake_losses.mean())

    def _limit_discriminator(self, fakes: Fakes) -> None:
        """What is done to weights that are private already; no patient is read."""
        t = self.study.training
        if t.fake_penalty:
            with self.g.frozen() as generator, torch.no_grad():
                images = generator(*fakes)
            with self.d.frozen() as discriminator:
                slopes = stabilisers.penalty_gradient(discriminator, images, fakes.labels_F)
            stabilisers.descend(self.discriminator, slopes, t.discriminator_lr * t.fake_penalty)
        self.recipe.after_discriminator_step(self.discriminator)
        if t.spectral_projection:
            stabilisers.project_spectral(self.discriminator)

    def _generator_step(self) -> float:
        fakes = self._new_fakes()
        with self.d.frozen() as discriminator:
            loss = self.g.descend(self.recipe.generator_loss(self.generator, discriminator, fakes))
            if self.turns.adaptive:
                with torch.no_grad():
                    answers = discriminator(self.generator(*fakes), fakes.labels_F)
                self.turns.saw(answers)
        return loss

    def _private_generator_step(self) -> float:
        records = self._draw(self.g)
        inputs = self.recipe.generator_inputs(records, self.random)
        with self.d.frozen() as discriminator:

            def row_losses(generator: nn.Module, *rows: Tensor) -> Tensor:
                return self.recipe.generator_losses(generator, discriminator, *rows)

            self.g.update(row_losses, inputs)
        return 0.0

    @torch.no_grad()
    def _public_loss(self) -> float:
        with self.d.frozen() as discriminator, self.g.frozen() as generator:
            return float(self.recipe.public_loss(generator, discriminator, self._new_fakes()))

    # ---- the probe

    def probe(self) -> None:
        """Before the first patient of a round and after the last: do rows of the recipe leave each other alone?

        Random records of no patient, from randomness of their own. What is made of all but the first, and all fakes,
        may not change when the first gets other pixels and another label: neither the inputs (compared here), nor
        losses and gradients (shown to the witness).
        """
        if self.d.step is None or not self.d.witness.watches:
            return
        seed = int(SystemRandom().integers(1, 2**31))  # of what is drawn for records: the same in both passes
        some, white = self._random_records(PROBE_ROWS), self._random_records(1, white=True)
        other = Records(*(torch.cat([w, part[1:]]) for w, part in zip(white, some, strict=True)))
        with self.g.frozen() as generator:

            def made_of(records: Records) -> tuple[Tensor, ...]:
                fakes = self._new_fakes(2, torch.Generator().manual_seed(1))
                return self.recipe.discriminator_inputs(generator, records, fakes, InsecureRandom(seed))

            inputs, changed = made_of(some), made_of(other)
        self._show_probe(self.d, self.recipe.discriminator_losses, inputs, changed)
        if self.g.step is not None:
            pair = [self.recipe.generator_inputs(r, InsecureRandom(seed)) for r in (some, other)]
            with self.d.frozen() as discriminator:

                def row_losses(generator: nn.Module, *rows: Tensor) -> Tensor:
                    return self.recipe.generator_losses(generator, discriminator, *rows)

                self._show_probe(self.g, row_losses, *pair)

    @property
    def private_steps(self) -> int:
        """Private steps that were taken, of both networks: what has to be paid for."""
        return sum(side.step.taken for side in (self.d, self.g) if side.step is not None)

    def _show_probe(
        self, side: Side, row_losses: RowLosses, inputs: tuple[Tensor, ...], changed: tuple[Tensor, ...]
    ) -> None:
        assert side.step is not None
        apart = all(torch.equal(a[1:], b[1:]) for a, b in zip(inputs, changed, strict=True))
        # The last row stands in for the first one in the second pass.
        rows = [torch.cat([a, b[:1]]) for a, b in zip(inputs, changed, strict=True)]
        side.step.probe(row_losses, rows)
        if not apart:
            side.witness.saw_mixed_inputs()

    def _random_records(self, n: int, *, white: bool = False) -> Records:
        size, classes = self.study.images.size, len(self.study.images.classes)
        images, targets = (
            torch.ones(n, 1, size, size)
            if white
            else SystemRandom().uniform(n * size * size).float().reshape(n, 1, size, size) * 2 - 1
            for _ in range(2)
        )
        if not self.study.images.paired:
            targets = images
        return Records(images, (torch.arange(n) + white) % classes, targets).to(self.device)


class _Unweighted(nullcontext[nn.Module]):
    """A plain network whose weights need no gradient meanwhile."""

    def __enter__(self) -> nn.Module:
        self.enter_result.requires_grad_(False)
        return self.enter_result

    def __exit__(self, *_: object) -> None:
        self.enter_result.requires_grad_(True)
