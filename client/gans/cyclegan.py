"""CycleGAN: images of one domain become images of another, without pairs (Zhu et al. 2017).

The study's two classes are the domains: low and full dose, one hospital's scanner and another's. A record is one image
of one domain. Its losses: there and back again is where it started (cycle), an image of the domain that is asked for
stays as it is (identity), and the other domain's discriminator is deceived. The discriminator of a record's own domain
judges the image, that of the other domain what was made of it: both in one clip.

Generator and discriminator hold a network for each domain, and each runs on all records of a batch, so that a record
stays in its row; the one that does not apply gets no gradient. There is no pool of past images: it would show records
to a step that did not sample them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmedgan.client.gans.parts.translation import PatchDiscriminator, Translation, UNet, adversarial
from fedmedgan.client.gans.recipe import Fakes, Records
from fedmedgan.client.training.randomness import RandomSource
from fedmedgan.shared.errors import StudyError
from fedmedgan.shared.study import Study

CYCLE, IDENTITY = 10.0, 5.0


class TwoDomains(nn.Module):
    """images (N, 1, S, S) and domains (N,) of 0 and 1 -> what the network of each row's domain makes of it."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, images_N1SS: Tensor, domain_N: Tensor) -> Tensor:
        a, b = self.first(images_N1SS), self.second(images_N1SS)
        is_second = domain_N.bool().view(-1, *[1] * (a.ndim - 1))
        return torch.where(is_second, b, a)


class CycleGAN(Translation):
    """generator(images, domain they shall come to), discriminator(images, domain they are to be of)."""

    record: ClassVar[str] = "an image of one of two domains"
    judged = "domains"

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        if len(self.images.classes) != 2:
            what = f"cyclegan needs two domains, and there are {len(self.images.classes)} classes"
            raise StudyError("CONFIG_RANGE", what, "images.classes", hint="name the two domains")

    def build(self) -> tuple[nn.Module, nn.Module]:
        generators = [UNet(self.images, self.gan) for _ in range(2)]
        return TwoDomains(*generators), TwoDomains(*(PatchDiscriminator(1, self.gan) for _ in range(2)))

    def generator_inputs(self, records: Records, random: RandomSource) -> tuple[Tensor, ...]:
        return records.images_R1SS, records.labels_R

    def generator_losses(self, generator: nn.Module, discriminator: nn.Module, *inputs: Tensor) -> Tensor:
        images, own = inputs
        other = 1 - own
        made = generator(images, other)
        cycle = (generator(made, own) - images).abs().flatten(1).mean(1)
        identity = (generator(images, own) - images).abs().flatten(1).mean(1)
        return adversarial(discriminator(made, other), real=True) + CYCLE * cycle + IDENTITY * identity

    def discriminator_inputs(
        self, generator: nn.Module, records: Records, fakes: Fakes, random: RandomSource
    ) -> tuple[Tensor, ...]:
        images, own = records.images_R1SS, records.labels_R
        with torch.no_grad():
            made = generator(images, 1 - own) if len(images) else images
        return images, made, own

    def discriminator_losses(self, discriminator: nn.Module, *inputs: Tensor) -> Tensor:
        images, made, own = inputs
        real, fake = discriminator(torch.cat([images, made]), torch.cat([own, 1 - own])).chunk(2)
        return torch.cat([adversarial(real, real=True), adversarial(fake, real=False)]) / 2

    @torch.no_grad()
    def samples(self, generator: nn.Module, rows: int, columns: int, seed: int) -> Tensor:
        """Rows of drawn images, brought to the first domain, and brought to the second."""
        images = self.public_images(columns, seed)
        domains = [torch.full((columns,), domain) for domain in (0, 1)]
        three = [images, generator(images, domains[0]), generator(images, domains[1])]
        return torch.cat([three[row % 3] for row in range(max(rows, 3))])

    def row_names(self) -> list[str]:
        return ["drawn input", *(f"as {name}" for name in self.images.classes)]


RECIPE = CycleGAN
