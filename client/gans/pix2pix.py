"""pix2pix: an image becomes another one of the same scene (Isola et al. 2017). U-Net and PatchGAN.

task                                    input                                  output
denoise                                 simulated low dose                     the image
super-resolution-2, super-resolution-4  the image at half, a quarter           the image
k-space                                 undersampled acquisition               the image
paired                                  the image                              its target: mask, other modality

The first four need no second image: the input is made of the output. Losses of a record: the discriminator judges
(input, output) and (input, generated), both in one clip; the generator is to deceive it and to be near the output.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmedgan.client.gans.parts.translation import PatchDiscriminator, Translation, UNet, adversarial, degraded
from fedmedgan.client.gans.recipe import Fakes, Records
from fedmedgan.client.training.randomness import InsecureRandom, RandomSource
from fedmedgan.shared.errors import StudyError
from fedmedgan.shared.study import Study

NEAR = 100.0
"""Weight of the mean absolute difference to the output, as in the paper."""


class Pix2Pix(Translation):
    """Generator: U-Net on the input. Discriminator: patches of input and output side by side."""

    record: ClassVar[str] = "an image, with its target where the data has targets"
    judged = "pairs"
    tasks: ClassVar[tuple[str, ...]] = ("denoise", "super-resolution-2", "super-resolution-4", "k-space", "paired")

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        if (self.gan.task == "paired") != self.images.paired:
            what = "the task needs target images" if self.gan.task == "paired" else "the task makes its own targets"
            raise StudyError("CONFIG_RANGE", what, "images.paired", hint="set images.paired to fit the task")

    def build(self) -> tuple[nn.Module, nn.Module]:
        return UNet(self.images, self.gan), PatchDiscriminator(2, self.gan)

    def input_and_output(self, records: Records, random: RandomSource) -> tuple[Tensor, Tensor]:
        """What the generator gets, and what it is to make of it."""
        if self.images.paired:
            return records.images_R1SS, records.targets_R1SS
        return degraded(self.gan.task, records.images_R1SS, random), records.images_R1SS

    def generator_inputs(self, records: Records, random: RandomSource) -> tuple[Tensor, ...]:
        return self.input_and_output(records, random)

    def generator_losses(self, generator: nn.Module, discriminator: nn.Module, *inputs: Tensor) -> Tensor:
        given, wanted = inputs
        made = generator(given)
        near = (made - wanted).abs().flatten(1).mean(1)
        return adversarial(discriminator(torch.cat([given, made], dim=1)), real=True) + NEAR * near

    def discriminator_inputs(
        self, generator: nn.Module, records: Records, fakes: Fakes, random: RandomSource
    ) -> tuple[Tensor, ...]:
        given, wanted = self.input_and_output(records, random)
        with torch.no_grad():
            made = generator(given) if len(given) else given
        return given, wanted, made

    def discriminator_losses(self, discriminator: nn.Module, *inputs: Tensor) -> Tensor:
        given, wanted, made = inputs
        logits = discriminator(torch.cat([torch.cat([given, wanted], dim=1), torch.cat([given, made], dim=1)]))
        real, fake = logits.chunk(2)
        return torch.cat([adversarial(real, real=True), adversarial(fake, real=False)]) / 2

    @torch.no_grad()
    def samples(self, generator: nn.Module, rows: int, columns: int, seed: int) -> Tensor:
        """Rows of inputs and, below each, of outputs."""
        records = self.public_records(columns, seed)
        given, _ = self.input_and_output(records, InsecureRandom(seed))
        both = [given, generator(given)]
        return torch.cat([both[row % 2] for row in range(max(rows, 2))])

    def row_names(self) -> list[str]:
        return [("input", "output")[row % 2] for row in range(max(len(self.images.classes), 2))]


RECIPE = Pix2Pix
