"""Does a recipe mix patients? Tried on random records before a study is signed, apart from the witness of each round.

The clipping of a record bounds what its patient can move only if nothing else in the step depends on the record. So
batches of several sizes are put through the recipe, one record is changed (its image, its label, at either end) or
taken away, and of all other records and of all fakes nothing may change: not what the recipe makes of them, not their
losses, not their gradients. Nor may what reads no patient, the loss of a public generator say, know which records were
shown.

It finds each mixing that an honest author came up with so far (tests/test_mixing.py), not one that hides: a rule that
only certain images, or a step far from the first, would trigger. Recipes are code that a hospital installs and reads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedmedgan.client.gans.recipe import Fakes, Records
from fedmedgan.client.training.local_round import LocalTrainer, Side
from fedmedgan.client.training.randomness import InsecureRandom, RandomSource
from fedmedgan.client.training.witness import LOUD

SMALL, LARGE = (1, 2, 5, 16), 64
"""Records in a batch. Gradients are compared in small ones; inputs and losses also in large ones, and in one of twice
the patients of a step."""
MOST_VALUES = 1 << 25
"""Of all records' gradients: a large network is tried with smaller batches."""
TOLERANCE = 1e-3
"""How far a record may move, relative to itself: batches of another size are added in another order."""
FAKES = 4
DRAWS = (0.4, 0.02, 0.6, 0.98)
"""What is drawn for every record: each side of a coin, and what happens seldom. Gradients are compared at the first."""
MOST_PIXELS = 1 << 22
"""Of the largest batch."""


class _Same(RandomSource):
    """The same number for everybody: who is drawn how does not depend on who else is there.

    Args:
        draw: in [0, 1).
    """

    name = "none"

    def __init__(self, draw: float) -> None:
        self.draw = draw

    def uniform(self, n: int) -> Tensor:
        return torch.full((n,), self.draw, dtype=torch.float64)

    def normal(self, shape: Sequence[int], std: float, device: torch.device | str = "cpu") -> Tensor:
        return torch.full(tuple(shape), (self.draw - 0.1) * std, dtype=torch.float64, device=device)


class _Part(NamedTuple):
    """What a step knows of each row, (rows, ...): first the records, then, of recipes with such rows, the fakes."""

    of_records: Tensor
    of_fakes: Tensor


class Trial:
    """A recipe with its networks, and random records to try it on.

    Args:
        trainer: private, of that recipe; its weights are left as they are.
    """

    def __init__(self, trainer: LocalTrainer, seed: int = 1) -> None:
        self.trainer, self.recipe = trainer, trainer.recipe
        self.random = InsecureRandom(seed)
        self.fakes = self._fakes()

    def found(self) -> str:
        """What depends on other records, in words; "" where nothing does."""
        for draw in DRAWS:
            for size in (*SMALL, LARGE, self._largest()) if draw == DRAWS[0] else (SMALL[-1], LARGE):
                base = self._records(size)
                for side, name in ((self.trainer.d, "discriminator"), (self.trainer.g, "generator")):
                    if side.step is None:
                        continue
                    deep = draw == DRAWS[0] and size in SMALL and size <= max(2, MOST_VALUES // _values(side.network))
                    one = self._parts(side, base, _Same(draw), deep=deep)
                    for what, other, kept, kept_other in self._variants(base):
                        two = self._parts(side, other, _Same(draw), deep=deep)
                        if problem := _difference(one, two, kept, kept_other):
                            return f"{problem} of the {name} changes when {what}, in a batch of {size}"
        return self._public_part()

    def _largest(self) -> int:
        """Twice the patients that a step expects, or as many as fit."""
        t, images = self.trainer.study.training, self.trainer.study.images
        return max(2, min(2 * t.patients_per_step, MOST_PIXELS // images.size**2))

    def _variants(self, base: Records) -> Iterator[tuple[str, Records, slice, slice]]:
        """What is done, the other records, and which rows of either must agree."""
        n, classes = len(base.labels_R), len(self.trainer.study.images.classes)
        new = self._records(1)
        if n not in SMALL:  # one of very many moves a mean little, unless it is loud
            new = new._replace(images_R1SS=LOUD * new.images_R1SS)
        label = base._replace(labels_R=torch.cat([(base.labels_R[:1] + 1) % classes, base.labels_R[1:]]))
        yield "the first record is another", _joined(new, _rows(base, slice(1, n))), slice(1, n), slice(1, n)
        yield "the last record is another", _joined(_rows(base, slice(0, n - 1)), new), slice(0, n - 1), slice(0, n - 1)
        yield "the first record has another label", label, slice(1, n), slice(1, n)
        if n > 1 or self.recipe.fake_rows:
            yield "the first record is gone", _rows(base, slice(1, n)), slice(1, n), slice(0, n - 1)
            yield "the last record is gone", _rows(base, slice(0, n - 1)), slice(0, n - 1), slice(0, n - 1)

    def _parts(self, side: Side, records: Records, random: RandomSource, *, deep: bool) -> dict[str, _Part]:
        """Inputs and losses, and, where it is asked for, gradients."""
        assert side.step is not None
        n, (inputs, row_losses) = len(records.labels_R), self._asked(side, records, random)
        found = {f"input {i + 1}": x.flatten(1) if x.dim() > 1 else x[:, None] for i, x in enumerate(inputs)}
        if deep:
            rows = side.step.gradients_of(row_losses, inputs)
            found["the loss"] = rows.losses.view(-1, rows.records).T
            found["the gradient"] = torch.cat([rows.values(i) for i in range(len(rows.parts))], dim=1)
        elif len(inputs[0]):
            with torch.no_grad():
                found["the loss"] = row_losses(side.network, *inputs).view(-1, len(inputs[0])).T
        return {name: _Part(x[:n].double(), x[n:].double()) for name, x in found.items()}

    def _asked(
        self, side: Side, records: Records, random: RandomSource
    ) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
        if side is self.trainer.d:
            with self.trainer.g.frozen() as generator:
                inputs = self.recipe.discriminator_inputs(generator, records, self.fakes, random)
            return inputs, self.recipe.discriminator_losses
        frozen = self.trainer.discriminator

        def row_losses(generator: nn.Module, *rows: Tensor) -> Tensor:
            return self.recipe.generator_losses(generator, frozen, *rows)

        return self.recipe.generator_inputs(records, random), row_losses

    def _public_part(self) -> str:
        """What is computed without noise, after each of two batches was shown: it must not know which."""
        values = []
        for records in (self._records(5), self._records(6)):
            inputs, row_losses = self._asked(self.trainer.d, records, _Same(DRAWS[0]))
            row_losses(self.trainer.discriminator, *inputs)
            discriminator = copy.deepcopy(self.trainer.discriminator)
            self.recipe.after_discriminator_step(discriminator)
            parts = [self.recipe.public_loss(self.trainer.generator, self.trainer.discriminator, self.fakes).view(1)]
            if self.recipe.private == "discriminator":
                loss = self.recipe.generator_loss(self.trainer.generator, self.trainer.discriminator, self.fakes)
                parts.append(loss.view(1))
            values.append(
                torch.cat([*(p.detach() for p in parts), *(p.detach().flatten() for p in discriminator.parameters())])
            )
        return "" if torch.equal(*values) else "what should read no patient knows which records were shown"

    def _records(self, n: int) -> Records:
        size, study = self.trainer.study.images.size, self.trainer.study
        images, targets = (
            self.random.uniform(n * size * size).float().view(n, 1, size, size) * 2 - 1 for _ in range(2)
        )
        labels = self.random.integers(n, len(study.images.classes))
        return Records(images, labels, targets if study.images.paired else images)

    def _fakes(self) -> Fakes:
        study = self.trainer.study
        labels = torch.arange(FAKES) % len(study.images.classes)
        return Fakes(self.random.normal((FAKES, study.gan.latent), 1.0).float(), labels)


def _difference(one: dict[str, _Part], two: dict[str, _Part], kept: slice, kept_two: slice) -> str:
    """What differs of the records that are in both, or of the fakes; "" where nothing does."""
    for name in (name for name in one if name in two):
        for what, a, b in (
            (name, one[name].of_records[kept], two[name].of_records[kept_two]),
            (f"{name} of a fake", one[name].of_fakes, two[name].of_fakes),
        ):
            if a.shape != b.shape or not bool(b.isfinite().all()):
                return what
            if bool(((a - b).norm(dim=1) > TOLERANCE * a.norm(dim=1) + 1e-9).any()):
                return what
    return ""


def _rows(records: Records, at: slice) -> Records:
    return Records(*(part[at] for part in records))


def _joined(first: Records, second: Records) -> Records:
    return Records(*(torch.cat(parts) for parts in zip(first, second, strict=True)))


def _values(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
