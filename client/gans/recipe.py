"""What a recipe is: one GAN family in one file of this folder, docs/write-a-recipe.md.

A recipe declares its networks, its losses, which networks are trained on patients, and what one private record is.
The engine (client/training/local_round.py) does the rest, the same for all: Poisson batches of patients, an independent
one for each private network; one clip for all that depends on a patient; noise; steps that read no patient for nothing.

What the engine relies on, and probes before the first patient of each round is read: the inputs and losses that a
recipe makes of record i depend on record i alone. Nothing may be computed over a batch.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.client.gans.parts.initial import SameEverywhere
from fedmedgan.client.training.randomness import RandomSource
from fedmedgan.shared.errors import StudyError
from fedmedgan.shared.study import Study

SHIFT = 2
"""Pixels by which a view may be shifted, each way."""


class Records(NamedTuple):
    """Private records, one of each patient in a step; their number is private too."""

    images_R1SS: Tensor
    """float32 in [-1, 1]."""
    labels_R: Tensor
    """int64, place in the study's classes."""
    targets_R1SS: Tensor
    """The same as `images_R1SS` where the study has no target images."""

    def to(self, device: torch.device) -> Records:
        return Records(*(part.to(device) for part in self))


class Fakes(NamedTuple):
    """What generated images are made of; public randomness, in a public number."""

    latent_FZ: Tensor
    labels_F: Tensor


class Recipe:
    """One GAN family; a file defines a subclass and names it ``RECIPE``.

    Args:
        study: its images, its gan section and what of training belongs to a loss are what a recipe may read.

    Raises:
        StudyError: CONFIG_RANGE, the study asks for what this recipe cannot do.
    """

    private: ClassVar[Literal["discriminator", "both"]] = "discriminator"
    """Networks whose losses read patients."""
    record: ClassVar[str] = "an image with its label"
    """What one private record is, in words."""
    fake_rows: ClassVar[bool] = True
    """Whether fakes are rows of their own, made of no patient, in a public number; else each is part of a record."""
    method: ClassVar[Literal["auto", "functional"]] = "auto"
    """How gradients of single records are found; "functional" for losses with a gradient in them."""
    judged: ClassVar[Literal["images", "pairs", "domains", ""]] = ""
    """What the generator's images are compared with: real images, as sets; what each was to become (the recipe has
    `input_and_output`); images of the other domain (generator(images_N1SS, domain_N)). Else they have no score."""
    tasks: ClassVar[tuple[str, ...]] = ("",)
    """Values of gan.task that this recipe knows."""
    conditional: ClassVar[bool] = True
    """Whether the label is an input; if not, the study must have one class."""
    ignores: ClassVar[tuple[str, ...]] = ()
    """Settings that this recipe has no use for, e.g. "training.views": a study that sets one is refused.

    The default may be written out, and "none", which asks for nothing.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.images, self.gan = study, study.images, study.gan
        name = self.gan.recipe
        if self.gan.private != self.private:
            what = f"{name} trains its {_read(self.private)} on patients, the study says {_read(self.gan.private)}"
            raise StudyError("CONFIG_RANGE", what, "gan.private", hint=f'set it to "{self.private}"')
        if self.gan.task not in self.tasks:
            known = ", ".join(f'"{task}"' for task in self.tasks)
            raise StudyError("CONFIG_RANGE", f"{name} knows the tasks {known}", "gan.task", hint="choose one of them")
        if study.is_private and not self.fake_rows and self.gan.generator_norm == "batch":
            what = "each generated image is part of a patient's record, and the generator would mix them"
            raise StudyError(
                "PRIVACY_MODEL", what, "gan.generator_norm", hint='choose another, or set privacy = "none"'
            )
        for place in self.ignores:
            section, setting = place.split(".")
            part: BaseModel = getattr(study, section)
            if getattr(part, setting) not in (type(part).model_fields[setting].default, "none"):
                raise StudyError("CONFIG_RANGE", f"{name} has no use for it", place, hint="leave it out of the study")
        if not self.conditional and len(self.images.classes) > 1:
            what = f"{name} makes images without a label, and there are {len(self.images.classes)} classes"
            raise StudyError("CONFIG_RANGE", what, "images.classes", hint="give one class, or take cdcgan")

    # ---- what a recipe's file defines

    def build(self) -> tuple[nn.Module, nn.Module]:
        """Generator and discriminator with new weights, drawn uniformly or from a Gaussian (torch.nn.init)."""
        raise NotImplementedError

    def discriminator_inputs(
        self, generator: nn.Module, records: Records, fakes: Fakes, random: RandomSource
    ) -> tuple[Tensor, ...]:
        """Tensors with one row for each record, then, with `fake_rows`, one for each fake. No gradient is needed.

        Args:
            random: secret, for what is drawn for each record; `fakes` hold the public draws.
        """
        raise NotImplementedError

    def discriminator_losses(self, discriminator: nn.Module, *inputs: Tensor) -> Tensor:
        """Losses (V * rows,) of those rows, V views of each: the V rows i, rows + i, ... are clipped together."""
        raise NotImplementedError

    def generator_loss(self, generator: nn.Module, discriminator: nn.Module, fakes: Fakes) -> Tensor:
        """A scalar of generated images only, where the generator is not private."""
        raise NotImplementedError

    def generator_inputs(self, records: Records, random: RandomSource) -> tuple[Tensor, ...]:
        """Tensors with one row for each record, where the generator is private."""
        raise NotImplementedError

    def generator_losses(self, generator: nn.Module, discriminator: nn.Module, *inputs: Tensor) -> Tensor:
        """Losses (V * records,), where the generator is private."""
        raise NotImplementedError

    def samples(self, generator: nn.Module, rows: int, columns: int, seed: int) -> Tensor:
        """Images (rows * columns, 1, S, S) for a picture of what the model does; made of no patient."""
        raise NotImplementedError

    def row_names(self) -> list[str]:
        """What each row of `samples` shows, from top to bottom, where as many rows as classes are asked for."""
        return ["as the recipe draws them"]

    def public_loss(self, generator: nn.Module, discriminator: nn.Module, fakes: Fakes) -> Tensor:
        """The generator's loss on what is made of no patient, so that it can be told."""
        return self.generator_loss(generator, discriminator, fakes)

    def after_discriminator_step(self, discriminator: nn.Module) -> None:
        """What is done to weights that are already private, e.g. to limit them."""

    # ---- what all have

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Both networks with the study's initial weights: equal at every site, whatever the machine."""
        with SameEverywhere(self.gan.init_seed):
            return self.build()


class Synthesis(Recipe):
    """Noise (and a label) in, an image out: only the discriminator sees patients.

    A file defines `build`, and `row_losses` and `fake_loss` where it does not want those of Goodfellow et al. 2014. The
    generator is called as generator(latent_NZ, labels_N), the discriminator as discriminator(images_N1SS, labels_N).
    """

    judged = "images"

    def row_losses(self, answers: Tensor, is_real_N: Tensor, labels_N: Tensor) -> Tensor:
        """Loss of each row by itself (N,); `is_real_N` is 1 for patients (less with label smoothing), 0 for fakes."""
        return functional.binary_cross_entropy_with_logits(answers, is_real_N, reduction="none")

    def fake_loss(self, answers: Tensor, labels_N: Tensor) -> Tensor:
        """The generator's loss, a scalar, of what the discriminator answers to fakes: non-saturating."""
        return functional.softplus(-answers).mean()

    def discriminator_inputs(
        self, generator: nn.Module, records: Records, fakes: Fakes, random: RandomSource
    ) -> tuple[Tensor, ...]:
        with torch.no_grad():
            made = generator(*fakes)
        n_real, n = len(records.labels_R), len(records.labels_R) + len(made)
        is_real_N = (torch.arange(n, device=made.device) < n_real) * self.study.training.real_label
        return torch.cat([records.images_R1SS, made]), torch.cat([records.labels_R, fakes.labels_F]), is_real_N.float()

    def discriminator_losses(self, discriminator: nn.Module, *inputs: Tensor) -> Tensor:
        images_N1SS, labels_N, is_real_N = inputs
        shifts = _shifts(self.study.training.views)
        views = torch.cat([shifted(images_N1SS, *by) for by in shifts]) if len(shifts) > 1 else images_N1SS
        labels, is_real = labels_N.repeat(len(shifts)), is_real_N.repeat(len(shifts))
        return self.row_losses(discriminator(views, labels), is_real, labels) / len(shifts)

    def generator_loss(self, generator: nn.Module, discriminator: nn.Module, fakes: Fakes) -> Tensor:
        return self.fake_loss(discriminator(generator(*fakes), fakes.labels_F), fakes.labels_F)

    @torch.no_grad()
    def samples(self, generator: nn.Module, rows: int, columns: int, seed: int) -> Tensor:
        fixed = torch.Generator().manual_seed(seed)
        latent = torch.randn(columns, self.gan.latent, generator=fixed).repeat(rows, 1)
        labels = torch.arange(rows).repeat_interleave(columns) % len(self.images.classes)
        made: Tensor = generator(latent, labels)
        return made

    def row_names(self) -> list[str]:
        return list(self.images.classes)


def shifted(images_N1SS: Tensor, down: int, right: int) -> Tensor:
    """All images moved by whole pixels; what comes in at the edges is black."""
    size = images_N1SS.shape[-1]
    padded = functional.pad(images_N1SS, (SHIFT, SHIFT, SHIFT, SHIFT), value=-1.0)
    top, left = SHIFT - down, SHIFT - right
    return padded[..., top : top + size, left : left + size]


def _shifts(views: int) -> list[tuple[int, int]]:
    """The image as it is, then others near it, for real and generated images alike."""
    near = sorted(((y, x) for y in range(-SHIFT, SHIFT + 1) for x in range(-SHIFT, SHIFT + 1)), key=_distance)
    return near[:views]


def _distance(by: tuple[int, int]) -> tuple[int, int, int]:
    return by[0] ** 2 + by[1] ** 2, by[0], by[1]


def _read(private: str) -> str:
    return "discriminator" if private == "discriminator" else "generator and its discriminator"


# ---- finding one


def known() -> list[str]:
    """Names of the recipes that are installed."""
    from fedmedgan.client import gans

    return sorted(
        found.name for found in pkgutil.iter_modules(gans.__path__) if not found.ispkg and found.name != "recipe"
    )


def load(study: Study) -> Recipe:
    """The recipe that a study names.

    Raises:
        StudyError: CONFIG_RANGE, there is none of that name, or the study does not fit it.
    """
    name = study.gan.recipe
    if name not in known():
        what = f"no recipe is called {name!r}"
        raise StudyError("CONFIG_RANGE", what, "gan.recipe", hint=f"take one of {', '.join(known())}")
    module = importlib.import_module(f"fedmedgan.client.gans.{name}")
    recipe: Recipe = module.RECIPE(study)
    return recipe
