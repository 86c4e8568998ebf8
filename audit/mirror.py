"""A mirror run: the study's own training code on made-up patients, watched from outside.

No patient's image is in it. What an attacker of the published proof may know is known here: the weights before each
step, the generated images in the batch, and the noised sum of clipped gradients. That sum is read where it enters Adam
(a hook of torch's on the optimiser), so sampling, clipping, noise and their order are those of the real trainer. The
attack's own gradients come from torch.func, not from Opacus: a fault in one would show against the other.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.gans.recipe import Recipe, Synthesis
from fedmedgan.client.training.local_round import LocalTrainer, PatientSampler
from fedmedgan.client.training.randomness import RandomSource
from fedmedgan.shared.errors import StudyError
from fedmedgan.shared.study import Study

ROWS_AT_ONCE = 64

MakeTrainer = Callable[..., LocalTrainer]
"""`LocalTrainer` itself; tests plant a trainer with less noise than the study says."""


@dataclass(frozen=True)
class Seen:
    """What an attacker sees of one step: the noised sum is that of the fakes and of those members that were drawn."""

    rows_MD: Tensor
    """Gradient of each canary at the weights before the step, clipped to C; float32."""
    fakes_ND: Tensor
    """The same of the generated images in the batch."""
    noised_D: Tensor
    """The noised sum of clipped gradients, as Adam gets it but for the public divisor."""


class Canaries:
    """Made-up patients, one image each: black and white pixels by fair coins, classes too.

    Two such images differ in half of their pixels, and the discriminator's gradients on them point in nearly
    independent directions (measured: mean cosine 0.15 at 64 x 64). So one canary is hardly mistaken for another.
    """

    def __init__(self, study: Study, count: int, random: RandomSource) -> None:
        side, classes = study.images.size, len(study.images.classes)
        self.images_M1SS = random.bernoulli(count * side**2, 0.5).reshape(count, 1, side, side).float() * 2 - 1
        self.labels_M = random.integers(count, classes)

    def __len__(self) -> int:
        return len(self.labels_M)

    def patients(self, member_M: Tensor) -> PatientImages:
        """Those canaries that are members, as a hospital's patients."""
        images, labels = self.images_M1SS[member_M].numpy(), self.labels_M[member_M].numpy()
        n = len(labels)
        names = tuple(f"{i:032x}" for i in range(n))
        return PatientImages(images.astype(np.float16), labels, np.arange(n), n, FolderReport((), n, n), names)


def watch(
    study: Study,
    canaries: Canaries,
    member_M: Tensor,
    see: Callable[[Seen], None],
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    random: RandomSource,
    make_trainer: MakeTrainer = LocalTrainer,
) -> None:
    """Train on the members, and show `see` what an attacker sees of each step.

    Args:
        member_M: (M,) bool, which canaries are in the training set.
        see: called at each step, before the weights are changed.

    Raises:
        ModelError, PrivacyError: as `LocalTrainer`.
    """
    recipe = require_auditable(study)
    generator, discriminator = recipe.networks()
    weights_before = copy.deepcopy(discriminator)  # a plain one: the other gets Opacus' hooks
    trainer = make_trainer(
        study,
        generator,
        discriminator,
        PatientSampler(canaries.patients(member_M), sampling_rate, random),
        noise_multiplier=noise_multiplier,
        random=random,
        device=torch.device("cpu"),
    )
    divisor = trainer.d.divisor
    is_real_M = torch.full((len(canaries),), study.training.real_label)
    fakes: list[Tensor] = []

    def generated(_: nn.Module, inputs: tuple[Tensor, Tensor], images: Tensor) -> None:
        fakes[:] = images.detach(), inputs[1]

    def about_to_update(*_: Any) -> None:
        noised_D = torch.cat([p.grad.flatten() for p in discriminator.parameters() if p.grad is not None]) * divisor
        weights_before.load_state_dict(discriminator.state_dict())
        images, labels = fakes
        fakes_ND = clipped_rows(recipe, weights_before, images, labels, torch.zeros(len(labels)))
        rows_MD = clipped_rows(recipe, weights_before, canaries.images_M1SS, canaries.labels_M, is_real_M)
        see(Seen(rows_MD, fakes_ND, noised_D))

    hooks = [
        generator.register_forward_hook(generated),
        trainer.d.adam.register_step_pre_hook(about_to_update),
    ]
    try:
        trainer.train(steps)
    finally:
        for hook in hooks:
            hook.remove()
        trainer.close()


def require_auditable(study: Study) -> Recipe:
    """The study's recipe, whose rows an attacker can tell apart.

    Raises:
        StudyError: CONFIG_RANGE, in this recipe a row holds more than one image.
    """
    recipe = recipes.load(study)
    if not isinstance(recipe, Synthesis) or not recipe.fake_rows:
        what = "the mirror run knows recipes whose generated images are rows of their own"
        hint = "audit such a study by its ledger"
        raise StudyError("CONFIG_RANGE", what, f"gan.recipe: {study.gan.recipe}", hint=hint)
    return recipe


class _Losses(nn.Module):
    """A discriminator whose call is the recipe's loss of each row."""

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__()
        self.recipe, self.network = recipe, network

    def forward(self, *rows: Tensor) -> Tensor:
        return self.recipe.discriminator_losses(self.network, *rows)


def clipped_rows(
    recipe: Recipe, network: nn.Module, images_N1SS: Tensor, labels_N: Tensor, is_real_N: Tensor
) -> Tensor:
    """Gradient of the discriminator's loss on each row by itself, scaled down to the study's clipping norm: (N, D)."""
    clip_norm = recipe.study.privacy.clip_norm
    weights = {name: p.detach() for name, p in network.named_parameters()}
    whole = _Losses(recipe, network)

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor, is_real: Tensor) -> Tensor:
        alone = (image[None], label[None], is_real[None])
        losses: Tensor = functional_call(whole, {f"network.{n}": w for n, w in weights.items()}, alone)
        return losses.sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        each = vmap(grad(loss), in_dims=(None, 0, 0, 0), chunk_size=ROWS_AT_ONCE)
        gradients = each(weights, images_N1SS, labels_N, is_real_N)
    rows_ND = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    return rows_ND * (clip_norm / rows_ND.norm(dim=1).clamp(min=clip_norm))[:, None]
